"""`SlopeLinear`: a linear layer whose parameter is the compact N:M sparse weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_efficient.config.fields import parse_pattern
from ds_efficient.core.keys import Key
from ds_efficient.core.plain_linears import is_conv1d
from ds_efficient.errors import UserError
from ds_efficient.ops import slope as ops
from ds_efficient.ops.keyed_random import uniform
from ds_efficient.slope.masks import magnitude_mask, random_mask
from ds_efficient.slope.operands import LayerShape
from ds_efficient.slope.product import SparseProduct

MASKS = ("random", "magnitude")
BACKENDS = ("auto", "cusparselt", "dense")
DEFAULT_KEY = Key(1234, ("slope",))


class SlopeLinear(nn.Module):
    """y = x (W^R)^T + b, plus (x R^T) L^T once the adapter is active; the backward pass uses W^{R,C}.

    The parameter holds only the kept values, so gradients, optimizer states and communication shrink with it
    and a pruned weight cannot come alive.

    Args:
        in_features: a multiple of M.
        out_features: with `double_prune` a multiple of M.
        bias: add a bias.
        pattern: ``"N:M"``, N of every M consecutive inputs are kept.
        mask: ``"random"`` (drawn by `key`) or ``"magnitude"`` (of the initial weights).
        double_prune: prune the weight of the input gradient along the outputs too.
        adapter_rank: rank of the low-rank adapter; 0: none.
        key: `Key` or integer, of this layer's mask, initial weights and adapter. Give every layer its own.
        device, dtype: of the parameters.
        backend: ``"auto"`` (cuSPARSELt where it runs and is faster, else dense products of the sparse
            weight), ``"cusparselt"`` or ``"dense"``.

    Shapes: x (..., in_features), y (..., out_features).

    Raises:
        UserError: pattern, mask, backend, rank or sizes do not fit.

    Attributes:
        weight: (out_features, in_features * N // M), kept values of each output in ascending input order.
        bias: (out_features,) or None.
        slope: the `SparseProduct` with masks and adapter.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: str = "2:4",
        mask: str = "random",
        double_prune: bool = True,
        adapter_rank: int = 0,
        key: Key | int = DEFAULT_KEY,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        place = torch.device(device) if device is not None else torch.get_default_device()
        bound = in_features**-0.5  # as nn.Linear's: uniform on [-bound, bound)
        key = as_key(key)
        dense = uniform(key.fold("weight"), [out_features, in_features], device=place)
        offset = None
        if bias:
            offset = nn.Parameter(
                (uniform(key.fold("bias"), [out_features], device=place) * 2 - 1).mul_(bound).to(dtype)
            )
        self._fill(
            (dense * 2 - 1).mul_(bound).to(dtype),
            offset,
            pattern,
            mask,
            double_prune,
            adapter_rank,
            key,
            backend,
        )

    def _fill(
        self,
        dense: Tensor,
        bias: nn.Parameter | None,
        pattern: str,
        mask: str,
        double_prune: bool,
        adapter_rank: int,
        key: Key,
        backend: str,
    ) -> None:
        """Make the compact parameter, the masks and the adapter from a dense (out, in) weight."""
        self.out_features, self.in_features = dense.shape
        shape = checked_shape(self.out_features, self.in_features, pattern)
        for name, value, allowed in (("mask", mask, MASKS), ("backend", backend, BACKENDS)):
            if value not in allowed:
                raise UserError(f"{name}={value!r} is not known; allowed: {', '.join(allowed)}")
        if adapter_rank < 0:
            raise UserError(f"adapter_rank={adapter_rank} is negative; allowed: 0 (no adapter) or more")
        if mask == "random":
            packed = random_mask(
                key.fold("mask"), shape.in_features, shape.n, shape.m,
                rows=[(0, shape.out_features)], device=dense.device,
            )  # fmt: skip
        else:
            packed = magnitude_mask(dense, shape.n, shape.m)
        self.slope = SparseProduct(shape, packed, double_prune=double_prune, backend=backend)
        self.weight = nn.Parameter(self.slope.compress(dense.detach()))
        self.bias = bias
        self.slope.select_columns(self.weight)
        if adapter_rank:
            self.slope.add_adapter(adapter_rank, key.fold("adapter"), self.weight)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        pattern: str = "2:4",
        mask: str = "random",
        double_prune: bool = True,
        adapter_rank: int = 0,
        key: Key | int = DEFAULT_KEY,
        backend: str = "auto",
    ) -> SlopeLinear:
        """Make a sparse layer from a dense one; its kept weights and its bias are taken over.

        Args:
            linear: ``nn.Linear``, or transformers' ``Conv1D`` (weight (in, out)).
            pattern, mask, double_prune, adapter_rank, key, backend: as of the class.

        Raises:
            UserError: another kind of module, or sizes that do not fit.
        """
        weight = dense_weight_of(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        bias: Any = linear.bias
        layer._fill(weight, bias, pattern, mask, double_prune, adapter_rank, as_key(key), backend)
        layer.weight.requires_grad_(bool(next(iter(linear.parameters())).requires_grad))
        return layer.train(linear.training)

    @classmethod
    def from_compact(
        cls,
        values: Tensor,
        mask: Tensor,
        bias: Tensor | None = None,
        *,
        pattern: str,
        adapter: tuple[Tensor, Tensor] | None = None,
        backend: str = "auto",
        name: str = "",
    ) -> SlopeLinear:
        """Make a layer for inference from kept values and their mask; no parameter takes a gradient.

        Args:
            values: (out_features, in_features * N // M).
            mask: packed forward mask (out_features, 4 * ceil(in_features / 32)).
            bias: (out_features,) or None.
            pattern: ``"N:M"``.
            adapter: R (rank, in_features) and L (out_features, rank), which take part; or None.
            backend: as of the class.
            name: of the layer, for messages.

        Raises:
            UserError: the mask does not keep N of every M, or the sizes do not fit.
        """
        try:
            n, m = parse_pattern(pattern)
        except ValueError as error:
            raise UserError(f"pattern={pattern!r}: {error}") from None
        if backend not in BACKENDS:
            raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = values.shape[0], values.shape[1] * m // n
        shape = checked_shape(layer.out_features, layer.in_features, pattern)
        ops.check_mask(mask, shape.in_features, n=n, m=m)
        if tuple(values.shape) != (mask.shape[0], shape.kept):
            raise UserError(
                f"{name or 'layer'}: values {tuple(values.shape)}; {pattern} with a mask of {mask.shape[0]} "
                f"rows takes {(mask.shape[0], shape.kept)}"
            )
        layer.slope = SparseProduct(shape, mask, double_prune=False, backend=backend, name=name)
        layer.weight = nn.Parameter(values, requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        if adapter is not None:
            down, up = (nn.Parameter(part, requires_grad=False) for part in adapter)
            layer.slope.adapter_down, layer.slope.adapter_up = down, up
            layer.slope.adapter_active = True
        return layer.eval()

    def extra_repr(self) -> str:
        """Return the sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) of x (..., in_features)."""
        y = self.slope(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        """Return W^R, (out_features, in_features) with zeros at the pruned places; no gradient."""
        return self.slope.dense_weight(self.weight)

    def forward_mask(self) -> Tensor:
        """Return the forward mask, bool (out_features, in_features)."""
        return ops.unpack_mask(self.slope.mask, self.in_features)

    def backward_mask(self) -> Tensor:
        """Return the mask of W^{R,C}, bool (out, in); without double pruning the forward mask."""
        packed = self.slope.column_mask
        return ops.unpack_mask(self.slope.mask if packed is None else packed, self.in_features)

    def activate_adapter(self) -> None:
        """Let the adapter take part from now on; the outputs do not change by it, since L is zero.

        Raises:
            UserError: the layer has none.
        """
        if self.slope.adapter_down is None:
            raise UserError("activate_adapter: the layer was made with adapter_rank=0")
        self.slope.adapter_active = True

    def refresh(self) -> None:
        """Choose the column mask anew from the weight of now.

        The values inside the operands follow the weight by themselves, in plain training loops by torch's
        version counter.
        """
        self.slope.select_columns(self.weight)
        self.slope.operands.weight_changed()

    def to_linear(self) -> nn.Linear:
        """Return the dense layer with the same outputs: W^R, plus L R where the adapter is active."""
        weight = self.dense_weight()
        product = self.slope
        if product.adapter_active and product.adapter_up is not None and product.adapter_down is not None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            merged = product.adapter_up.detach().to(wide) @ product.adapter_down.detach().to(wide)
            weight = (weight + merged).to(weight.dtype)
        layer = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=weight.dtype
        )
        layer.weight = nn.Parameter(weight)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)


def as_key(key: Key | int) -> Key:
    """Return the key itself, or the stream that an integer names."""
    return key if isinstance(key, Key) else Key(key)


def checked_shape(out_features: int, in_features: int, pattern: str) -> LayerShape:
    """Return the shape.

    Raises:
        UserError: the pattern is malformed, or M does not divide the inputs.
    """
    try:
        n, m = parse_pattern(pattern)
    except ValueError as error:
        raise UserError(f"pattern={pattern!r}: {error}") from None
    if in_features % m:
        raise UserError(
            f"in_features={in_features} is not a multiple of M={m} (pattern {pattern}); "
            "choose a smaller M or leave the layer dense"
        )
    return LayerShape(out_features, in_features, n, m)


def dense_weight_of(linear: nn.Module) -> Tensor:
    """Return the (out, in) weight of nn.Linear or transformers' Conv1D.

    Raises:
        UserError: another kind of module, a weight that is no parameter, or one that ZeRO-3 partitioned.
    """
    weight: Any = getattr(linear, "weight", None)
    if hasattr(weight, "ds_id"):
        raise UserError(
            f"slope: {type(linear).__name__} is partitioned by ZeRO already; build the model without "
            "deepspeed.zero.Init"
        )
    if type(linear) is nn.Linear and not isinstance(weight, nn.Parameter):
        raise UserError("from_linear: the weight is computed from other parameters (weight_norm?)")
    if type(linear) is nn.Linear:
        return weight
    if is_conv1d(linear):
        return weight.t()
    raise UserError(
        f"from_linear: {type(linear).__name__} is not supported; allowed: torch.nn.Linear, "
        "transformers' Conv1D"
    )
