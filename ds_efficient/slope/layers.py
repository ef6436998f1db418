"""Which layers become sparse, with what pattern, and what that costs: the plan of the technique."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ds_efficient.config.fields import parse_layers, parse_pattern
from ds_efficient.core.plain_linears import global_name, reason_to_leave
from ds_efficient.core.technique import Action, RunContext
from ds_efficient.slope.config import SlopeConfig
from ds_efficient.slope.operands import LayerShape

if TYPE_CHECKING:
    from ds_efficient.core.inventory import Inventory, ModuleInfo

_OPERAND_BYTES = 2  # sparse products run in bf16 and fp16


def plan_layers(config: SlopeConfig, context: RunContext, inventory: Inventory) -> list[Action]:
    """Return one action for each linear layer of the model."""
    patterns = {layer: entry.pattern for entry in config.patterns for layer in parse_layers(entry.layers)}
    shared = {module.tied_to for module in inventory}
    return [_action(module, config, context, patterns, shared) for module in inventory.linears]


def _action(
    module: ModuleInfo,
    config: SlopeConfig,
    context: RunContext,
    patterns: dict[int, str],
    shared: set[str | None],
) -> Action:
    pattern = config.pattern if module.layer is None else patterns.get(module.layer, config.pattern)
    n, m = parse_pattern(pattern)
    reason = reason_to_leave(module, config.modules, config.exclude, shared)
    reason = reason or _misfit(module, config, context, m)
    if reason:
        return Action(module.name, "skip", reason)
    size = module.out_features * module.in_features
    rank = config.adapter.rank
    up, down = rank * module.out_features, rank * module.in_features
    mask = module.out_features * 4 * math.ceil(module.in_features / 32)
    sparse = config.backend != "dense" and LayerShape(0, 0, n, m).fits_hardware
    # Between products a rewritten operand is its metadata, a sixteenth of the dense weight.
    sixteenths = 1 if rewrites_operands(config, context) else 9
    operands = (2 if config.double_prune else 1) * size * _OPERAND_BYTES * sixteenths // 16 if sparse else 0
    share = n / m if sparse else 1.0
    return Action(
        module.name,
        f"sparse {pattern}" + (f" + rank {rank}" if rank else ""),
        parameters=module.parameters - size + size * n // m + up + down,
        extra_parameters=(down, up) if module.tensor_parallel == "in" else (up, down),
        buffer_bytes=mask * (2 if config.double_prune else 1) + operands,
        options={
            "pattern": pattern,
            "global_name": global_name(module.name, module.layer),
            "full_out": module.out_features,
            "full_in": module.in_features,
            "matmul_share": {
                "forward": share,
                "input_gradient": share if config.double_prune else 1.0,
                "weight_gradient": 1.0,
            },
        },
    )


def rewrites_operands(config: SlopeConfig, context: RunContext) -> bool:
    """Whether operands are written anew for each product instead of being kept."""
    if config.operands == "auto":
        return context.micro_batches == 1
    return config.operands == "rewritten"


def _misfit(module: ModuleInfo, config: SlopeConfig, context: RunContext, m: int) -> str:
    """Return why groups of M do not fit this layer's shards, or an empty text."""
    parts = context.tensor_parallel_size
    inputs, outputs = module.in_features, module.out_features
    cut_in = parts if module.tensor_parallel == "in" else 1
    cut_out = parts if module.tensor_parallel == "out" else 1
    shards = f" / {parts} tensor-parallel ranks" if parts > 1 else ""
    if inputs % (m * cut_in):
        return f"in_features {inputs}{shards if cut_in > 1 else ''} not a multiple of M={m}"
    # A gated layer stacks two matrices, each cut by itself; whether it is one shows in the layer's stride,
    # which a shape does not tell, so the halves are checked where the layer is made.
    if config.double_prune and outputs % (m * cut_out):
        return f"out_features {outputs}{shards if cut_out > 1 else ''} not a multiple of M={m}"
    return ""
