"""The place where DeepSpeed averages gradients over the data-parallel ranks, at each ZeRO stage.

`replace_reduction` puts a function in its place on one engine. Found by feature detection: without
partitioned gradients the engine's ``buffered_allreduce_fallback`` at the accumulation boundary; with ZeRO 1
and 2 the optimizer's ``gradient_reduction_w_predivide``, once a bucket, at stage 2 in every micro-batch; with
ZeRO 3 the mangled ``__avg_scatter_grads``, which leaves each rank its slices only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ds_efficient.errors import UnsupportedVersion, UserError

Place = Literal["engine", "bucket", "slices"]
Original = Callable[[], None]
Reduce = Callable[[Mapping[str, Tensor], Original], None]
Slices = dict[str, Tensor]
ReduceScatter = Callable[[Mapping[str, Tensor], Callable[[], Slices]], Slices]


class EarlyReduction(Protocol):
    """Reduces gradients while the backward pass makes others."""

    def begins(self) -> bool:
        """Whether it takes the gradients of this step; else the ordinary way is gone at the end."""

    def start(self, gradients: Mapping[str, Tensor]) -> None:
        """Take some; called in the same order on all ranks."""

    def finish(self) -> None:
        """Leave the means in all of them."""


_EARLY_ELEMENTS = 1 << 22
_SLICES = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
_BUCKET = "gradient_reduction_w_predivide"


def place_of(engine: Any) -> Place:
    """Return where the engine reduces: by itself, bucket by bucket in ZeRO 1 or 2, or to slices in ZeRO 3.

    Raises:
        UnsupportedVersion: none of them is there.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, _SLICES):
        return "slices"
    if hasattr(optimizer, _BUCKET):
        return "bucket"
    if hasattr(engine, "buffered_allreduce_fallback") and int(engine.zero_optimization_stage()) <= 1:
        return "engine"
    raise UnsupportedVersion(
        f"{type(optimizer).__name__} at ZeRO stage {int(engine.zero_optimization_stage())} has none of the "
        "places where this project's tested DeepSpeed versions reduce gradients; install one of those"
    )


def data_parallel_group(engine: Any) -> Any:
    """Return the process group over which the engine averages gradients."""
    group = getattr(engine.optimizer, "dp_process_group", None)
    return engine.seq_data_parallel_group if group is None else group


def gradient_device(engine: Any) -> torch.device:
    """Return the device on which gradients are reduced."""
    device = torch.device(engine.device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def gradient_dtype(engine: Any) -> torch.dtype:
    """Return the dtype in which gradients are reduced: that of the parameters, or of the accumulation."""
    optimizer = engine.optimizer
    if place_of(engine) == "slices":
        return next(p.dtype for p in engine.module.parameters() if p.requires_grad)
    if hasattr(optimizer, "fp32_groups_gradients"):
        return torch.float32
    if getattr(optimizer, "use_grad_accum_attribute", False):
        found: torch.dtype = optimizer.gradient_accumulation_dtype
        return found
    return next(p.dtype for p in engine.module.parameters() if p.requires_grad)


def whole_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trained parameters on this rank by name; ZeRO 3's as if not partitioned."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad and getattr(parameter, "ds_numel", parameter.numel())
    }


def copied_elsewhere(engine: Any, *, tensor_parallel: int, pipeline_parallel: int) -> set[str]:
    """Return the parameters of which other model-parallel ranks hold a copy.

    The copies must get the same bits, from data-parallel groups that know nothing of each other: what
    tensor parallelism does not cut, and embeddings that the first and the last pipeline stage share.
    """
    found = set()
    for name, parameter in engine.module.named_parameters():
        whole = tensor_parallel > 1 and not getattr(parameter, "tensor_model_parallel", False)
        shared = any(hasattr(parameter, mark) for mark in ("ds_pipe_replicated", "shared_embedding"))
        if whole or (pipeline_parallel > 1 and shared):
            found.add(name)
    return found


