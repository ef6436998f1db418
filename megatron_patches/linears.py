"""megatron-core's Column- and RowParallelLinear with a seam for techniques (`ds_efficient.core.linear_seam`).

Both classes compute through ``_forward_impl``, in every version since 0.14, and do all the rest (gather,
scatter, bias, expert groups) around it; so that one method is overridden. What `_forward_impl` is asked for
beyond a plain product is recognised by the parameters of megatron-core's own implementation, and refused
where a technique's product would not do it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.nn import Parameter

from ds_efficient.core.linear_seam import Cut, LinearSeam, LocalRegion, Region
from ds_efficient.errors import UserError
from megatron_patches import partial_gradients

_AXES: dict[Cut, int] = {"out": 0, "in": 1}
_IMPLEMENTATION = inspect.signature(layers.linear_with_grad_accumulation_and_async_allreduce)
# What the seam does itself; wgrad_deferral_limit means nothing without a grad_output_buffer.
_DONE_HERE = frozenset(
    "input weight bias allreduce_dgrad sequence_parallel tp_group wgrad_deferral_limit".split()
)
# Values that mean "off" where megatron-core's signature has no default or another one.
_OFF: dict[str, Any] = {
    "gradient_accumulation_fusion": False,
    "grad_output_buffer": None,
    "gtp_remat_size": 1,
}
# Newer torch calls them so and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class SequenceParallelRegion:
    """Rows of all ranks on the way in, this rank's rows of the summed gradient on the way out."""

    def __init__(self, group: Any) -> None:
        self.group = group

    @property
    def shards(self) -> int:
        """Number of ranks whose rows are gathered."""
        return dist.get_world_size(self.group)

    @property
    def shard(self) -> int:
        """Place of this rank's rows."""
        return dist.get_rank(self.group)

    def enter(self, x: Tensor) -> Tensor:
        """Gather the rows."""
        _refuse_recording(x)
        rows, *features = x.shape
        whole = x.new_empty((rows * self.shards, *features))
        _all_gather(whole, x.contiguous(), group=self.group)
        return whole

    def leave(self, dx: Tensor) -> Callable[[], Tensor]:
        """Start the reduce-scatter of the rows."""
        rows, *features = dx.shape
        local = dx.new_empty((rows // self.shards, *features))
        work = _reduce_scatter(local, dx.contiguous(), group=self.group, async_op=True)
        return _waiter(work, local)


class TensorParallelRegion:
    """The same rows on every rank; the gradient is summed over the ranks on the way out."""

    shards, shard = 1, 0

    def __init__(self, group: Any) -> None:
        self.group = group

    def enter(self, x: Tensor) -> Tensor:
        """Return `x`."""
        _refuse_recording(x)
        return x

    def leave(self, dx: Tensor) -> Callable[[], Tensor]:
        """Start the all-reduce."""
        total = dx.contiguous()
        return _waiter(dist.all_reduce(total, group=self.group, async_op=True), total)


def _waiter(work: Any, result: Tensor) -> Callable[[], Tensor]:
    def wait() -> Tensor:
        work.wait()
        return result

    return wait


def _refuse_recording(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "Region.enter was called while autograd records its input, whose gradient would not be reduced; "
            "call it inside a torch.autograd.Function"
        )


class _Seam:
    """What both classes share; stands before megatron-core's class in the order of inheritance."""

    tensor_parallel_cut: ClassVar[Cut]
    weight: Parameter
    tp_group: Any
    config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._product_name: str | None = None

    @property
    def tensor_parallel_size(self) -> int:
        """Number of shards."""
        return 1 if self.tp_group is None else int(self.tp_group.size())

    @property
    def tensor_parallel_rank(self) -> int:
        """Which shard this rank has."""
        return 0 if self.tp_group is None else int(self.tp_group.rank())

    @property
    def weight_stride(self) -> int:
        """Number of stacked matrices that are cut one by one."""
        return int(getattr(self.weight, "partition_stride", 1))

    def install_product(self, product: torch.nn.Module, weight: Tensor) -> None:
        """Compute through `product` from now on (`ds_efficient.core.linear_seam.LinearSeam`)."""
        name = str(getattr(product, "technique_name", "product"))
        self._refuse_product(name)
        marks = [(parameter, self._cut_of(key, parameter)) for key, parameter in product.named_parameters()]
        old = self.weight
        new = Parameter(weight.detach(), requires_grad=old.requires_grad)
        vars(new).update(vars(old))
        module: Any = self
        module.add_module(name, product)
        module.weight = new
        self._product_name = name
        for parameter, cut in marks:
            if cut:
                vars(parameter).update(
                    tensor_model_parallel=True,
                    partition_dim=_AXES[self.tensor_parallel_cut],
                    # The rows that belong to the weight's rows lie as these do.
                    partition_stride=self.weight_stride,
                )
            else:
                vars(parameter).update(tensor_parallel_partial=True)
            if hasattr(old, "allreduce"):  # False for experts: other data-parallel ranks
                vars(parameter).update(allreduce=old.allreduce)
        partial_gradients.sum_partial_gradients(product, self.tp_group)

    def _refuse_product(self, name: str) -> None:
        """Raise UserError where the layer cannot take a product."""
        where = f"{name}: {self!r}"
        if self._product_name is not None:
            raise UserError(
                f"{where} computes through {self._product_name} already; exclude the layer from one of them"
            )
        if self.weight is None:
            raise UserError(f"{where} borrows its weight from another layer; exclude it")
        if hasattr(self.weight, "ds_id"):
            raise UserError(
                f"{where} is partitioned by ZeRO already; build the model without deepspeed.zero.Init"
            )
        deferred = getattr(self.config, "defer_embedding_wgrad_compute", False)
        settings = {
            "gradient_accumulation_fusion": self.config.gradient_accumulation_fusion,
            "grad_output_buffer": getattr(self, "grad_output_buffer", None) if deferred else None,
            "gtp_remat_size": getattr(self, "gtp_remat_size", 1),
        }
        _refuse_bypass(name, settings)

    def _cut_of(self, key: str, parameter: Parameter) -> bool:
        cut = getattr(parameter, "tensor_parallel_cut", None)
        if cut not in (None, self.tensor_parallel_cut):
            raise ValueError(
                f"parameter {key}: tensor_parallel_cut {cut!r}, but the layer is cut along "
                f"{self.tensor_parallel_cut!r}"
            )
        return cut is not None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parent: Any = super()
        if self._product_name is None:
            return parent._forward_impl(input, weight, *args, **kwargs)
        name = self._product_name
        # megatron-core passes keywords; binding them takes longer than all the rest here.
        asked = _IMPLEMENTATION.bind(input, weight, *args, **kwargs).arguments if args else kwargs
        if weight is not self.weight:
            raise UserError(f"{name}: {self!r} was called with a weight of another layer; exclude it")
        _refuse_bypass(name, asked)
        product = getattr(self, name)
        output = product(input, weight, self._region(asked))
        bias = asked.get("bias")
        return output if bias is None else output + bias

    def _region(self, asked: Mapping[str, Any]) -> Region:
        group = asked.get("tp_group")
        group = self.tp_group if group is None else group
        if asked.get("sequence_parallel"):
            return SequenceParallelRegion(group)
        if asked.get("allreduce_dgrad"):
            return TensorParallelRegion(group)
        return LocalRegion()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return megatron-core's sharded tensors, those of the product included.

        Where only some layers have a product, megatron-core needs ``metadata["non_homogeneous_layers"]``.

        Raises:
            UserError: the product does not say how its tensors are cut.
        """
        parent: Any = super()
        if self._product_name is None:
            return parent.sharded_state_dict(prefix, sharded_offsets, metadata)
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint as make

        module: Any = self
        axes = self._product_axes()
        own = {"weight": _AXES[self.tensor_parallel_cut]}
        if self.tensor_parallel_cut == "out":
            own["bias"] = 0
        groups: dict[str, Any] = {}
        if "dp_cp_group" in inspect.signature(make).parameters:  # since 0.16
            groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
            if groups["dp_cp_group"] is None:
                from megatron.core import parallel_state

                groups["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        tensors = make(
            module.state_dict(prefix="", keep_vars=True), prefix, {**own, **axes}, sharded_offsets, **groups
        )
        if self.weight_stride == 2:
            _split_gate_and_up(tensors, [prefix + key for key in axes], sharded_offsets, metadata or {})
        return tensors

    def _product_axes(self) -> dict[str, int]:
        """Return the cut axis of the product's tensors by their names in the layer."""
        name: Any = self._product_name
        product = getattr(self, name)
        if not hasattr(product, "sharded_axes"):
            raise UserError(
                f"{name}: its tensors in {self!r} cannot be saved through sharded_state_dict, because "
                f"{type(product).__name__} does not say how they are cut; use DeepSpeed's checkpoints"
            )
        axes = dict(product.sharded_axes())
        unknown = sorted(set(axes) - set(product.state_dict()))
        wrong = [
            key
            for key, parameter in product.named_parameters()
            if axes.get(key) != (_AXES[self.tensor_parallel_cut] if self._cut_of(key, parameter) else None)
        ]
        if unknown or wrong:
            raise ValueError(
                f"{type(product).__name__}.sharded_axes(): unknown tensors {unknown}, parameters whose axis "
                f"is not that of tensor_parallel_cut {wrong}"
            )
        return {f"{name}.{key}": axis for key, axis in axes.items()}


class SeamColumnParallelLinear(_Seam, layers.ColumnParallelLinear, LinearSeam):  # type: ignore[misc]
    """megatron-core's ColumnParallelLinear, until `install_product` gives it another product."""

    tensor_parallel_cut = "out"


class SeamRowParallelLinear(_Seam, layers.RowParallelLinear, LinearSeam):  # type: ignore[misc]
    """megatron-core's RowParallelLinear, until `install_product` gives it another product."""

    tensor_parallel_cut = "in"


def _refuse_bypass(name: str, asked: Mapping[str, Any]) -> None:
    """Raise UserError for anything in `asked` that only megatron-core's own product does."""
    for key, value in asked.items():
        if key in _DONE_HERE:
            continue
        known = _IMPLEMENTATION.parameters.get(key)
        off = _OFF[key] if key in _OFF else known.default if known else None
        if value is not off and value != off:
            raise UserError(
                f"{name}: megatron-core's linear layer was asked for {key}={value!r}, which would bypass it; "
                f"only {off!r} is supported"
            )


def _split_gate_and_up(
    tensors: dict[str, Any], keys: list[str], sharded_offsets: tuple[Any, ...], metadata: dict[str, Any]
) -> None:
    """Shard the halves of a gated layer's tensors one by one, as megatron-core's MLP does with the weight."""
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    singletons = metadata.get("singleton_local_shards", False)
    for key in keys:
        tensors[key] = apply_swiglu_sharded_factory(tensors[key], sharded_offsets, singletons)
