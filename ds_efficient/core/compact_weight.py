"""How a technique that works on whole matrices finds those whose parameter holds a part of them only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@runtime_checkable
class CompactWeight(Protocol):
    """A layer, or a product inside of it, whose weight holds the elements of a fixed pattern."""

    def dense_weight(self, weight: Tensor) -> Tensor:
        """Return the (out, in) matrix of compact values, zero elsewhere."""

    def compress(self, dense: Tensor) -> Tensor:
        """Return the compact values of an (out, in) matrix."""


def compact_of(layer: torch.nn.Module) -> CompactWeight | None:
    """Return the product inside of a layer that expands its weight, or None where the weight is a matrix."""
    for module in layer.children():
        if isinstance(module, CompactWeight):
            return module
    return None
