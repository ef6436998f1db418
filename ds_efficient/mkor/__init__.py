"""MKOR: second-order preconditioning with rank-1 updates of the inverse factors (arXiv 2306.01685)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_efficient.mkor.factored import FactoredInverse
    from ds_efficient.mkor.hybrid import HybridSwitch
    from ds_efficient.mkor.inverse import DenseInverse, rank1_inverse_update
    from ds_efficient.mkor.optimizer import MKOR

_HOMES = {
    "MKOR": "ds_efficient.mkor.optimizer",
    "DenseInverse": "ds_efficient.mkor.inverse",
    "FactoredInverse": "ds_efficient.mkor.factored",
    "HybridSwitch": "ds_efficient.mkor.hybrid",
    "rank1_inverse_update": "ds_efficient.mkor.inverse",
}

__all__ = ["MKOR", "DenseInverse", "FactoredInverse", "HybridSwitch", "rank1_inverse_update"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading a configuration needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
