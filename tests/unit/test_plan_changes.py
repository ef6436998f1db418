"""Plans of techniques that change parameters and keep buffers: memory, traffic and totals follow them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.config.base import TechniqueSection
from ds_efficient.core.communication import estimate_communication
from ds_efficient.core.inventory import Inventory, ModelShape, ModuleInfo
from ds_efficient.core.layout import ParallelLayout
from ds_efficient.core.memory import ZeroBuffers, estimate, rank_parameters
from ds_efficient.core.plan import Plan, build_plan
from ds_efficient.core.technique import Action, Evidence, Technique
from ds_efficient.errors import UserError
from ds_efficient.registry import TechniqueRow

SHAPE = ModelShape(4, 64, 4, 256, 32)
INVENTORY = Inventory.from_shape(SHAPE)
LAYERS = [module for module in INVENTORY.linears if module.layer is not None]
WEIGHTS = sum(module.in_features * module.out_features for module in LAYERS)


class CompactSection(TechniqueSection):
    """Section of a technique that exists in this test only."""

    rank: int = 0
    mask_bits: int = 0


def compact(module: ModuleInfo, rank: int = 0, mask_bits: int = 0) -> Action:
    """Return the action that halves a layer's weight, adds adapters and keeps masks."""
    inputs, outputs = module.in_features, module.out_features
    after = module.parameters - inputs * outputs // 2 + rank * (inputs + outputs)
    extra = (rank * outputs, rank * inputs)
    return Action(
        module.name,
        "compact",
        parameters=after,
        extra_parameters=extra if module.tensor_parallel == "out" else extra[::-1],
        buffer_bytes=inputs * outputs * mask_bits // 8,
    )


class Compact(Technique[CompactSection]):
    """Halves the weights of all layers."""

    name = "compact"

    def plan(self, inventory: Inventory) -> Sequence[Action]:
        return [
            Action(module.name, "skip", "output", parameters=0, buffer_bytes=10**9)
            if module.kind == "output"
            else compact(module, self.config.rank, self.config.mask_bits)
            for module in inventory.linears
        ]

    def apply(self, model, actions) -> None:
        raise AssertionError("a plan must not apply")

    def on_step(self, context):
        return {}

    def evidence(self) -> Evidence:
        return Evidence(True, "")


@pytest.fixture
def planned(monkeypatch):
    """Return a function that plans with the technique, or without it (None)."""
    monkeypatch.setitem(sys.modules, "compact_for_test", SimpleNamespace(Compact=Compact))
    row = TechniqueRow("compact", ("compact",), f"{__name__}:CompactSection", "compact_for_test:Compact", "")

    def plan(section: dict[str, Any] | None, world: int, stage: int = 1, **layout: Any) -> Plan:
        config = SimpleNamespace(
            source="ds.json",
            deepspeed={
                "bf16": {"enabled": True},
                "optimizer": {"type": "AdamW"},
                "zero_optimization": {"stage": stage},
            },
            general=SimpleNamespace(seed=1),
            sections={"compact": CompactSection(enabled=True, **(section or {}))},
            enabled=lambda: [] if section is None else [row],
            warnings=[],
        )
        return build_plan(config, SHAPE, world, **layout)

    return plan


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("tensor", [1, 2])
def test_parameters_gradients_and_adam_states_of_changed_layers_halve(planned, tensor, pipeline):
    layout = {"tensor": tensor, "pipeline": pipeline, "global_batch_size": 8}
    world = 2 * tensor * pipeline
    dense, halved = planned(None, world, **layout), planned({}, world, **layout)
    gone = WEIGHTS / 2 / tensor / pipeline  # parameters that a rank no longer holds
    for zero, (before, after) in enumerate(zip(dense.memory, halved.memory, strict=True)):
        assert before.pipeline_stage == after.pipeline_stage
        assert before.parameters - after.parameters == 2 * gone / (2 if zero == 3 else 1)
        assert before.gradients - after.gradients == 2 * gone / (2 if zero >= 2 else 1)
        assert before.optimizer - after.optimizer == 12 * gone / (2 if zero >= 1 else 1)
        assert after.buffers == 0 and after.peak < before.peak
        assert before.activations == after.activations


@pytest.mark.parametrize("stage", range(4))
def test_gradients_and_gathered_parameters_shrink_on_the_wire(planned, stage):
    dense, halved = (planned(section, 2, stage).communication for section in (None, {}))
    sent = 2 * WEIGHTS / 2 / 2  # bytes of the removed elements, half of them sent in one direction
    assert dense.gradients - halved.gradients == sent * (1 if stage == 3 else 2)
    assert dense.parameters - halved.parameters == sent * {0: 0, 1: 1, 2: 1, 3: 2}[stage]
    assert (dense.tensor, dense.pipeline) == (halved.tensor, halved.pipeline)


