"""What random-LTD plans for a model: which layers, how many tokens, what it costs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ds_efficient
from ds_efficient.config import load_config
from ds_efficient.core.flops import executed_flops_per_token, model_flops_per_token
from ds_efficient.core.inventory import Inventory, ModelShape
from ds_efficient.core.technique import Action, RunContext, StepContext
from ds_efficient.errors import UserError
from ds_efficient.random_ltd.config import RandomLtdConfig
from ds_efficient.random_ltd.layers import chosen_layers, plan_layers
from ds_efficient.random_ltd.positions import Places, gather_argument, gather_mask
from ds_efficient.random_ltd.technique import RandomLtdTechnique

SHAPE = ModelShape(6, 64, 4, 256, 32)


def raw(**values: Any) -> dict[str, Any]:
    schedule = {"min_value": 8, "schedule_config": {"require_steps": 12, "seq_per_step": 8}}
    section = {"enabled": True, "random_ltd_schedule": schedule, **values}
    return {"data_efficiency": {"enabled": True, "data_routing": {"enabled": True, "random_ltd": section}}}


def section(**values: Any) -> RandomLtdConfig:
    return load_config(raw(**values)).sections["random_ltd"]  # type: ignore[return-value]


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class Model(nn.Module):
    """Blocks in a list."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_the_plan_names_every_layer_with_what_it_keeps() -> None:
    actions = plan_layers(section(), Inventory.from_shape(SHAPE))
    assert [action.module for action in actions] == [f"decoder.layers.{number}" for number in range(6)]
    assert [action.reason for action in actions] == ["first layer", "", "", "", "", "last layer"]
    for action in actions[1:5]:
        assert action.action == "keeps 8 of 32 tokens, all from step 12"
        assert action.options["token_share"] == 0.25
    later = plan_layers(section(), Inventory.from_shape(SHAPE), step=5)
    assert later[1].action == "keeps 16 of 32 tokens, all from step 12"
    done = plan_layers(section(), Inventory.from_shape(SHAPE), step=12)
    assert done[1].action == "keeps 32 of 32 tokens" and done[1].options["token_share"] == 1.0


def test_a_schedule_with_an_end_of_its_own_says_so() -> None:
    schedule = {"min_value": 8, "max_value": 24, "schedule_config": {"require_steps": 12, "seq_per_step": 8}}
    actions = plan_layers(section(random_ltd_schedule=schedule), Inventory.from_shape(SHAPE))
    assert actions[1].action == "keeps 8 of 32 tokens, 24 from step 12"
    constant = {"min_value": 8, "schedule_type": "constant"}
    actions = plan_layers(section(random_ltd_schedule=constant), Inventory.from_shape(SHAPE))
    assert actions[1].action == "keeps 8 of 32 tokens"


def test_the_plan_counts_flops_of_the_kept_tokens() -> None:
    """Linear layers by the share, attention by its square, in four of six layers."""
    plan = ds_efficient.build_plan(load_config(raw()), SHAPE)
    dense = executed_flops_per_token(SHAPE)
    share = (2 + 4 * 0.25) / 6
    assert plan.executed_flops.mlp == pytest.approx(dense.mlp * share)
    assert plan.executed_flops.attention == pytest.approx(dense.attention * (2 + 4 * 0.25**2) / 6)
    assert plan.executed_flops.logits == dense.logits
    assert plan.model_flops.total == model_flops_per_token(SHAPE).total
    memory = ds_efficient.build_plan(load_config({}), SHAPE).memory[0]
    assert plan.memory[0].peak == memory.peak  # at the end of the schedule nothing is dropped


@given(total=st.integers(1, 60), number=st.none() | st.integers(1, 60))
@settings(deadline=None)
def test_layers_are_chosen_from_the_middle(total: int, number: int | None) -> None:
    config = RandomLtdConfig.model_validate({} if number is None else {"random_ltd_layer_num": number})
    if number is not None and number > total:
        with pytest.raises(UserError, match=f"random_ltd_layer_num {number}: the model has {total} layers"):
            chosen_layers(config, total)
        return
    chosen = chosen_layers(config, total)
    assert len(chosen) == (max(0, total - 2) if number is None else number)
    assert list(chosen) == sorted(set(chosen)) and all(0 <= layer < total for layer in chosen)
    if chosen:
        assert abs(chosen[0] - (total - 1 - chosen[-1])) <= 1
        assert chosen[-1] - chosen[0] + 1 == len(chosen)


def test_a_pipeline_stage_plans_its_layers_by_their_numbers_in_the_whole_model() -> None:
    whole = Inventory.from_shape(SHAPE)
    stage = Inventory(tuple(m for m in whole if m.layer is None or m.layer >= 3), SHAPE)
    actions = plan_layers(section(), stage)
    assert [action.options["layer"] for action in actions] == [3, 4, 5]
    assert [action.skipped for action in actions] == [False, False, True]
    technique = RandomLtdTechnique(section(), RunContext())
    technique.plan(stage)
    assert "4 of 6 layers drop tokens" in technique.evidence().summary


def test_a_model_with_two_lists_of_layers_needs_to_be_told_which() -> None:
    model = nn.ModuleDict({"encoder": Model(3), "decoder": Model(5)})
    with pytest.raises(UserError, match=r"encoder\.blocks \(3 layers\), decoder\.blocks \(5 layers\)"):
        plan_layers(section(), Inventory.from_model(model))
    chosen = plan_layers(section(total_layer_num=5), Inventory.from_model(model))
    assert [action.module for action in chosen if not action.skipped] == [
        f"decoder.blocks.{number}" for number in (1, 2, 3)
    ]


