"""SLoPe: double-pruned N:M sparse weights with lazy low-rank adapters."""
