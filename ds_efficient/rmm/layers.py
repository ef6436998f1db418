"""Which layers save a projection of their input, and what that saves: the plan of the technique."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ds_efficient.core.plain_linears import global_name, reason_to_leave
from ds_efficient.core.technique import Action, RunContext
from ds_efficient.ops.rmm_partition import Partition, partition
from ds_efficient.rmm.config import AUTO, RmmConfig

if TYPE_CHECKING:
    from ds_efficient.core.inventory import Inventory, ModuleInfo

# Ends of the names of attention's output projections, whose input the attention kernel keeps: megatron-core,
# GPT-2, Llama and its descendants, BERT-like models.
_AFTER_ATTENTION = ("linear_proj", "attn.c_proj", "o_proj", "out_proj", "attention.output.dense")
# Rows of a micro-batch where the model does not say: all sketches of more rows save the same share.
_MANY_ROWS = 1 << 16


def plan_layers(config: RmmConfig, context: RunContext, inventory: Inventory) -> list[Action]:
    """Return one action for each linear layer of the model."""
    shared = {module.tied_to for module in inventory}
    parts = partition(
        _rows(context, inventory),
        config.first_ratio,
        block_size=config.block_size,
        min_rows=config.min_rows,
    )
    return [_action(module, config, parts, shared) for module in inventory.linears]


def _rows(context: RunContext, inventory: Inventory) -> int:
    """Rows of a layer's input: tokens of a micro-batch."""
    if inventory.model is None:
        return _MANY_ROWS
    return inventory.model.seq_length * (context.micro_batch_size or 1)


def _action(module: ModuleInfo, config: RmmConfig, parts: Partition, shared: set[str | None]) -> Action:
    reason = reason_to_leave(module, config.modules, config.exclude, shared)
    if reason == "not in modules" and module.matches(_AFTER_ATTENTION):
        reason = "its input is kept by attention"
    if reason:
        return Action(module.name, "skip", reason)
    kept = parts.total / parts.rows
    if parts.exact:
        rows = f"all {parts.rows} rows"
    else:
        rows = f"{parts.projected} of {'every ' if parts.block < parts.rows else ''}{parts.block} rows"
    return Action(
        module.name,
        f"{config.sketch} {'auto, at first ' if config.ratio == AUTO else ''}{rows}",
        saved_activation_fraction=1.0 - kept,
        options={
            "global_name": global_name(module.name, module.layer),
            "matmul_share": {
                "forward": 1.0,
                "input_gradient": 1.0,
                "weight_gradient": _weight_gradient_share(module, config.sketch, parts),
            },
        },
    )


def _weight_gradient_share(module: ModuleInfo, sketch: str, parts: Partition) -> float:
    """Return the FLOPs of the sketched weight gradient in units of the exact one.

    Exact: 2 B in out. Sketched: 2 (kept rows) in out, and for each of the B rows and each of its in + out
    values the products with S: p of them for a dense sketch, log2(block) additions for a Hadamard transform,
    none to speak of for a count sketch or sampled rows.
    """
    if parts.exact:
        return 1.0
    each = {"gaussian": parts.projected, "rademacher": parts.projected, "srht": math.log2(parts.block) / 2}
    inputs, outputs = module.in_features, module.out_features
    return parts.total / parts.rows + each.get(sketch, 0) * (inputs + outputs) / (inputs * outputs)
