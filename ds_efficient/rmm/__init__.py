"""RMM: weight gradients from a random sketch of the layer input (arXiv 2201.13195)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_efficient.rmm.linear import RandomizedLinear
    from ds_efficient.rmm.variance import correlation, sgd_variance, sketch_variance

__all__ = ["RandomizedLinear", "correlation", "sgd_variance", "sketch_variance"]


def __getattr__(name: str) -> Any:
    """Import on first use: the configuration reads this package without torch."""
    if name == "RandomizedLinear":
        from ds_efficient.rmm.linear import RandomizedLinear

        return RandomizedLinear
    if name in __all__:
        from ds_efficient.rmm import variance

        return getattr(variance, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
