"""What a technique may put in the place of the weight gradient dY^T X of a linear layer.

A layer, or a product inside of it (`ds_efficient.core.linear_seam`), asks a `WeightGradient` in the forward
pass what to save instead of its input, and in the backward pass for the gradient made from that. So one
technique changes the weight (a sparse product), another one its gradient, in one and the same layer: the
first is a `TakesWeightGradient`, the second is found by neither name nor import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ds_efficient.core.linear_seam import Region


class WeightGradient(Protocol):
    """Estimates dY^T X of one layer.

    Used inside a ``torch.autograd.Function`` whose layer is in training mode, records gradients and has a
    trained weight; elsewhere the layer does without. What `keep` returns is saved with
    ``save_for_backward`` and is all that the backward pass may depend on: recomputation puts tensors of its
    own in their place.
    """

    def keep(self, x: Tensor, region: Region, cast: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what is saved in the place of the input.

        Args:
            x: (..., in), this rank's rows, the very tensor that the layer was called with: layers that read
                the same one may share what is kept.
            region: what a tensor-parallel layer does around its product; nothing is communicated here.
            cast: `x` in the dtype of the product, where that is another one.

        Returns:
            Tensors to save; ``(x,)``, flattened to rows, for an exact gradient.
        """

    def gather(self, kept: tuple[Tensor, ...], region: Region) -> tuple[Tensor, ...]:
        """Return `kept` with the rows of all ranks, at the start of the backward pass (`Region.enter`)."""

    def gradient(self, dy: Tensor, gathered: tuple[Tensor, ...]) -> Tensor:
        """Return the estimate of dY^T X, (out, in), in the dtype of `dy`.

        Args:
            dy: (rows, out), gradient of the output, the rows of all ranks.
            gathered: result of `gather`.
        """


@runtime_checkable
class TakesWeightGradient(Protocol):
    """A layer or a product whose weight gradient another technique may estimate."""

    def weight_gradient_by(self, source: WeightGradient) -> None:
        """Estimate the weight gradient by `source` from now on.

        Raises:
            UserError: another technique does so already.
        """


def taker_of(layer: torch.nn.Module) -> TakesWeightGradient | None:
    """Return the layer itself or the product inside of it that takes a weight gradient, or None."""
    for module in (layer, *layer.children()):
        if isinstance(module, TakesWeightGradient):
            return module
    return None
