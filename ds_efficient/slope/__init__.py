"""SLoPe: double-pruned N:M sparse weights with lazy low-rank adapters (arXiv 2405.16325)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_efficient.slope.linear import SlopeLinear

__all__ = ["SlopeLinear"]


def __getattr__(name: str) -> Any:
    """Import on first use: the configuration reads this package without torch."""
    if name == "SlopeLinear":
        from ds_efficient.slope.linear import SlopeLinear

        return SlopeLinear
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
