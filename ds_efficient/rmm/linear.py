"""`RandomizedLinear`: a linear layer that saves a random projection of its input instead of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_efficient.core.keys import Key
from ds_efficient.core.plain_linears import is_conv1d
from ds_efficient.errors import UserError
from ds_efficient.ops.keyed_random import uniform
from ds_efficient.rmm.product import RandomizedProduct
from ds_efficient.rmm.sketch import Clock, Sketch

DEFAULT_KEY = Key(1234, ("rmm",))


class RandomizedLinear(nn.Module):
    """y = x W^T + b; of x only S^T x is saved, and the weight gradient is (S^T dy)^T (S^T x).

    S is random with E[S S^T] = I, so the gradient's mean is the exact one. Outputs, input gradients and bias
    gradients are exact. Layers that are called one after the other with the same input tensor share what
    they save.

    Args:
        in_features, out_features: sizes.
        bias: add a bias.
        ratio: rows of the projection as a share of the rows of x, > 0 and <= 1.
        sketch: ``"gaussian"``, ``"rademacher"``, ``"srht"`` (subsampled randomized Hadamard transform),
            ``"count"`` (count sketch) or ``"rows"`` (uniformly sampled rows).
        block_size: rows of x that are projected together; 0: all of them. A power of two with ``"srht"``.
        min_rows: fewest rows of the projection; with no more rows than that the gradient is exact.
        key: `Key` or integer, of this layer's initial weights and of its sketches. Give every layer its own.
        device, dtype: of the parameters.

    Shapes: x (..., in_features), y (..., out_features).

    Raises:
        UserError: an argument is out of range.

    Attributes:
        weight: (out_features, in_features); (in_features, out_features) where it was made from transformers'
            Conv1D.
        bias: (out_features,) or None.
        rmm: the `RandomizedProduct`.

    Every pass draws a new S, from a counter. `start_step` sets the counter, for runs that are resumed and for
    ranks that must differ; `ds_efficient.initialize` does it by itself.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        ratio: float,
        sketch: str = "gaussian",
        block_size: int = 512,
        min_rows: int = 64,
        key: Key | int = DEFAULT_KEY,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        key = key if isinstance(key, Key) else Key(key)
        dtype = dtype or torch.get_default_dtype()
        place = torch.device(device) if device is not None else torch.get_default_device()
        bound = in_features**-0.5 if in_features else 0.0  # as nn.Linear's: uniform on [-bound, bound)

        def draw(name: str, *shape: int) -> nn.Parameter:
            values = uniform(key.fold(name), list(shape), device=place)
            return nn.Parameter((values * 2 - 1).mul_(bound).to(dtype))

        self.in_features, self.out_features = in_features, out_features
        self.transposed = False
        self.weight = draw("weight", out_features, in_features)
        self.bias = draw("bias", out_features) if bias else None
        self.rmm = RandomizedProduct(
            Sketch(key.fold("sketch"), ratio=ratio, kind=sketch, block_size=block_size, min_rows=min_rows)
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        ratio: float,
        sketch: str = "gaussian",
        block_size: int = 512,
        min_rows: int = 64,
        key: Key | int = DEFAULT_KEY,
    ) -> RandomizedLinear:
        """Make a layer around the parameters of another one; both hold the same objects.

        Args:
            linear: ``nn.Linear``, or transformers' ``Conv1D``, whose (in, out) weight stays as it is.
            ratio, sketch, block_size, min_rows, key: as of the class.

        Raises:
            UserError: another kind of module, or an argument is out of range.
        """
        key = key if isinstance(key, Key) else Key(key)
        made = Sketch(key.fold("sketch"), ratio=ratio, kind=sketch, block_size=block_size, min_rows=min_rows)
        return cls.around(linear, made)

    @classmethod
    def around(cls, linear: nn.Module, sketch: Sketch) -> RandomizedLinear:
        """Make a layer around the parameters of another one, with a given sketch.

        Raises:
            UserError: another kind of module than `from_linear` takes.
        """
        check_kind(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        source: Any = linear
        layer.transposed = is_conv1d(linear)
        shape = source.weight.shape
        if hasattr(source.weight, "ds_shape"):  # partitioned by ZeRO-3: an empty tensor by itself
            shape = source.weight.ds_shape
        layer.out_features, layer.in_features = reversed(shape) if layer.transposed else shape
        layer.weight, layer.bias = source.weight, source.bias
        layer.rmm = RandomizedProduct(sketch)
        return layer.train(linear.training)

    @property
    def sketch(self) -> Sketch:
        """How inputs are projected, and what was saved."""
        return self.rmm.sketch

    def extra_repr(self) -> str:
        """Return the sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def start_step(self, step: int, *, rank: int = 0) -> None:
        """Draw from here on what step `step` of this rank draws, its first micro-batch next.

        Args:
            step: optimizer steps done.
            rank: data-parallel rank; ranks should differ, so that their noise averages out.
        """
        self.sketch.clock = Clock(step=step, rank=rank, interval=self.sketch.clock.interval)
        self.sketch.restart()

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) of x (..., in_features)."""
        # Not as a module: ZeRO-3 puts hooks of its own around the call of every module.
        # Looked up directly: an attribute that is a module takes a microsecond.
        product: Any = self._modules["rmm"]
        return product.forward(x, self.weight, None, self.bias, transposed=self.transposed)

    def to_linear(self) -> nn.Linear:
        """Return nn.Linear with a copy of the parameters."""
        weight = self.weight.detach()
        layer = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=weight.dtype
        )
        layer.weight = nn.Parameter((weight.t() if self.transposed else weight).clone())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)


def check_kind(linear: nn.Module) -> None:
    """Raise UserError unless this is nn.Linear or transformers' Conv1D, with a weight of its own."""
    if not (type(linear) is nn.Linear or is_conv1d(linear)):
        raise UserError(
            f"RandomizedLinear: {type(linear).__name__} is not supported; allowed: torch.nn.Linear, "
            "transformers' Conv1D"
        )
    if not isinstance(linear.weight, nn.Parameter):
        raise UserError("RandomizedLinear: the weight is computed from other parameters (weight_norm?)")
