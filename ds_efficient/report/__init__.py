"""Reports on runs: read ``run.jsonl``, write a table, figures and CSV files."""