def test_zero_3_gathers_only_what_is_left(planned):
    dense, halved = (planned(section, 2, 3).memory[3] for section in (None, {}))
    # bucket and gathered parameters, both smaller than DeepSpeed's limits here, in bf16
    assert dense.communication - halved.communication == 2 * 2 * WEIGHTS / 2


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("tensor", [1, 2])
def test_buffers_are_cut_with_the_model_and_not_by_zero(planned, tensor, pipeline):
    layout = {"tensor": tensor, "pipeline": pipeline, "global_batch_size": 8}
    world = 2 * tensor * pipeline
    plain, masked = planned({}, world, **layout), planned({"mask_bits": 2}, world, **layout)
    expected = WEIGHTS * 2 / 8 / tensor / pipeline
    for before, after in zip(plain.memory, masked.memory, strict=True):
        assert after.buffers == expected
        assert after.peak - before.peak == expected
        assert after.resident - before.resident == expected
    assert plain.communication == masked.communication


def test_buffers_of_two_techniques_add_up_and_stay_on_the_device():
    name = LAYERS[0].name
    changed = INVENTORY.with_actions([Action(name, "a", buffer_bytes=100), compact(LAYERS[0], mask_bits=8),
                                      Action(name, "b", buffer_bytes=20)])  # fmt: skip
    assert changed.find(name).buffer_bytes == 120 + LAYERS[0].in_features * LAYERS[0].out_features
    layout = ParallelLayout(world_size=2, zero_stage=3, offload_optimizer="cpu", offload_param="cpu")
    moved = estimate(changed, layout, buffers=ZeroBuffers(1000, max_live=1000))
    assert moved.parameters == 0 and moved.buffers == changed.find(name).buffer_bytes


def test_plan_shows_totals_and_buffers_everywhere(planned):
    plan = planned({"rank": 2, "mask_bits": 2}, 2)
    adapters = sum(2 * (module.in_features + module.out_features) for module in LAYERS)
    assert plan.parameters_after == INVENTORY.total_parameters - WEIGHTS // 2 + adapters
    assert plan.memory[1].parameters == 2 * plan.parameters_after
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert sum(module["parameters_after"] for module in data["modules"]) == data["parameters_after"]
    assert data["memory"]["3"]["buffers"] == WEIGHTS // 4
    action = next(one for one in data["techniques"]["compact"] if one["module"] == LAYERS[0].name)
    assert action["extra_parameters"] == [128, 128] and action["buffer_bytes"] > 0
    row = next(line for line in plan.text().splitlines() if line.startswith("buffers of techniques"))
    assert row.split()[3:5] == ["48", "KiB"]
    assert "buffers of techniques" not in planned({}, 2).text()


