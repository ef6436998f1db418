"""What RMM plans for a model, and what becomes of the model: layers, reasons, savings, FLOPs, refusals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from ds_efficient.config import load_config
from ds_efficient.core.inventory import Inventory, ModelShape
from ds_efficient.core.plan import build_plan
from ds_efficient.core.technique import Action, RunContext, StepContext
from ds_efficient.errors import UserError
from ds_efficient.rmm.config import RmmConfig
from ds_efficient.rmm.layers import plan_layers
from ds_efficient.rmm.linear import RandomizedLinear
from ds_efficient.rmm.technique import RmmTechnique

SHAPE = ModelShape(2, 1024, 16, 50304, 2048)


def section(**values: Any) -> RmmConfig:
    return load_config({"rmm": {"enabled": True, **values}}).sections["rmm"]


def planned(micro_batch: int | None = 4, **values: Any) -> dict[str, Action]:
    context = RunContext(micro_batch_size=micro_batch)
    actions = plan_layers(section(**values), context, Inventory.from_shape(SHAPE))
    return {action.module: action for action in actions}


def reasons(actions: Iterable[Action]) -> dict[str, str]:
    return {action.module: action.reason for action in actions if action.skipped}


FC1, PROJ = "decoder.layers.1.mlp.linear_fc1", "decoder.layers.1.self_attention.linear_proj"


def test_the_input_that_attention_keeps_is_left_exact_unless_named() -> None:
    actions = planned()
    assert sum(not action.skipped for action in actions.values()) == 6
    assert actions[PROJ].reason == "its input is kept by attention"
    assert actions["output_layer"].reason == "excluded"
    named = planned(modules=["linear_proj", "linear_fc1"])
    assert not named[PROJ].skipped and not named[FC1].skipped
    assert named["decoder.layers.0.mlp.linear_fc2"].reason == "not in modules"


def test_savings_are_those_of_blocks_and_of_the_fewest_rows() -> None:
    assert planned()[FC1].saved_activation_fraction == 7 / 8
    assert planned()[FC1].action == "gaussian 64 of every 512 rows"
    assert planned(sketch="rows", block_size=0)[FC1].action == "rows 1024 of 8192 rows"
    assert planned(ratio=0.13)[FC1].saved_activation_fraction == 1 - 72 / 512  # 66.56, rounded up to 8
    few = planned(micro_batch=None, min_rows=1024)[FC1]  # 2048 rows at least
    assert few.saved_activation_fraction == 0.5
    none = planned(micro_batch=None, min_rows=4096)[FC1]
    assert none.saved_activation_fraction == 0 and none.action == "gaussian all 2048 rows"
    auto = planned(ratio="auto", variance_interval=10)[FC1]
    assert auto.action == "gaussian auto, at first 64 of every 512 rows"


@pytest.mark.parametrize(
    ("sketch", "each"), [("gaussian", 64), ("rademacher", 64), ("srht", 4.5), ("count", 0), ("rows", 0)]
)
def test_flops_count_the_sketches_of_both_sides(sketch: str, each: float) -> None:
    """2 B p (in + out) for the projections with S of p columns a block, 2 (B / 8) in out for the product."""
    share = planned(sketch=sketch)[FC1].options["matmul_share"]
    assert (share["forward"], share["input_gradient"]) == (1, 1)
    assert share["weight_gradient"] == pytest.approx(1 / 8 + each * (1024 + 4096) / (1024 * 4096))
    exact = planned(sketch=sketch, ratio=1.0)[FC1].options["matmul_share"]
    assert exact["weight_gradient"] == 1


def test_the_plan_of_a_run_has_fewer_activations_and_flops() -> None:
    batch = {"train_batch_size": 4}
    plans = [
        build_plan({**batch, **sections}, SHAPE, micro_batch_size=4)
        for sections in ({}, {"rmm": {"enabled": True, "ratio": 0.125}})
    ]
    exact, sketched = (plan.memory[0].activations for plan in plans)
    inputs = 4 * 2048 * 2 * (1024 + 1024 + 4096) * 4  # of qkv, fc1, fc2 in both layers, fp32
    assert exact - sketched == inputs * 7 / 8
    assert plans[1].executed_flops.total < plans[0].executed_flops.total
    assert plans[1].parameters_after == plans[0].parameters_after
    assert "its input is kept by attention" in plans[1].text()


class Own(nn.Linear):
    """A kind of layer that computes who knows what."""


class Model(nn.Module):
    """Layers in a list, one used twice, an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(3)
        )
        self.layers[2]["up"] = self.layers[0]["up"]
        self.lm_head = nn.Linear(8, 64)