def test_a_model_without_layers_or_with_two_only_is_refused() -> None:
    technique = RandomLtdTechnique(section(), RunContext())
    for model, part in ((nn.Linear(4, 4), "no list of layers"), (Model(2), "the model has 2 layers")):
        with pytest.raises(UserError, match=part):
            technique.apply(model, technique.plan(Inventory.from_model(model)))


def test_a_pipeline_stage_without_layers_takes_part() -> None:
    stage = Inventory((), SHAPE)
    technique = RandomLtdTechnique(section(), RunContext(pipeline_parallel_size=2))
    model = nn.Linear(4, 4)
    technique.apply(model, technique.plan(stage))
    technique.before_step(StepContext(0))
    assert technique.on_step(StepContext(1))["layer_tokens"] == 0
    assert "4 of 6 layers drop tokens, 0 of them here" in technique.evidence().summary


def test_a_run_without_a_distributed_group_counts_and_proves_what_it_dropped() -> None:
    model = Model().train()
    technique = RandomLtdTechnique(section(), RunContext(seed=3))
    actions: list[Action] = list(technique.plan(Inventory.from_model(model)))
    technique.apply(model, actions)
    assert not technique.evidence().acted and technique.evidence().due
    for step, kept in enumerate((8, 8, 8, 8, 16)):
        model(torch.randn(2, 32, 16)).sum().backward()
        technique.before_step(StepContext(step))
        technique.before_step(StepContext(step))  # announced twice, counted once
        metrics = technique.on_step(StepContext(step + 1))
        assert metrics["kept_tokens"] == kept
        assert metrics["layer_tokens_of_step"] == 2 * (2 * kept + 2 * 32)
    proof = technique.evidence()
    assert proof.acted and proof.counts["dropped_by_layer_1"] == 2 * (4 * 24 + 16)
    assert proof.counts["layers_dropped"] == 2
    assert technique.actions_now(actions)[1].options["token_share"] == 0.5
    other = RandomLtdTechnique(section(), RunContext(seed=3))
    fresh = Model()
    other.apply(fresh, other.plan(Inventory.from_model(fresh)))
    other.load_state_dict(technique.state_dict())
    assert other.consumed_layer_tokens == technique.consumed_layer_tokens == metrics["layer_tokens"]


# ---- masks and positions ----


@st.composite
def kept_places(draw: st.DrawFn) -> Places:
    length, batch = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    kept = draw(st.integers(1, length))
    rows = [sorted(draw(st.permutations(range(length)))[:kept]) for _ in range(batch)]
    return Places(torch.tensor(rows), length, draw(st.booleans()), "layer")


@given(places=kept_places(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_masks_of_every_shape_hold_the_pairs_of_kept_tokens(places: Places, data: st.DataObject) -> None:
    length, batch = places.length, places.batch
    samples, heads = data.draw(st.sampled_from([1, batch])), data.draw(st.integers(1, 3))
    rows, columns = data.draw(st.sampled_from([1, length])), data.draw(st.sampled_from([1, length]))
    mask = torch.arange(samples * heads * rows * columns).view(samples, heads, rows, columns)
    found = gather_mask(mask, places)
    for sample in range(batch):
        of_sample = mask[sample if samples > 1 else 0]
        index = places.index[sample]
        expected = of_sample[:, index] if rows > 1 else of_sample
        expected = expected[:, :, index] if columns > 1 else expected
        assert torch.equal(found[sample if found.shape[0] > 1 else 0], expected)


def test_arguments_are_gathered_by_what_they_are() -> None:
    index = torch.tensor([[0, 2], [1, 3]])
    places = Places(index, 4, True, "layer")
    ids = torch.arange(4)[None]
    assert torch.equal(gather_argument("position_ids", ids, places), index)
    assert torch.equal(gather_argument("position_ids", ids.expand(3, 1, 4), places), index.expand(3, 2, 2))
    cos = torch.arange(8.0).view(1, 4, 2)
    found = gather_argument("position_embeddings", (cos, cos + 1), places)
    assert torch.equal(found[0], cos[0][index]) and torch.equal(found[1], cos[0][index] + 1)
    assert torch.equal(
        gather_argument("attention_mask", torch.arange(8).view(2, 4), places)[1], torch.tensor([5, 7])
    )
    alibi = torch.arange(24).view(6, 1, 4)  # (batch * heads, 1, s)
    assert torch.equal(gather_argument("alibi", alibi, places)[4, 0], alibi[4, 0][index[1]])
    seq_first = Places(index, 4, False, "layer")
    angles = torch.arange(8.0).view(4, 1, 1, 2)
    assert torch.equal(gather_argument("rotary_pos_emb", angles, seq_first)[1, 0, 0], angles[2, 0, 0])
    cross = torch.arange(24).view(1, 1, 4, 6)
    assert torch.equal(gather_argument("encoder_attention_mask", cross, places)[1, 0], cross[0, 0][index[1]])
    states = torch.zeros(2, 9, 5)
    assert gather_argument("encoder_hidden_states", states, places) is states
    assert gather_argument("use_cache", True, places) is False
    assert gather_argument("output_attentions", False, places) is False
    with pytest.raises(UserError, match="does not know"):
        gather_argument("mystery", {"inner": torch.zeros(2, 4)}, places)