def _tensors_of_a_layer(rank: int, tensor: int) -> int:
    """Count one rank's elements of a compact layer with adapters from the shapes of its tensors."""
    column = {"qkv": (192 // tensor, 64), "fc1": (256 // tensor, 64)}
    row = {"proj": (64, 64 // tensor), "fc2": (64, 256 // tensor)}
    held = sum(o * i // 2 + o + o * rank + rank * i for o, i in (*column.values(), *row.values()))
    return held + 2 * (64 + 64)  # the norms


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_a_rank_holds_its_part_of_weights_and_adapters(tensor, pipeline):
    changed = INVENTORY.with_actions(compact(module, rank=3) for module in LAYERS)
    layout = ParallelLayout(world_size=tensor * pipeline, tensor=tensor, pipeline=pipeline)
    layers = SHAPE.num_layers // pipeline * _tensors_of_a_layer(3, tensor)
    words, positions, final_norm = 256 * 64 // tensor, 32 * 64, 2 * 64
    if pipeline == 1:
        assert rank_parameters(changed, layout, 0) == layers + words + positions + final_norm
    else:
        held = [rank_parameters(changed, layout, stage) for stage in range(2)]
        assert held == [layers + words + positions, layers + words + final_norm]


@settings(deadline=None, max_examples=60)
@given(
    tensor=st.sampled_from([1, 2, 4]), rank=st.integers(0, 8), stage=st.integers(0, 3),
    chosen=st.sets(st.integers(0, len(LAYERS) - 1)),
)  # fmt: skip
def test_changes_cost_what_the_totals_say(tensor, rank, stage, chosen):
    """Ranks together hold all parameters, those of `whole_parameters` once each."""
    actions = [compact(LAYERS[place], rank * 4) for place in sorted(chosen)]
    changed = INVENTORY.with_actions(actions)
    difference = sum(action.parameters - INVENTORY.find(action.module).parameters for action in actions)
    assert changed.total_parameters - INVENTORY.total_parameters == difference
    for action in actions:
        module = changed.find(action.module)
        bias = module.out_features if module.tensor_parallel == "in" else 0
        whole = bias + action.extra_parameters[1]
        assert module.rank_parameters(tensor) * tensor == module.parameters + (tensor - 1) * whole
    layout = ParallelLayout(world_size=2 * tensor, tensor=tensor, zero_stage=stage)
    held = rank_parameters(changed, layout, 0)
    found = estimate(changed, layout)
    assert found.parameters == 4 * held / (2 if stage == 3 else 1)
    assert estimate_communication(changed, layout).gradients == 4 * held * (0.5 if stage == 3 else 1)


def test_layers_that_are_not_cut_keep_all_of_it_on_each_rank():
    module = ModuleInfo("fc", "linear", None, 8, 4, True, 36)
    (changed,) = Inventory((module,)).with_actions([compact(module, rank=1, mask_bits=8)])
    assert changed.rank_parameters(2) == changed.parameters == 16 + 4 + 12
    assert changed.rank_buffer_bytes(2) == 32


def test_sizes_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="negative"):
        Action("fc", "shrink", parameters=-1)
    with pytest.raises(ValueError, match="negative"):
        Action("fc", "mask", buffer_bytes=-1)
    with pytest.raises(ValueError, match=r"\(3, 4\) are more than parameters = 6"):
        Action("fc", "grow", parameters=6, extra_parameters=(3, 4))
    with pytest.raises(ValueError, match="more than parameters = None"):
        Action("fc", "grow", extra_parameters=(3, 4))


def test_sizes_that_contradict_the_module_are_refused():
    layer = LAYERS[0]
    bare = Action(layer.name, "prune", parameters=layer.out_features - 1)
    with pytest.raises(ValueError, match="do not hold the bias"):
        INVENTORY.with_actions([bare])
    with pytest.raises(ValueError, match="module without parameters"):
        INVENTORY.with_actions([Action("decoder.layers.1", "mask", buffer_bytes=1)])
    with pytest.raises(ValueError, match=r"output_layer: its weight is that of embedding\.word_embeddings"):
        INVENTORY.with_actions([Action("output_layer", "prune", parameters=100)])
    with pytest.raises(ValueError, match="another module uses its weight"):
        INVENTORY.with_actions([Action("embedding.word_embeddings", "prune", parameters=100)])
    low_rank = Action("output_layer", "adapt", parameters=10, extra_parameters=(4, 6))
    assert INVENTORY.with_actions([low_rank]).find("output_layer").rank_parameters(2) == 2 + 6


def test_two_techniques_that_change_one_module_are_refused_by_name():
    once = compact(LAYERS[0])
    with pytest.raises(UserError, match=r'linear_proj: "compact" and "widen" both change its parameters'):
        INVENTORY.with_actions([once, replace(once, action="widen")])
    skipped = replace(once, action="skip")
    assert INVENTORY.with_actions([once, skipped]) == INVENTORY.with_actions([once])


def test_executed_flops_of_a_run_follow_the_actions_of_all_stages(monkeypatch):
    """Each stage knows its own layers, numbered from 0; the log has the sum of all."""
    import torch.distributed as dist
    from pretraining.setup import executed_flops

    from ds_efficient.core.flops import executed_flops_per_token

    share = {"matmul_share": {"forward": 0.5, "input_gradient": 0.5}}

    def acted(layer: int, module: str = "mlp.linear_fc1") -> Action:
        return Action(f"decoder.layers.{layer}.{module}", "sparse", options=share)

    whole_layer = Action("decoder.layers.1", "drop tokens", options={"token_share": 0.5})
    of_stage = [
        {"a": [acted(0), acted(1)], "b": [whole_layer]},  # layers 0 and 1 of the model
        {"a": [acted(0, "self_attention.linear_qkv"), Action("output_layer", "skip", "excluded")], "b": []},
    ]  # fmt: skip
    of_model = [acted(0), acted(1), whole_layer, acted(2, "self_attention.linear_qkv")]
    expected = executed_flops_per_token(SHAPE, pipeline_parallel=2, actions=of_model).total
    options = {name: None for name in ("granularity", "method", "num_layers", "modules")}
    args = SimpleNamespace(**{f"recompute_{name}": value for name, value in options.items()})
    monkeypatch.setattr(dist, "get_world_size", lambda: 6)  # 2 stages on 3 ranks each
    own: list[float] = []

    def run(stage: int, stages: int, actions: dict[str, list[Action]]) -> float:
        args.pipeline_model_parallel_size = stages
        layers = [SimpleNamespace(layer_number=2 * stage + 1)]
        engine = SimpleNamespace(
            ds_efficient=SimpleNamespace(actions_now=lambda: actions),
            module=SimpleNamespace(decoder=SimpleNamespace(layers=layers)),
        )
        return executed_flops(args, SHAPE, engine, None)

    monkeypatch.setattr(dist, "all_reduce", lambda box, group: own.append(float(box)))
    for stage in range(2):
        run(stage, 2, of_stage[stage])
    monkeypatch.setattr(dist, "all_reduce", lambda box, group: box.fill_(3 * sum(own)))
    assert [run(stage, 2, of_stage[stage]) for stage in range(2)] == pytest.approx([expected] * 2)
    monkeypatch.setattr(dist, "all_reduce", None)
    assert run(0, 1, {"a": of_model}) == expected < executed_flops_per_token(SHAPE).total
    assert run(0, 2, {}) == executed_flops_per_token(SHAPE).total