def steps_can_be_skipped(engine: Any) -> bool:
    """Return whether the optimizer leaves a step out on an overflow, which DeepSpeed does in bf16 too."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "overflow"):
        return False
    unchecked = not getattr(optimizer, "check_grad_overflow", True)
    return not (unchecked and getattr(optimizer, "dtype", None) == torch.bfloat16)


def why_not(engine: Any) -> list[str]:
    """Return the settings of the engine with which its reduction cannot be replaced, each with a remedy."""
    zero = engine._config.zero_config
    found = []
    if getattr(engine, "has_moe_layers", False):
        found.append("mixture-of-experts layers: reduced over groups of their own; use a dense model")
    if getattr(engine, "sequence_parallel_size", 1) != 1:
        found.append("DeepSpeed's sequence parallelism: reduces over other ranks; use data parallelism")
    if not getattr(engine, "gradient_average", True):
        found.append('gradient_allreduce_op "sum": gradients are averaged here; use "mean"')
    if getattr(engine, "zenflow", False) or getattr(zero, "zenflow", None) is not None:
        found.append("zero_optimization.zenflow: has a reduction of its own; remove it")
    place = place_of(engine)
    if place == "bucket" and not engine.optimizer.contiguous_gradients:
        found.append("zero_optimization.contiguous_gradients false: set it to true")
    if place == "slices":
        if not engine.optimizer.reduce_scatter:
            found.append("zero_optimization.reduce_scatter false at stage 3: set it to true")
        if getattr(zero, "zero_quantized_gradients", False):
            found.append("zero_optimization.zero_quantized_gradients: compresses gradients too; remove it")
        if getattr(zero, "zero_hpz_partition_size", 1) != 1:
            found.append("zero_optimization.zero_hpz_partition_size: has other groups; remove it")
    return found


def replace_reduction(engine: Any, reduce: Reduce, early: EarlyReduction | None = None) -> None:
    """Call ``reduce(gradients, original)`` wherever the engine averages whole gradients.

    Args:
        engine: whose `place_of` is not "slices".
        reduce: gets this rank's gradients by name, in DeepSpeed's order, and leaves their means in them;
            ``original()`` does what DeepSpeed does. At stage 2 it is called in each micro-batch.
        early: instead of it, where nothing is partitioned and ``zero_optimization.overlap_comm`` is true:
            gets gradients as soon as the backward pass has made them.

    Raises:
        UserError: the engine has a setting with which it cannot be; names all of them.
    """
    _require(engine)
    if place_of(engine) == "engine":
        accumulated_elsewhere = hasattr(engine.optimizer, "fp32_groups_gradients")
        overlap = bool(engine._config.zero_config.overlap_comm) and not accumulated_elsewhere
        _replace_in_engine(engine, reduce, early if overlap else None)
    else:
        _replace_in_buckets(engine, reduce)


def replace_reduce_scatter(engine: Any, reduce_scatter: ReduceScatter) -> None:
    """Call ``reduce_scatter(gradients, original)`` wherever ZeRO 3 averages gradients and keeps its slices.

    Args:
        engine: whose `place_of` is "slices".
        reduce_scatter: gets this rank's whole gradients by name, and returns by name the mean's elements
            [rank c, rank c + c) with c = ceil(elements / ranks), fewer at the end; ``original()`` does what
            DeepSpeed does. Called in each micro-batch.

    Raises:
        UserError: the engine has a setting with which it cannot be; names all of them.
    """
    _require(engine)
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    original = getattr(optimizer, _SLICES)

    def average(parameters: list[Any], communication_data_type: torch.dtype) -> list[Tensor]:
        keys = [names[id(parameter)] for parameter in parameters]

        def usual() -> Slices:
            found = original(parameters, communication_data_type)
            return dict(zip(keys, found, strict=True))

        gradients = {key: parameter.grad for key, parameter in zip(keys, parameters, strict=True)}
        slices = reduce_scatter(gradients, usual)
        return [slices[key].to(optimizer.gradient_accumulation_dtype) for key in keys]

    setattr(optimizer, _SLICES, average)


def _require(engine: Any) -> None:
    problems = why_not(engine)
    if problems:
        raise UserError("\n  ".join(["section lgreco does not go together with", *problems]))


def _replace_in_engine(engine: Any, reduce: Reduce, early: EarlyReduction | None) -> None:
    original = engine.buffered_allreduce_fallback
    watch = None if early is None else _BackwardWatch(engine, early)

    def fallback(grads: Any = None, elements_per_buffer: int = 500_000_000) -> None:
        if grads is not None:
            original(grads=grads, elements_per_buffer=elements_per_buffer)
            return
        gradients = _gradients_of_engine(engine)
        if watch is not None and watch.finish(gradients):
            return
        reduce(gradients, lambda: original(grads=None, elements_per_buffer=elements_per_buffer))

    engine.buffered_allreduce_fallback = fallback


class _BackwardWatch:
    """Hands gradients over in the backward pass of the accumulation boundary, bucket by bucket.

    The buckets are the same on all ranks, and one is started only after those before it, so that all ranks
    start the same ones in the same order whatever the order of their gradients.
    """

    def __init__(self, engine: Any, early: EarlyReduction) -> None:
        self._engine, self._early = engine, early
        self._buckets: list[dict[str, Any]] = [{}]
        elements = 0
        trained = [
            (name, parameter)
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad and parameter.numel()
        ]
        for name, parameter in reversed(trained):
            if elements > _EARLY_ELEMENTS:
                self._buckets.append({})
                elements = 0
            self._buckets[-1][name] = parameter
            elements += parameter.numel()
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._made(name))
        self._ready: set[str] = set()
        self._started = 0

    def _made(self, name: str) -> None:
        engine = self._engine
        if (
            not engine.is_gradient_accumulation_boundary()
            or engine.inside_no_sync_ctxt
            or not engine.enable_backward_allreduce
            or not self._early.begins()
        ):
            return
        if name in self._ready:
            raise UserError(
                f"{name}: its gradient is added to twice in one optimizer step's last backward pass (shared "
                "layers in recomputed parts, or two backward calls), which does not go together with "
                "zero_optimization.overlap_comm true at stage 0; set it to false"
            )
        self._ready.add(name)
        while self._started < len(self._buckets) and self._buckets[self._started].keys() <= self._ready:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._started]
        self._started += 1
        self._early.start({name: parameter.grad for name, parameter in bucket.items()})

    def finish(self, gradients: Mapping[str, Tensor]) -> bool:
        """Start what is left, whose gradients are there now, and wait; False where nothing is early."""
        if not self._early.begins():
            return False
        while self._started < len(self._buckets):
            self._start_next()
        self._early.finish()
        self._ready.clear()
        self._started = 0
        return True


def _gradients_of_engine(engine: Any) -> dict[str, Tensor]:
    """Gradients where nothing is partitioned; a parameter that this rank did not use has zeros."""
    optimizer = engine.optimizer
    found: dict[str, Tensor] = {}
    if hasattr(optimizer, "fp32_groups_gradients"):  # BF16_Optimizer accumulates in fp32
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        for group, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            found.update(
                (names[id(parameter)], gradient.view(parameter.shape))
                for parameter, gradient in zip(group, gradients, strict=True)
            )
        return found
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and parameter.numel():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found[name] = parameter.grad
    return found


def _replace_in_buckets(engine: Any, reduce: Reduce) -> None:
    optimizer = engine.optimizer
    needed = ("ipg_buckets", "bit16_groups", "reduce_scatter", "dp_process_group")
    lacking = [name for name in needed if not hasattr(optimizer, name)]
    if lacking:
        raise UnsupportedVersion(
            f"{type(optimizer).__name__} lacks {', '.join(lacking)}; see the tested versions of DeepSpeed"
        )
    # With it each rank would get the reduced gradients of its own partition only, by calls of another form.
    optimizer.reduce_scatter = False
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    original = optimizer.gradient_reduction_w_predivide

    def average(tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        result = [tensor]

        def usual() -> None:
            result[0] = original(tensor, communication_data_type)
            if result[0] is not tensor:
                tensor.copy_(result[0])

        reduce(_cut_bucket(optimizer, names, tensor, communication_data_type), usual)
        return result[0]

    optimizer.gradient_reduction_w_predivide = average


def _cut_bucket(
    optimizer: Any, names: Mapping[int, str], tensor: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Views of the parameters' gradients in a flat bucket."""
    found: dict[str, Tensor] = {}
    offset = 0
    for group, index, _ in optimizer.ipg_buckets[dtype].params:
        parameter = optimizer.bit16_groups[group][index]
        size = parameter.numel()
        found[names[id(parameter)]] = tensor.narrow(0, offset, size).view(parameter.shape)
        offset += size
    if offset != tensor.numel():
        raise UnsupportedVersion(
            f"a bucket of {tensor.numel()} elements holds parameters of {offset}; this DeepSpeed fills its "
            "buckets in another way than the tested versions"
        )
    return found


def slice_bounds(elements: int, group: Any) -> tuple[int, int]:
    """Return the part of a parameter's elements that ZeRO 3 keeps on this rank."""
    each = math.ceil(elements / dist.get_world_size(group))
    start = min(elements, dist.get_rank(group) * each)
    return start, min(elements, start + each)
