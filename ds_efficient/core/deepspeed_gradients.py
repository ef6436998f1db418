"""Where DeepSpeed keeps the averaged gradients between their reduction and the optimizer step.

A technique that multiplies gradients (`Technique.before_step`) finds them here, whatever the ZeRO stage: each
parameter's elements that this rank holds, as one flat view that may be read and written. Without ZeRO that is
all of ``p.grad``; in stages 1 and 2 the part of it that lies in the rank's partition of the flat group; in
stage 3 the rank's slice. They are averaged over the data-parallel ranks, and carry the fp16 loss scale.

Muon is special in stages 1 and 2: DeepSpeed orthogonalises the matrices of its groups at the end of the
backward pass, where it cuts the partition out, and for that gives each rank that has a part of a matrix all
of it. There the cut is put off: slices are the whole matrices, and `AveragedGradients.finish` cuts.

As in `ds_efficient.core.deepspeed_compat` everything is found on the engine at hand and guarded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_efficient.core.deepspeed_compat import zero_stage
from ds_efficient.errors import UnsupportedVersion, UserError

_PARTITIONED = (
    "params_in_partition",
    "averaged_gradients",
    "partition_size",
    "grad_start_offset",
    "grad_partition_insertion_offset",
    "real_dp_process_group",
    "get_param_id",
)
_SLICED = ("fp16_groups", "averaged_gradients", "_get_param_partition_rank")


class GradientSlice(NamedTuple):
    """The elements of one parameter's averaged gradient on this rank.

    Attributes:
        start: place of the first of them in the flattened parameter.
        values: (elements,), a view of what the optimizer step reads.
    """

    start: int
    values: Tensor


class AveragedGradients:
    """Reads the averaged gradients of an engine at an accumulation boundary.

    Args:
        engine: DeepSpeed engine.
        asker: name of the technique, for messages.

    Raises:
        UserError: a setting under which the gradients are elsewhere (offloading, ZenFlow).
        UnsupportedVersion: a DeepSpeed whose optimizer has another form.
    """

    def __init__(self, engine: Any, asker: str) -> None:
        self._engine = engine
        self.stage = zero_stage(engine)
        optimizer = engine.optimizer
        if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
            raise UserError(
                f"{asker}: zero_optimization.offload_optimizer takes the gradients to the host before "
                f"{asker} can change them; remove offload_optimizer, or set {asker}.enabled to false"
            )
        if getattr(optimizer, "zenflow", False):
            raise UserError(f"{asker}: zero_optimization.zenflow is not supported; remove one of them")
        needed = {0: (), 1: _PARTITIONED, 2: _PARTITIONED, 3: _SLICED}[self.stage]
        lacking = [name for name in needed if not hasattr(optimizer, name)]
        if lacking or type(optimizer).__name__ == "BF16_Optimizer":
            raise UnsupportedVersion(
                f"{asker}: {type(optimizer).__name__} of this DeepSpeed keeps its gradients elsewhere "
                f"(lacking: {', '.join(lacking) or 'p.grad'}); see the tested versions"
            )
        # By group: the whole gradients of its parameters here, and the cut that was put off.
        self._uncut: dict[int, tuple[list[Tensor], Callable[[], Any]]] = {}
        self._places: dict[int, list[tuple[int, int, int]]] = {}  # by group, `_place`
        if self.stage in (1, 2) and _is_muon(optimizer):
            self._put_off_muon(asker)

    def _put_off_muon(self, asker: str) -> None:
        """Let Muon's groups be cut, and orthogonalised on the way, by `finish`."""
        optimizer = self._engine.optimizer
        names = ("get_flat_partition", "all_grad_tensors", "_is_muon_group")
        lacking = [name for name in names if not hasattr(optimizer, name)]
        if lacking or "param_group_idx" not in inspect.signature(optimizer.get_flat_partition).parameters:
            raise UnsupportedVersion(
                f"{asker}: Muon of this DeepSpeed works elsewhere (lacking: {', '.join(lacking) or '-'}) "
                f"with zero_optimization.stage = {self.stage}; use stage 0 or 3, or see the tested versions"
            )
        original = optimizer.get_flat_partition

        def get_flat_partition(parameters: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            if not parameters or not optimizer._is_muon_group(parameters):
                return original(parameters, *args, **kwargs)
            group = inspect.signature(original).bind(parameters, *args, **kwargs).arguments["param_group_idx"]
            whole = list(optimizer.all_grad_tensors[group])
            self._uncut[group] = whole, partial(original, parameters, *args, **kwargs)
            for parameter in parameters:
                parameter.use_muon = False
            try:
                return original(parameters, *args, **kwargs)
            finally:
                for parameter in parameters:
                    parameter.use_muon = True

        optimizer.get_flat_partition = get_flat_partition

    def finish(self) -> None:
        """Hand the gradients over to the optimizer; call once a step, changed or not."""
        optimizer = self._engine.optimizer
        for group, (whole, cut) in self._uncut.items():
            optimizer.all_grad_tensors[group] = whole
            optimizer.averaged_gradients[group] = cut()
            optimizer.all_grad_tensors[group] = None
        self._uncut.clear()

    @property
    def dtype(self) -> torch.dtype:
        """Type in which DeepSpeed keeps them, as far as its settings tell."""
        kept = getattr(self._engine.optimizer, "gradient_accumulation_dtype", None) if self.stage else None
        if isinstance(kept, torch.dtype):
            return kept
        return next((one.dtype for one in self._engine.module.parameters()), torch.float32)

    def slices(self, wanted: Container[int] | None = None) -> dict[int, GradientSlice]:
        """Return what this rank holds, by ``id(parameter)``; parameters without any elements here lack.

        Valid until the optimizer step. Without ZeRO a parameter that had no gradient lacks too.

        Args:
            wanted: the parameters, by ``id``; None for all.
        """
        find = {0: self._whole, 1: self._partitions, 2: self._partitions, 3: self._slices_of_each}
        return dict(find[self.stage](_Every() if wanted is None else wanted))

    def _whole(self, wanted: Container[int]) -> Iterator[tuple[int, GradientSlice]]:
        for parameter in self._engine.module.parameters():
            if parameter.grad is not None and id(parameter) in wanted:
                if not parameter.grad.is_contiguous():
                    parameter.grad = parameter.grad.contiguous()
                yield id(parameter), GradientSlice(0, _flat(parameter.grad))

    def _place(self, group: int, parameters: Sequence[Any]) -> list[tuple[int, int, int]]:
        """Return ``id``, first element and elements of the parameters with elements in this partition.

        Found once: a partition stays as it is made.
        """
        if group not in self._places:
            optimizer = self._engine.optimizer
            place = torch.distributed.get_rank(group=optimizer.real_dp_process_group[group])
            starts = optimizer.grad_start_offset[group][place]
            begins = optimizer.grad_partition_insertion_offset[group][place]
            room = int(optimizer.partition_size[group])
            found = []
            for parameter in parameters:
                key = optimizer.get_param_id(parameter)
                start = int(starts[key])
                found.append((id(parameter), start, min(parameter.numel() - start, room - int(begins[key]))))
            self._places[group] = [one for one in found if one[2] > 0]
        return self._places[group]

    def _partitions(self, wanted: Container[int]) -> Iterator[tuple[int, GradientSlice]]:
        optimizer = self._engine.optimizer
        for group, parameters in enumerate(optimizer.params_in_partition):
            held = optimizer.averaged_gradients.get(group)
            if held is None:
                continue
            if group in self._uncut:
                for parameter, gradient in zip(parameters, self._uncut[group][0], strict=True):
                    if id(parameter) in wanted:
                        yield id(parameter), GradientSlice(0, _flat(gradient))
                continue
            real = (i for i, gradient in enumerate(held) if not getattr(gradient, "_zero_padding", False))
            for name, start, count in self._place(group, parameters):
                number = next(real)
                if name not in wanted:
                    continue
                if held[number].numel() != count:
                    raise UnsupportedVersion(
                        f"ZeRO's partition holds {held[number].numel()} elements of a parameter, not "
                        f"{count}, as expected; see the tested versions of DeepSpeed"
                    )
                if not held[number].is_contiguous():
                    held[number] = held[number].contiguous()
                yield name, GradientSlice(start, _flat(held[number]))

    def _slices_of_each(self, wanted: Container[int]) -> Iterator[tuple[int, GradientSlice]]:
        optimizer = self._engine.optimizer
        for group, parameters in enumerate(optimizer.fp16_groups):
            held = optimizer.averaged_gradients.get(group)
            if held is None:
                continue
            for parameter, gradient in zip(parameters, held, strict=True):
                if id(parameter) not in wanted:
                    continue
                start = optimizer._get_param_partition_rank(parameter) * gradient.numel()
                count = min(gradient.numel(), int(parameter.ds_numel) - start)
                if count > 0:
                    yield id(parameter), GradientSlice(start, _flat(gradient)[:count])


class _Every:
    """Contains everything."""

    def __contains__(self, _: object) -> bool:
        return True


def _flat(gradient: Tensor) -> Tensor:
    """Return a view (elements,) that autograd does not watch; no call where it is one."""
    gradient = gradient.detach() if gradient.requires_grad else gradient
    return gradient if gradient.dim() == 1 else gradient.view(-1)


def _is_muon(optimizer: Any) -> bool:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return "muon" in type(optimizer).__name__.lower()
