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
        if torch.compiler.is_compiling():
            return self._outside_graphs(x, weight, region or _LOCAL, bias, transposed)
        return self._multiply(x, weight, region or _LOCAL, bias, transposed)

    def _multiply(
        self, x: Tensor, weight: Tensor, region: Region, bias: Tensor | None, transposed: bool
    ) -> Tensor:
        dtype = None
        if torch._C._is_any_autocast_enabled():  # much faster than asking for one device
            device = x.device.type
            if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
                dtype = torch.get_autocast_dtype(device)
        sketch = self.sketch if self.training else None
        return _RandomizedLinear.apply(
            x, weight, bias, (sketch, region, dtype, transposed, torch.is_grad_enabled())
        )

    @torch._disable_dynamo  # as torch.compiler.disable, without importing the compiler, which takes seconds
    def _outside_graphs(self, *arguments: Any) -> Tensor:
        """Multiply where torch.compile, which cannot trace the hash of a key, does not look."""
        return self._multiply(*arguments)


# Everything about a call that is no tensor: sketch, region, dtype of autocast, whether the weight is
# transposed, whether gradients are recorded. A plain tuple: it is made in every call.
_How = tuple[Sketch | None, Region, torch.dtype | None, bool, bool]


def _flat(x: Tensor) -> Tensor:
    """Return (..., features) as (rows, features), also where there are none."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


class _RandomizedLinear(torch.autograd.Function):
    """Saves the weight itself, which ZeRO-3 gathers again for the backward pass, and what a sketch keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        sketch, region, dtype, transposed, recording = ctx.how = how
        local, used, offset = x, weight, bias
        if dtype is not None:
            ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
            local, used = x.to(dtype), weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
        y = linear(region.enter(local), used.t() if transposed else used, offset)
        needs_x, needs_weight, _, _ = ctx.needs_input_grad
        kept: tuple[Tensor, ...] = ()
        if needs_weight and recording:
            kept = (_flat(local),) if sketch is None else sketch.keep(x, region, local)
        ctx.save_for_backward(weight if needs_x else None, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` does something where create_graph=True alone, and takes microseconds.
        return _gradients_once(ctx, dy) if torch.is_grad_enabled() else _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of `_RandomizedLinear`'s arguments."""
    weight, *kept = ctx.saved_tensors
    sketch, region, dtype, transposed, _ = ctx.how
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    flat = _flat(dy)
    # Before the input's gradient is on its way: transfers of one group run one after another.
    seen: tuple[Tensor, ...] = ()
    if needs_weight:
        seen = sketch.gather(tuple(kept), region) if sketch else (region.enter(kept[0]),)
    dx = d_weight = d_bias = None
    finish = None
    if needs_x:
        used = weight if dtype is None else weight.to(dtype)
        dx = torch.mm(flat, used.t() if transposed else used)
        finish = region.leave(dx if flat is dy else dx.view(*dy.shape[:-1], dx.shape[-1]))
    if needs_weight:
        d_weight = sketch.gradient(flat, seen) if sketch else torch.mm(flat.t(), seen[0])
        if transposed:
            d_weight = d_weight.t()
    if needs_bias:
        d_bias = flat.sum(0)
    if finish is not None:
        dx = finish()
    if dtype is None:
        return dx, d_weight, d_bias, None
    found = zip((dx, d_weight, d_bias), ctx.dtypes, strict=True)
    return *(None if gradient is None else gradient.to(dtype) for gradient, dtype in found), None


_gradients_once = once_differentiable(_gradients)
