"""The plan of a run: what happens to each layer, and what it costs, before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ds_efficient.core.apply import build_techniques, gradient_precision
from ds_efficient.core.communication import CommunicationEstimate, estimate_communication
from ds_efficient.core.flops import FlopCount, executed_flops_per_token, model_flops_per_token
from ds_efficient.core.inventory import Inventory
from ds_efficient.core.layout import ParallelLayout
from ds_efficient.core.memory import Activations, MemoryEstimate, ZeroBuffers, estimate_stages
from ds_efficient.core.parallelism import check, require, warnings
from ds_efficient.core.shape import ModelShape
from ds_efficient.core.technique import Action, Outlook, RunContext, Technique

if TYPE_CHECKING:
    import torch

    from ds_efficient.config import EfficiencyConfig


@dataclass(frozen=True)
class Plan:
    """What a run will do and need.

    Attributes:
        source: name of the configuration.
        layout: parallel sizes, ZeRO, precision, batches.
        inventory: modules of the whole model, dense.
        changed: the inventory after the techniques, which memory and communication follow.
        actions: what each enabled technique does, by its name.
        outlooks: what those that change over time save over the run, by their names.
        memory: estimates for ZeRO 0 to 3; the one of ``layout.zero_stage`` is the run's.
        stage_problems: for each ZeRO stage, why it does not run with this layout; empty: it runs.
        model_flops, executed_flops: per token, forward and backward (`ds_efficient.core.flops`).
        communication: bytes sent by a rank in one optimizer step.
        warnings: what runs but is hardly meant.
    """

    source: str
    layout: ParallelLayout
    inventory: Inventory
    changed: Inventory
    actions: Mapping[str, Sequence[Action]]
    outlooks: Mapping[str, Outlook]
    memory: Sequence[MemoryEstimate]
    stage_problems: Sequence[Sequence[str]]
    model_flops: FlopCount
    executed_flops: FlopCount
    communication: CommunicationEstimate
    warnings: Sequence[str]

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one optimizer step; None where the sequence length is not known."""
        model = self.inventory.model
        return None if model is None else self.layout.global_batch * model.seq_length

    @property
    def parameters_after(self) -> int:
        """Parameters once the techniques have changed the model."""
        return self.changed.total_parameters

    def text(self) -> str:
        """Return the plan as a readable text; layers with equal rows are folded into one."""
        from ds_efficient.core.plan_text import plan_text

        return plan_text(self)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values for `json.dumps`: bytes, FLOPs per token, parameters."""
        model = self.inventory.model
        modules = [
            {
                "name": module.name,
                "kind": module.kind,
                "layer": module.layer,
                "in_features": module.in_features,
                "out_features": module.out_features,
                "parameters": module.parameters,
                "parameters_after": after.parameters,
            }
            for module, after in zip(self.inventory, self.changed, strict=True)
        ]
        return {
            "source": self.source,
            "model": None if model is None else asdict(model),
            "layout": {**asdict(self.layout), "data": self.layout.data},
            "parameters": self.inventory.total_parameters,
            "parameters_after": self.parameters_after,
            "tokens_per_step": self.tokens_per_step,
            "modules": modules,
            "techniques": {
                name: [{**asdict(action), "options": dict(action.options)} for action in actions]
                for name, actions in self.actions.items()
            },
            "outlooks": {
                name: {"summary": found.summary, **found.numbers} for name, found in self.outlooks.items()
            },
            "memory": {
                str(found.zero_stage): {**found.to_json(), "problems": list(problems)}
                for found, problems in zip(self.memory, self.stage_problems, strict=True)
            },
            "model_flops_per_token": self.model_flops.to_json(),
            "executed_flops_per_token": self.executed_flops.to_json(),
            "communication": self.communication.to_json(),
            "warnings": list(self.warnings),
        }


def _inventory_of(model: torch.nn.Module | ModelShape | Inventory) -> Inventory:
    if isinstance(model, Inventory):
        return model
    return Inventory.from_shape(model) if isinstance(model, ModelShape) else Inventory.from_model(model)


def _techniques(
    config: EfficiencyConfig, layout: ParallelLayout, total_steps: int | None
) -> list[Technique[Any]]:
    context = RunContext(
        seed=config.general.seed,
        total_steps=total_steps,
        data_parallel_size=layout.data,
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        zero_stage=layout.zero_stage,
        micro_batch_size=layout.micro_batch_size,
        micro_batches=layout.num_microbatches,
        gradient_precision=gradient_precision(config.deepspeed, layout.precision),
    )
    return build_techniques(config, context)


def _all_warnings(config: EfficiencyConfig, layout: ParallelLayout, inventory: Inventory) -> list[str]:
    found = [*config.warnings, *warnings(layout)]
    if inventory.model is None:
        found.append(
            "the model's shape is not known: activations, logits, attention FLOPs and the traffic of "
            "tensor and pipeline parallelism are not counted"
        )
    return found


def build_plan(
    config: EfficiencyConfig | Mapping[str, Any] | str | os.PathLike[str],
    model_or_shapes: torch.nn.Module | ModelShape | Inventory,
    world_size: int = 1,
    *,
    activations: Activations | None = None,
    total_steps: int | None = None,
    **layout_options: Any,
) -> Plan:
    """Plan a run: no device, no process group, nothing allocated.

    Args:
        config: from `load_config`, or what it takes.
        model_or_shapes: a module (of any device, ``meta`` included), the shape of a GPT, or an inventory.
        world_size: ranks.
        activations: attention kernel and dropout, for the memory estimate.
        total_steps: optimizer steps of the run, for techniques with a schedule.
        layout_options: fields of `ParallelLayout` (``tensor=2``, ``pipeline=2``, ``sequence_parallel=True``,
            ``micro_batch_size=4``, ``recompute=Recompute("full")``...).

    Returns:
        The plan.

    Raises:
        ConfigError: every problem of the configuration.
        UserError: every reason why the layout does not run; or two techniques that change one module's
            parameters.
    """
    if isinstance(config, Mapping | str | os.PathLike):
        from ds_efficient.config import load_config

        config = load_config(config)
    deepspeed = config.deepspeed
    inventory = _inventory_of(model_or_shapes)
    layout = ParallelLayout.from_config(deepspeed, inventory.model, world_size=world_size, **layout_options)
    require(layout)
    techniques = _techniques(config, layout, total_steps)
    actions = {technique.name: list(technique.plan(inventory)) for technique in techniques}
    outlooks = {technique.name: technique.outlook(inventory) for technique in techniques}
    every = [action for group in actions.values() for action in group]
    changed = inventory.with_actions(every)
    settings = activations or Activations()
    settings = replace(settings, kept=Activations.with_actions(every).kept)
    return Plan(
        source=config.source,
        layout=layout,
        inventory=inventory,
        changed=changed,
        actions=actions,
        outlooks={name: found for name, found in outlooks.items() if found is not None},
        memory=estimate_stages(
            changed, layout, buffers=ZeroBuffers.from_config(deepspeed), settings=settings
        ),
        stage_problems=[check(_at_stage(layout, stage)) for stage in range(4)],
        model_flops=model_flops_per_token(inventory),
        executed_flops=executed_flops_per_token(
            inventory,
            recompute=layout.recompute,
            pipeline_parallel=layout.pipeline,
            actions=every,
            attention=settings.attention,
            causal=settings.attention == "fused",
        ),
        communication=estimate_communication(changed, layout, deepspeed),
        warnings=_all_warnings(config, layout, inventory),
    )


def _at_stage(layout: ParallelLayout, stage: int) -> ParallelLayout:
    """Return the layout at another ZeRO stage, as `estimate_stages` takes it."""
    return replace(
        layout,
        zero_stage=stage,
        offload_optimizer=layout.offload_optimizer if stage else None,
        offload_param=layout.offload_param if stage == 3 else None,
    )
