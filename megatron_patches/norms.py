"""LayerNorm and RMSNorm for megatron-core that need neither Transformer Engine nor apex.

megatron-core's own torch norm refuses sequence parallelism; these carry the attribute that marks a gradient
as partial over the tensor-parallel ranks, and have the parameters' dtype from the start.
"""

from __future__ import annotations

from typing import Any

import torch


class TorchNorm:
    """Factory with the signature that megatron-core's specs expect of a norm class."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> torch.nn.Module:  # type: ignore[misc]
        """Return a torch LayerNorm or RMSNorm over the last dimension.

        Args:
            config: TransformerConfig; ``normalization`` is ``"LayerNorm"`` or ``"RMSNorm"``.
            hidden_size: size of the last dimension.
            eps: added to the variance.

        Raises:
            ValueError: unknown normalization, or ``layernorm_zero_centered_gamma``.
        """
        if getattr(config, "layernorm_zero_centered_gamma", False):
            raise ValueError("layernorm_zero_centered_gamma: only Transformer Engine has it; set it to False")
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in kinds:
            raise ValueError(f"normalization: {config.normalization!r} is not one of {', '.join(kinds)}")
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        norm.returns_residual = False  # asked for by newer megatron-core
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class TorchHeadNorm:
    """Factory of the norms on queries and keys (``qk_layernorm``).

    Its weight is replicated over the tensor-parallel ranks, but each rank norms other heads, so its gradient
    is partial there, with and without sequence parallelism.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> torch.nn.Module:  # type: ignore[misc]
        """Return a norm over one head's channels; arguments as `TorchNorm`."""
        norm = TorchNorm(config, hidden_size, eps, **kwargs)
        for parameter in norm.parameters():
            parameter.tensor_parallel_partial = True  # type: ignore[attr-defined]
        return norm