def applied(model: nn.Module, **values: Any) -> RmmTechnique:
    technique = RmmTechnique(section(**{"modules": ["up", "down"], **values}), RunContext(seed=3))
    technique.apply(model, list(technique.plan(Inventory.from_model(model))))
    return technique


def test_layers_are_replaced_wherever_they_are_used_and_keep_their_parameters() -> None:
    model = Model()
    before = dict(model.named_parameters())
    technique = applied(model)
    assert model.layers[2]["up"] is model.layers[0]["up"]
    assert isinstance(model.layers[0]["up"], RandomizedLinear) and type(model.lm_head) is nn.Linear
    assert sorted(technique.sketches) == [
        "layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up", "layers.2.down",
    ]  # fmt: skip
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert len({sketch.key.value for sketch in technique.sketches.values()}) == 5


def test_steps_count_on_and_micro_batches_begin_again() -> None:
    model = Model()
    technique = applied(model, ratio=0.5, min_rows=8, block_size=32)
    layer, x = model.layers[1]["up"], torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def gradient() -> torch.Tensor:
        layer.zero_grad()
        layer(x).square().sum().backward()
        return layer.weight.grad.clone()

    first, second = gradient(), gradient()
    metrics = technique.on_step(StepContext(step=1))
    assert metrics == {"layers": 1.0, "ratio": 0.5, "saved_bytes": 32 * 8 * 4.0}
    third = gradient()
    technique.on_step(StepContext(step=0))
    assert torch.equal(gradient(), first) and torch.equal(gradient(), second)
    assert not torch.equal(first, second) and not torch.equal(first, third)


def test_names_that_no_layer_has_are_answered_with_the_names_there_are() -> None:
    with pytest.raises(
        UserError, match=r"linear_qkv.*no linear layer is projected.*called down, lm_head, up"
    ):
        applied(Model(), modules=["linear_qkv"])


def test_kinds_of_layers_that_cannot_be_replaced_are_refused_before_any_is() -> None:
    model = Model()
    model.layers[2]["down"] = Own(16, 8)
    with pytest.raises(UserError, match=r"rmm: layers\.2\.down: .*Own is not supported.*rmm\.exclude"):
        applied(model)
    assert type(model.layers[0]["up"]) is nn.Linear
    model = Model()
    model.layers[1]["up"].weight = model.layers[1]["down"].weight = nn.Parameter(torch.zeros(16, 16))
    actions = plan_layers(section(modules=["up", "down"]), RunContext(), Inventory.from_model(model))
    assert {"layers.1.up", "layers.1.down"} & reasons(actions).keys()


def test_chosen_ratios_are_saved_with_the_run() -> None:
    auto = {"ratio": "auto", "variance_interval": 1}
    technique, other = applied(Model(), **auto), applied(Model(), **auto)
    technique.sketches["layers.1.up"].ratio = 0.5
    other.load_state_dict(technique.state_dict())
    assert other.sketches["layers.1.up"].ratio == 0.5
    assert other.sketches["layers.0.up"].ratio == 0.125
    fixed = applied(Model(), ratio=0.25)
    fixed.load_state_dict(technique.state_dict())  # a number in the configuration stands
    assert fixed.sketches["layers.1.up"].ratio == 0.25
