"""What MKOR plans, how work is spread over ranks, and how shards become matrices and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_efficient.config import load_config
from ds_efficient.core.deepspeed_gradients import AveragedGradients
from ds_efficient.core.inventory import Inventory, ModelShape
from ds_efficient.core.plan import build_plan
from ds_efficient.core.technique import RunContext
from ds_efficient.errors import CheckpointError, UnsupportedVersion, UserError
from ds_efficient.mkor.blocks import (
    Block,
    Layer,
    Piece,
    Segment,
    assemble,
    assign_owners,
    make_blocks,
    make_rounds,
    shard_rows,
    take_apart,
)
from ds_efficient.mkor.config import MkorConfig
from ds_efficient.mkor.layers import factor_bytes, plan_layers
from ds_efficient.mkor.technique import MkorTechnique

SHAPE = ModelShape(2, 1024, 16, 50304, 2048)
FC1, QKV = "decoder.layers.1.mlp.linear_fc1", "decoder.layers.0.self_attention.linear_qkv"


def section(**values: Any) -> MkorConfig:
    return load_config({"mkor": {"enabled": True, **values}}).sections["mkor"]


def test_all_linear_layers_but_the_vocabulary_are_planned_with_their_memory() -> None:
    inventory = Inventory.from_shape(SHAPE)
    actions = {a.module: a for a in plan_layers(section(), RunContext(), inventory)}
    assert sum(not action.skipped for action in actions.values()) == 8
    assert actions["output_layer"].reason == "excluded"
    assert actions[FC1].buffer_bytes == 4 * (4096**2 + 1025**2)
    spread = {a.module: a for a in plan_layers(section(), RunContext(data_parallel_size=4), inventory)}
    assert spread[FC1].buffer_bytes == actions[FC1].buffer_bytes // 4
    right = section(sides="right", state_dtype="bf16")
    assert factor_bytes(inventory.find(FC1), right, RunContext()) == 2 * 1025**2
    low = section(form="factored", max_rank=16)
    assert factor_bytes(inventory.find(FC1), low, RunContext()) < 4 * 4096**2 / 50
    kept = plan_layers(section(exclude=["linear_fc1"]), RunContext(), inventory)
    assert [a.reason for a in kept if a.module == FC1] == ["excluded"]
    assert [a.reason for a in kept if a.module == "output_layer"] == ["projection onto the vocabulary"]


def test_shards_of_their_own_need_less_memory() -> None:
    inventory = Inventory.from_shape(SHAPE)
    context = RunContext(tensor_parallel_size=2)
    whole = factor_bytes(inventory.find(FC1), section(), context)
    shards = factor_bytes(inventory.find(FC1), section(tensor_parallel="block"), context)
    assert (whole, shards) == (4 * (4096**2 + 1025**2), 2 * 4 * (2048**2 + 1025**2))


def test_the_plan_states_cost_and_memory() -> None:
    mkor = {"enabled": True, "sides": "right"}
    plan = build_plan({"train_batch_size": 8, "mkor": mkor}, SHAPE, world_size=8)
    found = plan.outlooks["mkor"]
    sizes = [(3072, 1025), (1024, 1025), (4096, 1025), (1024, 4097)] * 2
    products = sum(2 * out * width * width for out, width in sizes)
    updates = sum(4 * width * width for _, width in sizes)
    assert found.numbers["flops_per_step"] == products + updates / 10
    assert found.numbers["flops_per_step_and_rank"] * 8 == found.numbers["flops_per_step"]
    assert found.numbers["factor_bytes"] == 4 * sum(width**2 for _, width in sizes)
    assert found.numbers["vector_bytes_per_update"] == 4 * sum(width - 1 for _, width in sizes)
    weights = sum(out * width for out, width in sizes)  # each owner sends its results to seven others
    assert found.numbers["gradient_elements_per_step"] == weights / 8 * 7
    assert "8 layers" in found.summary and found.summary in plan.text()
    without = build_plan({"train_batch_size": 8}, SHAPE, world_size=8)
    added = plan.memory[0].buffers - without.memory[0].buffers
    assert added == pytest.approx(found.numbers["factor_bytes_per_rank"], rel=1e-3)


def test_the_plan_counts_every_vector_of_an_update() -> None:
    mkor = {"enabled": True, "inversion_interval": 4}
    one, eight = (
        build_plan({"train_batch_size": 8, "mkor": {**mkor, "statistics_rank": rank}}, SHAPE, world_size=8)
        .outlooks["mkor"]
        .numbers
        for rank in (1, 8)
    )
    sizes = [(3072, 1025), (1024, 1025), (4096, 1025), (1024, 4097)] * 2
    updates = sum(4 * (out**2 + width**2) for out, width in sizes)
    assert eight["flops_per_step"] - one["flops_per_step"] == 7 * updates / 4
    assert one["vector_bytes_per_update"] == 4 * sum(width - 1 for _, width in sizes)
    assert eight["vector_bytes_per_update"] == 4 * 8 * sum(out + width - 1 for out, width in sizes)
    assert eight["factor_bytes"] == one["factor_bytes"]
    inventory = Inventory.from_shape(SHAPE)
    actions = {a.module: a.action for a in plan_layers(section(statistics_rank=8), RunContext(), inventory)}
    assert actions[FC1] == "dense, both sides, 8 vectors"


@pytest.mark.parametrize(
    ("cut", "sequence_parallel", "own"),
    [
        (None, False, []),
        ("out", False, []),
        ("in", False, []),
        ("out", True, ["right"]),
        ("in", True, ["left"]),
    ],
)
def test_tensor_parallel_ranks_draw_alike_where_they_have_the_same_rows(
    cut: Any, sequence_parallel: bool, own: list[str]
) -> None:
    """A column-parallel layer's inputs and a row-parallel one's outputs are cut by sequence parallelism."""
    x = 2 ** torch.arange(40.0, dtype=torch.float64)[:, None]  # a sum tells all signs
    drawn = []
    for data, tensor in ((0, 0), (0, 1), (1, 0)):
        context = RunContext(
            data_parallel_rank=data, data_parallel_size=2, tensor_parallel_rank=tensor, tensor_parallel_size=2
        )
        technique = MkorTechnique(section(statistics_rank=2), context)
        made = technique._sketch(
            Layer("fc", nn.Linear(1, 1), 2, 2, True, cut=cut, sequence_parallel=sequence_parallel)
        )
        drawn.append({side: made.of_rows(side, made.begin_pass(), x) for side in ("left", "right")})
    assert [side for side in ("left", "right") if not torch.equal(drawn[0][side], drawn[1][side])] == own
    assert not any(torch.equal(drawn[0][side], drawn[2][side]) for side in ("left", "right"))


def test_a_checkpoint_of_another_statistics_rank_is_refused_by_name() -> None:
    state = MkorTechnique(section(), RunContext()).state_dict()
    three = MkorTechnique(section(statistics_rank=3), RunContext())
    with pytest.raises(CheckpointError, match=r"mkor.statistics_rank: saved with 1, here 3"):
        three.load_state_dict(state)
    del state["statistics_rank"]  # as runs saved it that knew of one vector only
    MkorTechnique(section(), RunContext()).load_state_dict(state)
    three.load_state_dict(three.state_dict())


def test_models_and_layers_that_cannot_be_preconditioned_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    technique = MkorTechnique(section(exclude=["0"]), RunContext())
    actions = technique.plan(Inventory.from_model(model))
    with pytest.raises(UserError, match=r"no linear layer is preconditioned \(excluded\).*mkor.exclude"):
        technique.apply(model, actions)
    model[0].weight.requires_grad_(False)
    technique = MkorTechnique(section(), RunContext())
    with pytest.raises(UserError, match=r"mkor: 0 \(Linear\) has no trained parameter.*mkor.exclude"):
        technique.apply(model, technique.plan(Inventory.from_model(model)))


class _Engine:
    """As much of an engine as `AveragedGradients` asks at first."""

    def __init__(self, stage: int, **attributes: Any) -> None:
        self.stage = stage
        names = ("params_in_partition", "averaged_gradients", "partition_size", "grad_start_offset",
                 "grad_partition_insertion_offset", "real_dp_process_group", "get_param_id")  # fmt: skip
        held = dict.fromkeys(names) | attributes
        self.optimizer = type("DeepSpeedZeroOptimizer", (), held)()

    def zero_optimization_stage(self) -> int:
        return self.stage


class MuonWithAuxAdam:
    """A base optimizer of this name."""


def test_gradients_that_are_elsewhere_are_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match="offload_optimizer takes the gradients to the host"):
        AveragedGradients(_Engine(1, cpu_offload=True), "mkor")
    with pytest.raises(UnsupportedVersion, match=r"lacking: get_flat_partition.*stage = 2; use stage 0 or 3"):
        AveragedGradients(_Engine(2, optimizer=MuonWithAuxAdam()), "mkor")
    assert AveragedGradients(_Engine(0, optimizer=MuonWithAuxAdam()), "mkor").stage == 0


def layer(cut: Any, stride: int, out: int, inputs: int, shards: int, name: str = "fc") -> Layer:
    """Return a layer whose module holds one shard."""
    rows = out // shards if cut == "out" else out
    module = nn.Linear(inputs // shards if cut == "in" else inputs, rows)
    return Layer(name, module, out, inputs, bias=True, cut=cut, stride=stride)


@given(
    cut=st.sampled_from(["in", "out", None]),
    stride=st.sampled_from([1, 2]),
    shards=st.sampled_from([1, 2, 3]),
)
@settings(deadline=None, max_examples=30)
def test_shards_make_the_matrix_that_they_were_cut_from(cut: Any, stride: int, shards: int) -> None:
    stride = stride if cut == "out" else 1
    out, inputs = 12, 6
    (block,) = make_blocks([layer(cut, stride, out, inputs, shards)], (0, 0), shards, "exact")
    matrix, bias = torch.randn(out, inputs), torch.randn(out)
    weights, biases = [matrix], [bias]
    if cut == "in" and shards > 1:
        weights = list(matrix.chunk(shards, 1))
    elif cut == "out" and shards > 1:
        every = [shard_rows(out, shard, shards, stride) for shard in range(shards)]
        weights = [torch.cat([matrix[first:last] for first, last in rows]) for rows in every]
        biases = [torch.cat([bias[first:last] for first, last in rows]) for rows in every]
    pieces = [piece.reshape(-1) for piece in weights]
    assert [piece.numel for piece in block.pieces] == [piece.numel() for piece in pieces + biases]
    found, found_bias = assemble(block, pieces, biases)
    assert torch.equal(found, matrix) and found_bias is not None and torch.equal(found_bias, bias)
    for given_piece, back in zip(
        pieces + biases, take_apart(block, found, found_bias, torch.float32), strict=True
    ):
        assert torch.equal(given_piece, back)


def test_shards_of_a_row_parallel_layer_share_one_bias() -> None:
    blocks = make_blocks([layer("in", 1, 4, 6, 2)], (0, 1), 2, "block")
    assert [(block.name, block.rows, block.width, block.bias) for block in blocks] == [
        ("fc#0", 4, 4, True),
        ("fc#1", 4, 3, False),
    ]
    assert [piece.parameter is None for block in blocks for piece in block.weights] == [True, False]
    assert blocks[0].biases[0].parameter is not None  # every rank has it


@given(
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=24),
    ranks=st.integers(1, 8),
    most=st.integers(1, 5000),
)
@settings(deadline=None, max_examples=50)
def test_owners_share_the_work_and_rounds_hold_every_block_once(
    sizes: list[int], ranks: int, most: int
) -> None:
    layers = [layer(None, 1, size, size, 1, str(number)) for number, size in enumerate(sizes)]
    blocks = make_blocks(layers, (0, 0), 1, "exact")
    places = [(rank, 0) for rank in range(ranks)]
    assign_owners(blocks, places, ("left", "right"))
    work = [0.0] * ranks
    for block in blocks:
        work[block.owner] += block.rows * block.width * (block.rows + block.width)
    largest = max(size * (size + 1) * (2 * size + 1) for size in sizes)
    assert max(work) <= sum(work) / ranks + largest  # as for any list schedule
    rounds = make_rounds(blocks, ranks, most)
    assert sorted(block.index for group in rounds for block in group) == list(range(len(blocks)))
    for group in rounds:
        for rank in range(ranks):
            mine: list[Block] = [block for block in group if block.owner == rank]
            assert len(mine) <= 1 or sum(block.numel for block in mine) <= most
            assert mine == sorted(mine, key=lambda block: block.rows)  # those of one shape together
    assert len(make_rounds(blocks, ranks, math.inf)) == 1


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_sources_cover_every_element_once(data: st.DataObject) -> None:
    """Whatever overlaps, as replicas do; the owner's own elements come first."""
    numel, ranks = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    cuts = [*sorted(data.draw(st.lists(st.integers(1, numel), max_size=ranks - 1))), numel]
    held = [
        Segment(rank, start, end) for rank, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False))
    ]
    held = [segment for segment in held if segment.end > segment.start]
    held += [Segment(ranks, 0, numel)] * data.draw(st.integers(0, 1))
    owner = data.draw(st.integers(0, ranks))
    piece = Piece(None, numel, None)
    piece.locate(held, owner, [(rank, 0) for rank in range(ranks + 1)])
    found = [element for _, start, end in piece.sources for element in range(start, end)]
    assert found == list(range(numel))
    if Segment(owner, 0, numel) in held:
        assert piece.sources == [Segment(owner, 0, numel)]


def test_an_element_on_no_rank_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="element 2 of 5 of a gradient is on no rank"):
        Piece(None, 5, None).locate([Segment(0, 0, 2), Segment(1, 3, 5)], 0, [(0, 0), (1, 0)])
