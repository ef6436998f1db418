"""The product of a sparse layer, forward and backward (techniques of arXiv 2405.16325, Eqs. 4-6 and 10).

With W^R the weight kept by the forward mask and W^{R,C} the same pruned again down its columns:

    Y  = X (W^R)^T + (X R^T) L^T          forward; L, R the adapter, once it is active
    dX = dY W^{R,C} + (dY L) R            input gradient
    dW = (dY^T X) at the kept positions   weight gradient, in the compact form

The paper's text puts the column mask into the weight gradient; its Eq. 6 and Algorithm 1 put it here. The
gradient is masked by the forward mask, not by the backward one: a weight that the column pass drops still
acts in the forward pass and must learn. Eq. 10 has no factor 1/r in front of the adapter, and neither has
this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_efficient.core.keys import Key
from ds_efficient.core.linear_seam import Cut, LocalRegion, Region
from ds_efficient.core.weight_gradient import WeightGradient
from ds_efficient.errors import UserError
from ds_efficient.ops import slope as ops
from ds_efficient.ops.keyed_random import normal
from ds_efficient.slope.operands import LayerShape, Operands

_LOCAL = LocalRegion()


class SparseProduct(nn.Module):
    """Multiplies with a compact weight that its caller holds: masks, operands and the adapter.

    Args:
        shape: sizes of this rank's shard, and the pattern.
        mask: packed forward mask (`ds_efficient.ops.slope.pack_mask`).
        double_prune: prune the backward weight too; otherwise the input gradient uses W^R.
        backend: ``"auto"``, ``"cusparselt"`` or ``"dense"``.
        cut: dimension of the weight that tensor parallelism cuts.
        name: of the layer, for messages.

    Raises:
        UserError: the outputs are not a multiple of M, which double pruning needs.

    Attributes:
        mask: packed forward mask, fixed for the whole run.
        column_mask: packed mask of W^{R,C}, or None without double pruning.
        adapter_down, adapter_up: R (rank, in) and L (out, rank), or None.
        adapter_active: whether the adapter takes part.
    """

    technique_name = "slope"

    def __init__(
        self,
        shape: LayerShape,
        mask: Tensor,
        *,
        double_prune: bool = True,
        backend: str = "auto",
        cut: Cut | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        if double_prune and shape.out_features % shape.m:
            raise UserError(
                f"{name or 'layer'}: out_features {shape.out_features} is not a multiple of M={shape.m}, "
                "which double_prune needs; set double_prune to false or leave the layer dense"
            )
        self.shape = shape
        self.double_prune = double_prune
        self.cut = cut
        self.operands = Operands(shape, backend, name)
        self.mask: Tensor
        self.column_mask: Tensor | None
        self.register_buffer("mask", mask)
        self.register_buffer("column_mask", mask.clone() if double_prune else None)
        self.adapter_down: nn.Parameter | None = None
        self.adapter_up: nn.Parameter | None = None
        self.adapter_active = False
        self.weight_gradient_source: WeightGradient | None = None
        self._ran = [0, 0]  # in a list, since setting an attribute of a module costs microseconds

    @property
    def forward_products(self) -> int:
        """How often the forward product ran."""
        return self._ran[0]

    @property
    def input_gradients(self) -> int:
        """How often the input gradient was computed."""
        return self._ran[1]

    def weight_gradient_by(self, source: WeightGradient) -> None:
        """Estimate dY^T X by `source`, from what it keeps; the adapter's R takes its gradient from it too.

        Raises:
            UserError: there is a source already.
        """
        if self.weight_gradient_source is not None:
            raise UserError(
                f"{self.operands.name or 'slope'}: the weight gradient is estimated already; exclude the "
                "layer from one of the techniques"
            )
        self.weight_gradient_source = source

    def extra_repr(self) -> str:
        """Return sizes and pattern."""
        shape = self.shape
        rank = 0 if self.adapter_down is None else int(self.adapter_down.shape[0])
        return f"{shape.n}:{shape.m}, double_prune={self.double_prune}, adapter_rank={rank}"

    def add_adapter(
        self,
        rank: int,
        key: Key,
        like: Tensor,
        *,
        in_features: int | None = None,
        first_input: int = 0,
    ) -> None:
        """Add the low-rank adapter, not active yet: L = 0, R normal with variance 1 / in.

        Tensor parallelism cuts L with the outputs and R with the inputs.

        Args:
            rank: r.
            key: of R.
            like: tensor with the parameters' dtype and device.
            in_features: inputs of the full layer; default: of this shard.
            first_input: where this shard's inputs begin.
        """
        whole = in_features or self.shape.in_features
        columns = slice(first_input, first_input + self.shape.in_features)
        down = normal(key, [rank, whole], device=like.device)[:, columns] * whole**-0.5
        up = torch.zeros(self.shape.out_features, rank, dtype=like.dtype, device=like.device)
        self.adapter_down = nn.Parameter(down.to(like.dtype).contiguous())
        self.adapter_up = nn.Parameter(up)
        self._mark_adapter()

    def _mark_adapter(self) -> None:
        """Say which optimizer group the adapter's parameters belong to, and how they are cut."""
        for parameter, side in ((self.adapter_down, "in"), (self.adapter_up, "out")):
            if parameter is not None:
                group = {"name": "slope_adapters", "weight_decay": 0.0}
                vars(parameter).update(parameter_group=group)
                vars(parameter).update(tensor_parallel_cut=side if self.cut == side else None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; copies of parameters lose their attributes."""
        super().__setstate__(state)
        self._mark_adapter()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load; an adapter that was trained takes part, else the outputs would be others."""
        super()._load_from_state_dict(*args, **kwargs)
        self._mark_adapter()  # assign=True puts other parameters in their place
        if self.adapter_is_trained():
            self.adapter_active = True

    def adapter_is_trained(self) -> bool:
        """Whether L is no longer zero, as it is until the adapter takes part."""
        up = self.adapter_up
        return up is not None and not up.is_meta and bool(up.detach().any())

    def sharded_axes(self) -> dict[str, int]:
        """Return the axis along which tensor parallelism cuts each tensor (`LinearSeam.install_product`).

        Raises:
            UserError: bits of several shards share a byte, so that the masks of shards do not join.
        """
        if self.cut is None:
            return {}
        if self.cut == "in" and self.shape.in_features % 32:
            raise UserError(
                f"slope: packed masks of {self.shape.in_features} inputs a rank cannot be joined; "
                "32 must divide them to save through sharded_state_dict"
            )
        axis = {"out": 0, "in": 1}[self.cut]
        names = [name for name, _ in self.named_buffers()]
        if self.adapter_down is not None:
            names.append("adapter_up" if self.cut == "out" else "adapter_down")
        return dict.fromkeys(names, axis)

    def select_columns(self, weight: Tensor) -> None:
        """Choose W^{R,C} anew: in each column, of every M outputs the N largest magnitudes.

        Args:
            weight: compact weight.
        """
        if self.column_mask is not None:
            shape = self.shape
            chosen = ops.select_columns(
                weight.detach().contiguous(), self.mask, shape.in_features, n=shape.n, m=shape.m
            )
            self.column_mask.copy_(chosen)
            self.operands.column_mask_changed()

    def dense_weight(self, weight: Tensor, *, backward: bool = False) -> Tensor:
        """Return W^R, or W^{R,C}, as a dense (out, in) tensor of the weight's dtype; no gradient."""
        shape = self.shape
        column_mask = self.column_mask if backward else None
        return ops.decompress(
            weight.detach().contiguous(),
            self.mask,
            shape.in_features,
            n=shape.n,
            m=shape.m,
            backward_mask=column_mask,
        )

    def compress(self, dense: Tensor) -> Tensor:
        """Return the kept values (out, in * N // M) of a dense (out, in) tensor."""
        return ops.compress(dense.contiguous(), self.mask, n=self.shape.n, m=self.shape.m)

    def forward(self, x: Tensor, weight: Tensor, region: Region | None = None) -> Tensor:
        """Return x W^T of this shard, differentiable in x, the weight and an active adapter.

        Args:
            x: (..., in).
            weight: compact weight (out, in * N // M).
            region: what a tensor-parallel layer does around the product.

        Returns:
            (..., out); under sequence parallelism the leading dimension is that of all ranks.
        """
        called_with = x
        down: Tensor | None = self.adapter_down if self.adapter_active else None
        up: Tensor | None = self.adapter_up if self.adapter_active else None
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            down, up = _cast(down, dtype), _cast(up, dtype)
        self._ran[0] += 1
        source = self.weight_gradient_source
        if source is None or not (self.training and torch.is_grad_enabled()):
            return _SparseLinear.apply(x, weight, down, up, self, region or _LOCAL, None)
        keeping = source, called_with
        if torch.compiler.is_compiling():
            return _apply_outside_graphs(x, weight, down, up, self, region or _LOCAL, keeping)
        return _SparseLinear.apply(x, weight, down, up, self, region or _LOCAL, keeping)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x (W^R)^T of (tokens, in), (tokens, out); no gradient."""
        if self.operands.uses_sparse_product(x, transposed=False):
            return self.operands.multiply(x, weight, self.mask, None)
        return x @ self.dense_weight(weight).t()

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """Return dY W^{R,C} of (tokens, out), (tokens, in)."""
        self._ran[1] += 1
        if self.column_mask is not None and self.operands.uses_sparse_product(dy, transposed=True):
            return self.operands.multiply(dy, weight, self.mask, self.column_mask)
        return dy @ self.dense_weight(weight, backward=True)

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """Return dY^T X at the kept positions: (out, in * N // M)."""
        return self.compress(dy.t() @ x)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


@torch._disable_dynamo  # as torch.compiler.disable, without importing the compiler
def _apply_outside_graphs(*arguments: Any) -> Tensor:
    """Apply where torch.compile, which cannot trace what a source does, does not look."""
    return _SparseLinear.apply(*arguments)


class _SparseLinear(torch.autograd.Function):
    """The three products; saves the parameters themselves, which ZeRO-3 gathers again for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        down: Tensor | None,
        up: Tensor | None,
        product: SparseProduct,
        region: Region,
        keeping: tuple[WeightGradient, Tensor] | None,
    ) -> Tensor:
        """Multiply; `keeping` is what estimates the weight gradient, and x before it was cast."""
        source, called_with = keeping or (None, x)
        seen = region.enter(x)
        flat = seen.reshape(-1, seen.shape[-1]).contiguous()
        y = product.multiply(flat, weight)
        low = None
        if down is not None and up is not None:
            low = flat @ down.t()
            y.addmm_(low, up.t())
        needed = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        kept: tuple[Tensor, ...] = (x,)
        if source is not None:
            kept = source.keep(called_with, region, x) if needed else ()
        ctx.save_for_backward(weight, down, up, low, *kept)
        ctx.product, ctx.region, ctx.source = product, region, source
        return y.view(*seen.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, down, up, low, *kept = ctx.saved_tensors
        product, region, source = ctx.product, ctx.region, ctx.source
        needs_x, needs_weight, needs_down, needs_up = ctx.needs_input_grad[:4]
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        needs_spread = up is not None and (needs_x or (needs_down and source is None))
        spread = flat @ up if needs_spread else None
        # Before the input's gradient is on its way: transfers of one group run one after another.
        seen: tuple[Tensor, ...] = ()
        if needs_weight or needs_down:
            if source is None:
                seen = (region.enter(kept[0]).reshape(-1, kept[0].shape[-1]),)
            else:
                seen = source.gather(tuple(kept), region)
        finish = None
        if needs_x:
            dx = product.input_gradient(flat, weight)
            if spread is not None:
                dx.addmm_(spread, down)
            finish = region.leave(dx.view(*dy.shape[:-1], dx.shape[-1]))
        d_weight = d_down = None
        if source is None:
            if needs_weight:
                d_weight = product.weight_gradient(flat, seen[0])
            if needs_down and spread is not None:
                d_down = spread.t() @ seen[0]
        elif seen:  # dR = (dY L)^T X = L^T (dY^T X), of the one estimate
            dense = source.gradient(flat, seen)
            d_weight = product.compress(dense) if needs_weight else None
            d_down = up.t() @ dense if needs_down else None
        d_up = flat.t() @ low if needs_up else None
        return (finish() if finish is not None else None), d_weight, d_down, d_up, None, None, None
