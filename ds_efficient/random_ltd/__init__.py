"""random-LTD: random token dropping with a learning rate by layer tokens (arXiv 2211.11586)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_efficient.ops.random_ltd import apply_to_kept, gather_tokens, sample_tokens, scatter_tokens
    from ds_efficient.random_ltd.accounting import LayerTokens
    from ds_efficient.random_ltd.learning_rate import LayerTokenLR
    from ds_efficient.random_ltd.schedule import TokenSchedule

_HOMES = {
    "LayerTokenLR": "ds_efficient.random_ltd.learning_rate",
    "LayerTokens": "ds_efficient.random_ltd.accounting",
    "TokenSchedule": "ds_efficient.random_ltd.schedule",
    "apply_to_kept": "ds_efficient.ops.random_ltd",
    "gather_tokens": "ds_efficient.ops.random_ltd",
    "sample_tokens": "ds_efficient.ops.random_ltd",
    "scatter_tokens": "ds_efficient.ops.random_ltd",
}

__all__ = [
    "LayerTokenLR",
    "LayerTokens",
    "TokenSchedule",
    "apply_to_kept",
    "gather_tokens",
    "sample_tokens",
    "scatter_tokens",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading a configuration needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
