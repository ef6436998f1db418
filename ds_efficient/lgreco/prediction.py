"""Whose gradients are compressed, what that sends, and what it holds: the plan of the technique."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ds_efficient.core.technique import Action, Outlook, RunContext
from ds_efficient.errors import UserError
from ds_efficient.lgreco.compressors import sent_raw
from ds_efficient.lgreco.config import LgrecoConfig
from ds_efficient.lgreco.options import RAW, Option, default_option, wire_bytes

if TYPE_CHECKING:
    from ds_efficient.core.inventory import Inventory, ModuleInfo

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNITS = {"powersgd": "rank {:g}", "qsgd": "{:g} bits", "topk": "largest {:g}"}


def require_stage(config: LgrecoConfig, stage: int) -> None:
    """Refuse compressors with error feedback where ZeRO partitions gradients.

    Raises:
        UserError: names the stage, the compressor and the remedy.
    """
    if stage >= 2 and config.compressor != "qsgd":
        raise UserError(
            f'lgreco.compressor "{config.compressor}" with zero_optimization.stage {stage}: its errors, a '
            "full-size fp32 copy of the gradients on each rank, would undo what partitioned gradients save, "
            'and it would communicate in every micro-batch. Use stage 1, or compressor "qsgd", which needs '
            "no errors"
        )


def plan_modules(config: LgrecoConfig, context: RunContext, inventory: Inventory) -> list[Action]:
    """Return one action for each module with parameters.

    Raises:
        UserError: the compressor does not go with the ZeRO stage.
    """
    require_stage(config, context.zero_stage)
    return [_action(module, config, context, inventory) for module in inventory]


def outlook(config: LgrecoConfig, context: RunContext, inventory: Inventory) -> Outlook | None:
    """Predict the bytes of an optimizer step with the uniform default; L-GreCo goes on from there."""
    if context.data_parallel_size < 2:
        return Outlook("one data-parallel rank has nothing to reduce: lgreco needs two or more", {})
    found = [_Layer.of(module, config, context, inventory) for module in inventory]
    passes = (context.micro_batches or 1) if context.zero_stage >= 2 else 1
    ways = 0.5 if context.zero_stage == 3 else 1.0  # slices are not gathered again
    share = passes * ways / context.pipeline_parallel_size
    sent, usual = share * sum(one.sent for one in found), share * sum(one.raw for one in found)
    ratio = usual / sent if sent else 1.0
    stages = " (mean of the pipeline stages)" if context.pipeline_parallel_size > 1 else ""
    start = f" from step {config.start_step}" if config.start_step else ""
    return Outlook(
        f"gradients: {sent / 2**20:,.1f} MiB sent a rank{stages} and step{start} with the uniform default, "
        f"{usual / 2**20:,.1f} MiB without compression ({ratio:.1f} times as many, gradients in "
        f"{context.gradient_precision}); layers are planned anew every {config.interval} steps",
        {"bytes": sent, "raw_bytes": usual, "ratio": ratio},
    )


@dataclass(frozen=True)
class _Layer:
    """What becomes of a module's gradients.

    Attributes:
        reason: why the weight's is not compressed, or "".
        option: how it is sent at first.
        raw, sent: bytes of a reduction of all its gradients on one rank, without and with the default.
    """

    reason: str
    option: Option
    raw: int
    sent: int

    @classmethod
    def of(
        cls, module: ModuleInfo, config: LgrecoConfig, context: RunContext, inventory: Inventory
    ) -> _Layer:
        """Decide on one module."""
        tensor, ranks = context.tensor_parallel_size, max(2, context.data_parallel_size)
        dtype = _DTYPES[context.gradient_precision]
        shape = _shape(module, tensor)
        if module.tied_to is not None:  # the last pipeline stage has a copy
            copy = (
                wire_bytes(RAW, shape or (0,), dtype, ranks=ranks)
                if context.pipeline_parallel_size > 1
                else 0
            )
            return cls(f"its weight is that of {module.tied_to}", RAW, copy, copy)
        raw = wire_bytes(RAW, (module.rank_parameters(tensor),), dtype, ranks=ranks)
        reason = _why_raw(module, shape, context, inventory)
        if reason or shape is None:
            return cls(reason, RAW, raw, raw)
        option = default_option(config, shape, dtype, ranks=ranks)
        if option == RAW:
            return cls("the default would not make it smaller", RAW, raw, raw)
        saved = wire_bytes(RAW, shape, dtype, ranks=ranks) - wire_bytes(option, shape, dtype, ranks=ranks)
        return cls("", option, raw, raw - saved)


def _why_raw(
    module: ModuleInfo, shape: tuple[int, ...] | None, context: RunContext, inventory: Inventory
) -> str:
    if shape is None:
        return "vectors are sent as they are"
    if sent_raw(shape):
        return f"{math.prod(shape)} elements are too few"
    if context.tensor_parallel_size > 1 and module.tensor_parallel is None:
        return "all tensor-parallel ranks hold it"
    if context.pipeline_parallel_size > 1 and any(one.tied_to == module.name for one in inventory):
        return "two pipeline stages hold it"
    return ""


def _action(module: ModuleInfo, config: LgrecoConfig, context: RunContext, inventory: Inventory) -> Action:
    found = _Layer.of(module, config, context, inventory)
    if found.reason:
        return Action(module.name, "skip", found.reason)
    return Action(
        module.name,
        f"{describe(found.option)} at first, {found.raw / found.sent:.1f}x fewer bytes",
        buffer_bytes=_buffer_bytes(found.option, _shape(module, 1) or (), context),
    )


def describe(option: Option) -> str:
    """A few words like ``rank 32``."""
    return _UNITS[option.compressor].format(option.setting) if option != RAW else "raw"


def _buffer_bytes(option: Option, shape: Sequence[int], context: RunContext) -> int:
    """Fp32 errors, the factor that is kept, and the sums of the last steps before a plan."""
    elements = math.prod(shape)
    sums = elements if context.zero_stage < 2 else elements // max(1, context.data_parallel_size)
    if option.compressor == "qsgd":
        return 4 * sums
    kept = int(option.setting) * math.prod(shape[1:]) if option.compressor == "powersgd" else 0
    # An overflow can undo a step: new errors are held beside the old ones until it is over.
    errors = 2 * elements
    return 4 * (errors + kept + sums)


def _shape(module: ModuleInfo, tensor_parallel: int) -> tuple[int, ...] | None:
    """Shape of the weight on one tensor-parallel rank; None where it is no matrix."""
    if module.kind == "embedding":
        rows, columns = module.in_features, module.out_features
    elif module.is_linear:
        rows, columns = module.out_features, module.in_features
    else:
        return None
    cut_rows = module.tensor_parallel == ("in" if module.kind == "embedding" else "out")
    if module.tensor_parallel is None or tensor_parallel == 1:
        return rows, columns
    return (rows // tensor_parallel, columns) if cut_rows else (rows, columns // tensor_parallel)
