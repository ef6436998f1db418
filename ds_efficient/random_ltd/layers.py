"""Which layers drop tokens, and what that saves: the plan of the technique."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ds_efficient.core.technique import Action
from ds_efficient.errors import UserError
from ds_efficient.random_ltd.config import RandomLtdConfig
from ds_efficient.random_ltd.sampler import schedule_of

if TYPE_CHECKING:
    from ds_efficient.core.inventory import Inventory

SECTION = "data_efficiency.data_routing.random_ltd"
_LAYER_LIST = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.\d+(?=\.|$)")
_MEGATRON_LAYERS = "decoder.layers"


def chosen_layers(config: RandomLtdConfig, total: int) -> tuple[int, ...]:
    """Return the numbers of the layers that drop tokens.

    Args:
        config: of the run.
        total: layers of the whole model.

    Raises:
        UserError: the section speaks of layers that the model does not have.
    """
    if config.total_layer_num is not None and config.total_layer_num != total:
        raise UserError(
            f"{SECTION}.total_layer_num {config.total_layer_num}: the model has {total} layers; correct it "
            "or leave it out"
        )
    ids, number = config.random_ltd_layer_id, config.random_ltd_layer_num
    if ids is not None:
        wrong = [one for one in ids if one >= total]
        if wrong:
            raise UserError(
                f"{SECTION}.random_ltd_layer_id: layer {wrong[0]} does not exist; the model has {total} "
                f"layers, 0 to {total - 1}"
            )
        return tuple(sorted(ids))
    if number is None:
        return tuple(range(1, total - 1))
    if number > total:
        raise UserError(f"{SECTION}.random_ltd_layer_num {number}: the model has {total} layers")
    first = (total - number) // 2
    return tuple(range(first, first + number))


def layer_names(config: RandomLtdConfig, inventory: Inventory) -> dict[int, str]:
    """Return the name of each transformer layer that is here, by its number in the whole model.

    Raises:
        UserError: the model has no list of layers, or several.
    """
    stacks: dict[str, dict[int, str]] = {}
    for module in inventory:
        found = _LAYER_LIST.search(module.name)
        if module.layer is not None and found is not None:
            name = module.name[: found.end()]
            stacks.setdefault(name.rpartition(".")[0], {})[module.layer] = name
    if _MEGATRON_LAYERS in stacks:
        return stacks[_MEGATRON_LAYERS]
    fitting = [stack for stack in stacks.values() if len(stack) == config.total_layer_num]
    if len(stacks) > 1 and len(fitting) == 1:
        return fitting[0]
    if len(stacks) > 1:
        lists = ", ".join(f"{name} ({len(stack)} layers)" for name, stack in stacks.items())
        raise UserError(
            f"{SECTION}: the model has several lists of layers: {lists}; say by total_layer_num which one is "
            "meant. Encoders with decoders are not supported"
        )
    return next(iter(stacks.values()), {})


def plan_layers(config: RandomLtdConfig, inventory: Inventory, *, step: int = 0) -> list[Action]:
    """Return one action for each transformer layer that is here, with what it keeps at a step.

    Raises:
        UserError: the section does not fit the model.
    """
    names = layer_names(config, inventory)
    total = inventory.num_layers
    chosen = chosen_layers(config, total)
    length = (
        inventory.model.seq_length if inventory.model is not None else config.random_ltd_schedule.max_value
    )
    return [
        _action(config, name, layer, total, chosen, length, step) for layer, name in sorted(names.items())
    ]


def _action(
    config: RandomLtdConfig,
    name: str,
    layer: int,
    total: int,
    chosen: Sequence[int],
    length: int | None,
    step: int,
) -> Action:
    options = {"layer": layer}
    if layer not in chosen:
        given = config.random_ltd_layer_id is not None
        ends = {0: "first layer", total - 1: "last layer"}
        reason = "not in random_ltd_layer_id" if given else ends.get(layer, "not among the middle layers")
        return Action(name, "skip", reason, options=options)
    if length is None:
        first = config.random_ltd_schedule.min_value
        return Action(name, f"keeps {first} tokens at first", options=options)
    schedule = schedule_of(config.random_ltd_schedule, length)
    kept, end = schedule.kept(step), schedule.full_from
    text = f"keeps {kept} of {length} tokens"
    if kept < schedule.max_value and end is not None:
        last = min(schedule.max_value, length)
        text += f", {'all' if last == length else last} from step {end}"
    return Action(name, text, options={**options, "token_share": kept / length})
