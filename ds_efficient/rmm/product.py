"""The product of a linear layer whose weight gradient is estimated; forward and input gradient are exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ds_efficient.core.linear_seam import LocalRegion, Region
from ds_efficient.rmm.sketch import Sketch

_LOCAL = LocalRegion()


class RandomizedProduct(nn.Module):
    """Multiplies with a dense weight that its caller holds; saves a projection of the input.

    Args:
        sketch: of the layer.

    Attributes:
        sketch: the same.
    """

    technique_name = "rmm"

    def __init__(self, sketch: Sketch) -> None:
        super().__init__()
        self.sketch = sketch

    def extra_repr(self) -> str:
        """Return the settings."""
        sketch = self.sketch
        return f"{sketch.kind}, ratio={sketch.ratio:g}, block_size={sketch.block_size}"

    def sharded_axes(self) -> dict[str, int]:
        """Return nothing: it has no tensors (`LinearSeam.install_product`)."""
        return {}

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        region: Region | None = None,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> Tensor:
        """Return x W^T + b, as torch computes it.

        In evaluation mode, without gradients or with a frozen weight nothing is projected.

        Args:
            x: (..., in).
            weight: (out, in).
            region: what a tensor-parallel layer does around the product.
            bias: (out,) or None; only without a region.
            transposed: `weight` is (in, out), as of transformers' Conv1D.
        """
        dtype = None
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        how = _How(self.sketch if self.training else None, region or _LOCAL, dtype, transposed)
        if torch.compiler.is_compiling():
            return _apply_outside_graphs(x, weight, bias, how)
        return _RandomizedLinear.apply(x, weight, bias, how)


class _How:
    """Everything about a call that is no tensor."""

    __slots__ = ("dtype", "recording", "region", "sketch", "transposed")

    def __init__(
        self, sketch: Sketch | None, region: Region, dtype: torch.dtype | None, transposed: bool
    ) -> None:
        self.sketch = sketch
        self.region = region
        self.dtype = dtype
        self.transposed = transposed
        self.recording = torch.is_grad_enabled()

    def cast(self, tensor: Tensor) -> Tensor:
        """Return the tensor in the dtype of the products."""
        return tensor if self.dtype is None else tensor.to(self.dtype)


@torch._disable_dynamo  # as torch.compiler.disable, without importing the compiler, which takes two seconds
def _apply_outside_graphs(x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
    """Apply where torch.compile, which cannot trace the hash of a key, does not look."""
    return _RandomizedLinear.apply(x, weight, bias, how)


def _flat(x: Tensor) -> Tensor:
    """Return (..., features) as (rows, features), also where there are none."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


class _RandomizedLinear(torch.autograd.Function):
    """Saves the weight itself, which ZeRO-3 gathers again for the backward pass, and what a sketch keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        region = how.region
        seen = how.cast(region.enter(x))
        used = how.cast(weight)
        offset = None if bias is None else how.cast(bias)
        y = linear(seen, used.t() if how.transposed else used, offset)
        kept: tuple[Tensor, ...] = ()
        if how.recording and ctx.needs_input_grad[1]:
            if how.sketch is not None:
                kept = how.sketch.keep(x, region, how.dtype)
            else:
                kept = (_flat(how.cast(x)),)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        ctx.how, ctx.x_dtype = how, x.dtype
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, *kept = ctx.saved_tensors
        how, region, sketch = ctx.how, ctx.how.region, ctx.how.sketch
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        flat = _flat(dy)
        # Before the input's gradient is on its way: transfers of one group run one after another.
        seen: tuple[Tensor, ...] = ()
        if needs_weight:
            seen = sketch.gather(tuple(kept), region) if sketch else (region.enter(kept[0]),)
        finish = None
        if needs_x:
            used = how.cast(weight)
            dx = flat @ (used.t() if how.transposed else used)
            finish = region.leave(dx.view(*dy.shape[:-1], dx.shape[-1]))
        weight_dtype, bias_dtype = ctx.dtypes
        d_weight = d_bias = None
        if needs_weight:
            d_weight = sketch.gradient(flat, seen) if sketch else flat.t() @ seen[0]
            d_weight = (d_weight.t() if how.transposed else d_weight).to(weight_dtype)
        if needs_bias:
            d_bias = flat.sum(0).to(bias_dtype)
        return (finish().to(ctx.x_dtype) if finish is not None else None), d_weight, d_bias, None
