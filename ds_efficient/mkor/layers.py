"""Which layers MKOR preconditions, and what that costs: the plan of the technique."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ds_efficient.core.plain_linears import global_name, reason_to_leave
from ds_efficient.core.technique import Action, Outlook, RunContext
from ds_efficient.mkor.config import MkorConfig

if TYPE_CHECKING:
    from ds_efficient.core.inventory import Inventory, ModuleInfo

SIDES = {"both": ("left", "right"), "left": ("left",), "right": ("right",)}
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan_layers(config: MkorConfig, context: RunContext, inventory: Inventory) -> list[Action]:
    """Return one action for each linear layer of the model."""
    shared = {module.tied_to for module in inventory}
    return [_action(module, config, context, shared) for module in inventory.linears]


def _action(module: ModuleInfo, config: MkorConfig, context: RunContext, shared: set[str | None]) -> Action:
    reason = reason_to_leave(module, ("*",), config.exclude, shared)
    if reason:
        return Action(module.name, "skip", reason)
    sides = {"both": "both sides", "left": "left side", "right": "right side"}[config.sides]
    form = "dense" if config.form == "dense" else f"rank {config.max_rank}"
    vectors = "" if config.statistics_rank == 1 else f", {config.statistics_rank} vectors"
    held = factor_bytes(module, config, context)
    return Action(
        module.name,
        f"{form}, {sides}{vectors}",
        # spread over the data-parallel ranks; what tensor parallelism cuts is divided by the plan
        buffer_bytes=-(-held // context.data_parallel_size),
        options={"global_name": global_name(module.name, module.layer)},
    )


def _sizes(module: ModuleInfo, config: MkorConfig, context: RunContext) -> list[tuple[int, int]]:
    """Return (rows, columns with the bias) of the matrices that a layer is."""
    rows, columns = module.out_features, module.in_features
    shards = context.tensor_parallel_size if config.tensor_parallel == "block" else 1
    if module.tensor_parallel == "out" and shards > 1:
        return [(rows // shards, columns + module.bias)] * shards
    if module.tensor_parallel == "in" and shards > 1:
        first = (rows, columns // shards + module.bias)
        return [first, *[(rows, columns // shards)] * (shards - 1)]
    return [(rows, columns + module.bias)]


def factor_bytes(module: ModuleInfo, config: MkorConfig, context: RunContext) -> int:
    """Return the bytes of a layer's factors, over all ranks; of the factored form once its rank is full."""
    total = 0
    for rows, columns in _sizes(module, config, context):
        for side, size in (("left", rows), ("right", columns)):
            if side in SIDES[config.sides]:
                rank = min(config.max_rank, size)
                if config.form == "dense":
                    total += size * size * _BYTES[config.state_dtype]
                else:  # basis, operand, core in fp64 (`ds_efficient.ops.mkor_factored`)
                    total += 2 * 4 * size * rank + 8 * rank * rank
    return total


def _flops(module: ModuleInfo, config: MkorConfig, context: RunContext) -> tuple[float, float]:
    """Return the FLOPs of a layer's preconditioning in a step, and of one update of its factors.

    An update is as many rank-1 updates as `statistics_rank` says.
    """
    products = updates = 0.0
    for rows, columns in _sizes(module, config, context):
        for side, size, other in (("left", rows, columns), ("right", columns, rows)):
            if side not in SIDES[config.sides]:
                continue
            rank = min(config.max_rank, size)
            dense = config.form == "dense"
            products += 2.0 * size * size * other if dense else 4.0 * size * rank * other
            one = 4.0 * size * size if dense else 20.0 * size * rank
            updates += config.statistics_rank * one
    return products, updates


def outlook(
    config: MkorConfig, context: RunContext, inventory: Inventory, actions: Sequence[Action]
) -> Outlook:
    """Say what the chosen layers cost over all ranks of a replica's pipeline."""
    chosen = [inventory.find(action.module) for action in actions if not action.skipped]
    both = [_flops(module, config, context) for module in chosen]
    products, updates = sum(one[0] for one in both), sum(one[1] for one in both)
    held = sum(factor_bytes(module, config, context) for module in chosen)
    rank = config.statistics_rank
    element = _BYTES[config.comm_dtype]
    # one output vector of a layer with a bias is the bias's gradient, which the owner gets anyway
    vectors = sum(
        rank
        * element
        * (
            ("right" in SIDES[config.sides]) * module.in_features
            + ("left" in SIDES[config.sides] and (rank > 1 or not module.bias)) * module.out_features
        )
        for module in chosen
    )
    ranks = context.data_parallel_size * context.tensor_parallel_size * context.pipeline_parallel_size
    step = products + updates / config.inversion_interval
    numbers = {
        "layers": float(len(chosen)),
        "factor_bytes": float(held),
        "factor_bytes_per_rank": held / ranks,
        "flops_per_step": step,
        "flops_per_step_and_rank": step / ranks,
        "vector_bytes_per_update": float(vectors),
        "gradient_elements_per_step": _moved(sum(module.parameters for module in chosen), context),
    }
    summary = (
        f"{len(chosen)} layers; factors {held / 2**20:,.1f} MiB, on each of {ranks} "
        f"rank{'' if ranks == 1 else 's'} about {held / ranks / 2**20:,.1f}; adds {step / 1e12:.3g} TFLOP "
        f"to a step, {step / ranks / 1e12:.3g} a rank; each rank sends {vectors / 1024:,.1f} KiB of vectors "
        f"every {config.inversion_interval} step{'' if config.inversion_interval == 1 else 's'} and "
        f"{numbers['gradient_elements_per_step'] / 1e6:,.1f} M gradient elements every step"
    )
    return Outlook(summary, numbers)


def _moved(parameters: int, context: RunContext) -> float:
    """Return the gradient elements that a rank sends to other ranks in a step: to the owners, and back.

    Args:
        parameters: of all chosen layers.
        context: sizes of the run.
    """
    replicas, shards = context.data_parallel_size, context.tensor_parallel_size
    ranks = replicas * shards
    share = parameters / context.pipeline_parallel_size / ranks
    if context.zero_stage:  # each element is on one rank
        return 2 * share * (1 - 1 / ranks)
    return share * (1 - 1 / shards + replicas - 1 / shards)
