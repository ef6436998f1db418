"""Builds the enabled techniques from the table and applies them to a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ds_efficient.core.technique import Action, RunContext, Technique
from ds_efficient.registry import resolve

if TYPE_CHECKING:
    import torch

    from ds_efficient.config import EfficiencyConfig
    from ds_efficient.core.inventory import Inventory

logger = logging.getLogger(__name__)


def build_techniques(config: EfficiencyConfig, context: RunContext) -> list[Technique[Any]]:
    """Return one object for each enabled technique, in the order of the table."""
    techniques = []
    for row in config.enabled():
        assert row.technique is not None, "load_config refuses sections without a technique"
        techniques.append(resolve(row.technique)(config.sections[row.name], context))
    return techniques


def gradient_precision(deepspeed: Mapping[str, Any], precision: str) -> str:
    """Return the type in which gradients are summed and reduced: ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Args:
        deepspeed: the JSON.
        precision: of the training, in the same words.
    """
    types = deepspeed.get("data_types")
    return str((types.get("grad_accum_dtype") if isinstance(types, Mapping) else None) or precision)


def apply_techniques(
    model: torch.nn.Module, techniques: Sequence[Technique[Any]], inventory: Inventory
) -> Mapping[str, Sequence[Action]]:
    """Plan and apply each technique; log one line for each.

    Returns:
        The actions by technique.
    """
    done: dict[str, Sequence[Action]] = {}
    for technique in techniques:
        actions = list(technique.plan(inventory))
        technique.apply(model, actions)
        done[technique.name] = actions
        logger.info("%s", summary(technique.name, actions))
    return done


def summary(name: str, actions: Sequence[Action]) -> str:
    """Return a line like ``slope: 48 of 50 modules (skipped: 1 excluded, 1 in_features 50 not ...)``."""
    skipped: dict[str, int] = {}
    for action in actions:
        if action.skipped:
            skipped[action.reason] = skipped.get(action.reason, 0) + 1
    applied = sum(not action.skipped for action in actions)
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    return f"{name}: {applied} of {len(actions)} modules" + (f" (skipped: {reasons})" if reasons else "")
