"""The seam through which a technique changes what a tensor-parallel linear layer computes.

A technique hands a *product* to the layer: a module called as ``product(x, weight, region) -> y`` that
computes ``y = x W^T`` of this rank's shard in its own way, forward and backward, without bias. The layer
keeps everything else: bias, gather and scatter of inputs and outputs, process groups. The layers themselves
are in `megatron_patches.linears`; techniques know these interfaces only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Cut = Literal["in", "out"]


class Region(Protocol):
    """What a tensor-parallel layer does around its product.

    autograd does not see either method: both are for the forward and the backward pass of a
    ``torch.autograd.Function``. Inputs may be flattened to (rows, features): everything is along dimension 0.
    """

    @property
    def shards(self) -> int:
        """Number of ranks whose rows `enter` joins: 1 unless under sequence parallelism."""

    @property
    def shard(self) -> int:
        """Place of this rank's rows among them."""

    def enter(self, x: Tensor) -> Tensor:
        """Return what the product sees of the local input.

        Called in the forward pass and again in the backward pass, so that only the local part is saved. Both
        calls are collective under sequence parallelism. In the backward pass call it before `leave`:
        transfers of one group run one after another, and the weight gradient would wait for both.

        Args:
            x: (rows, in) or (s, b, in); under sequence parallelism this rank's rows only.

        Returns:
            Under sequence parallelism the rows of all tensor-parallel ranks in rank order, a new tensor;
            otherwise `x` itself.

        Raises:
            RuntimeError: autograd is recording `x`, which would lose its gradient.
        """

    def leave(self, dx: Tensor) -> Callable[[], Tensor]:
        """Start to reduce the gradient of what `enter` returned; do other work, then call the result.

        Args:
            dx: this rank's contribution, shaped as `enter`'s result. It is used up: it may be overwritten, so
                it must not be read or be part of another result.

        Returns:
            A function, to be called once, that waits and returns the gradient of the local input: the sum
            over the tensor-parallel ranks (a column-parallel layer), this rank's rows of that sum (under
            sequence parallelism), or `dx` itself.
        """


class LocalRegion:
    """The `Region` of a layer that communicates nothing around its product."""

    shards, shard = 1, 0

    def enter(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def leave(self, dx: Tensor) -> Callable[[], Tensor]:
        """Return a function that returns `dx`."""
        return lambda: dx


@runtime_checkable
class LinearSeam(Protocol):
    """A linear layer that takes a product.

    A layer inherits from it, after torch's class, to be recognised by ``isinstance``: since Python 3.12 that
    does not see the parameters of a torch module.
    """

    weight: torch.nn.Parameter
    """This rank's shard: (out, in) at first, then whatever `install_product` was given."""

    @property
    def tensor_parallel_cut(self) -> Cut | None:
        """Dimension of the weight that tensor parallelism cuts (also at size 1), None for neither."""

    @property
    def tensor_parallel_rank(self) -> int:
        """Which shard this rank has."""

    @property
    def tensor_parallel_size(self) -> int:
        """Number of shards."""

    @property
    def weight_stride(self) -> int:
        """Number of stacked matrices that are cut one by one: 2 for a gated layer's gate and up, else 1."""

    def install_product(self, product: torch.nn.Module, weight: Tensor) -> None:
        """Compute through `product` from now on, with another weight.

        Call before the engine is built. The layer's ``weight`` becomes a new Parameter with the attributes of
        the old one. `product` becomes a submodule called by its attribute ``technique_name``, or
        ``"product"``. Each parameter of the product may have an attribute ``tensor_parallel_cut``: the
        layer's own cut for one that is cut as the weight is (``"out"``: dimension 0, ``"in"``: dimension 1),
        or None, the default, for one that all tensor-parallel ranks hold; the gradients of these are summed
        over the ranks.

        To be saved through megatron-core's ``sharded_state_dict`` the product needs a method
        ``sharded_axes() -> dict[str, int]``: the axis along which each of its tensors is cut, by its name in
        the product's ``state_dict``; the others are replicated.

        Args:
            product: called as ``product(x, weight, region)``: `x` (..., in) with any leading dimensions, the
                layer's ``weight``, the `Region` of this call. Returns (..., out) of the local shard, without
                bias. Its parameters are on the layer's device.
            weight: data of the new weight, any shape and floating type; not copied.

        Raises:
            UserError: the layer has a product already, or is set up so that a product would be bypassed.
            ValueError: a parameter of `product` is cut in a way that the layer is not.
        """
