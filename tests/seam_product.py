"""A plain product for the seam of linear layers: every second input with a full weight, plus a low rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

RANK = 4
# Of the factor that is cut; it makes the other's gradient count in the gradient norm.
LARGE = 50.0


class _Function(torch.autograd.Function):
    """y = x[..., ::2] W^T + (x R^T) L^T, with one gather on the way in and one reduction on the way out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, left: Tensor, right: Tensor, region: Any) -> Tensor:
        ctx.save_for_backward(x, weight, left, right)
        ctx.region = region
        seen = region.enter(x)
        return seen[..., ::2] @ weight.T + (seen @ right.T) @ left.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right = ctx.saved_tensors
        (dy,) = gradients
        seen = ctx.region.enter(x)
        inner = dy @ left
        dx = inner @ right
        dx[..., ::2] += dy @ weight
        reduced = ctx.region.leave(dx)
        seen, dy, inner = (t.flatten(0, -2) for t in (seen, dy, inner))
        results = dy.T @ seen[:, ::2], dy.T @ (seen @ right.T), inner.T @ seen
        return reduced(), *results, None


class PlainProduct(Module):
    """A product with a parameter that is cut as the weight is, and one that all ranks hold.

    Args:
        left: (out, r), cut in a column-parallel layer.
        right: (r, in), cut in a row-parallel layer.
        cut: the layer's.
    """

    technique_name = "plain"

    def __init__(self, left: Tensor, right: Tensor, cut: str) -> None:
        super().__init__()
        self.left, self.right = Parameter(left), Parameter(right)
        self.cut_name, axis = ("left", 0) if cut == "out" else ("right", 1)
        getattr(self, self.cut_name).tensor_parallel_cut = cut
        self.register_buffer("rows", (left if cut == "out" else right.T).sum(1))
        self.axes = {self.cut_name: axis, "rows": 0}

    def forward(self, x: Tensor, weight: Tensor, region: Any) -> Tensor:
        return _Function.apply(x, weight, self.left, self.right, region)

    def sharded_axes(self) -> dict[str, int]:
        return self.axes


def numbers(*shape: int, scale: float = 0.02, start: int = 1, like: Tensor) -> Tensor:
    """Return values that look random, the same on every rank, without a generator."""
    count = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * torch.sin(count * count)).reshape(shape).to(like)


@torch.no_grad()
def install(layer: Any) -> PlainProduct:
    """Give `layer` a product made of its weight, so that it does not depend on the layout."""
    weight = layer.weight.detach()
    out, inputs = weight.shape
    if layer.tensor_parallel_cut == "out":
        left, right = LARGE * weight[:, :RANK], numbers(RANK, inputs, like=weight)
    else:
        left, right = numbers(out, RANK, like=weight), LARGE * weight[:RANK]
    product = PlainProduct(left, right, layer.tensor_parallel_cut)
    layer.install_product(product, weight[:, ::2].clone())
    return product
