"""What SLoPe plans for a model, and what becomes of the model: layers, reasons, sizes, refusals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import ds_efficient
from ds_efficient.config import load_config
from ds_efficient.core.inventory import Inventory, ModelShape
from ds_efficient.core.keys import Key
from ds_efficient.core.parameter_groups import split_groups
from ds_efficient.core.technique import Action, RunContext
from ds_efficient.errors import UserError
from ds_efficient.slope.config import SlopeConfig
from ds_efficient.slope.layers import global_name, plan_layers
from ds_efficient.slope.linear import SlopeLinear
from ds_efficient.slope.technique import SlopeTechnique, shard_ranges

SHAPE = ModelShape(4, 64, 4, 256, 32)


def section(**values: Any) -> SlopeConfig:
    values = {"adapter": {"rank": 2, "start_step": 5}, "backend": "dense", **values}
    return load_config({"slope": {"enabled": True, **values}}).sections["slope"]


class Block(nn.Module):
    """Attention-like and MLP-like layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)


class Model(nn.Module):
    """Blocks in a list, an embedding and an output layer."""

    def __init__(self, depth: int = 3, width: int = 32, *, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(64, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.lm_head = nn.Linear(width, 64, bias=False)
        if tied:
            self.lm_head.weight = self.words.weight


ALL = ["proj", "up", "down", "lm_head"]


def applied(model: nn.Module, **values: Any) -> tuple[SlopeTechnique, list[Action]]:
    context = RunContext(**values.pop("context", {}))
    technique = SlopeTechnique(section(modules=ALL, **values), context)
    actions = list(technique.plan(Inventory.from_model(model)))
    technique.apply(model, actions)
    return technique, actions


def reasons(actions: Iterable[Action]) -> dict[str, str]:
    return {action.module: action.reason for action in actions if action.skipped}


def sparse(actions: Iterable[Action]) -> list[str]:
    return [action.module for action in actions if not action.skipped]


def test_names_exclusions_and_the_vocabulary_decide_which_layers_become_sparse() -> None:
    model = Model()
    technique, actions = applied(model, exclude=["layers.0.*", "down"])
    assert sparse(actions) == ["layers.1.proj", "layers.1.up", "layers.2.proj", "layers.2.up"]
    assert reasons(actions) == {
        **{f"layers.0.{name}": "excluded" for name in ("proj", "up", "down")},
        **{f"layers.{layer}.down": "excluded" for layer in (1, 2)},
        "lm_head": "projection onto the vocabulary",
    }
    changed = {name for name, module in model.named_modules() if isinstance(module, SlopeLinear)}
    assert changed == set(sparse(actions)) == {name for name, _, _ in technique.layers}
    assert type(model.layers[0].up) is nn.Linear and type(model.lm_head) is nn.Linear


def test_layers_have_the_pattern_of_their_range() -> None:
    model = Model()
    _, actions = applied(
        model,
        pattern="1:4",
        patterns=[{"layers": "1", "pattern": "2:8"}, {"layers": "2-7", "pattern": "1:2"}],
    )
    found = {layer: model.layers[layer].up.slope.shape for layer in range(3)}
    assert [(shape.n, shape.m) for shape in found.values()] == [(1, 4), (2, 8), (1, 2)]
    assert [action.options["pattern"] for action in actions if action.module.endswith("proj")] == [
        "1:4",
        "2:8",
        "1:2",
    ]


def test_sizes_that_m_does_not_divide_stay_dense_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(36, 32), nn.Linear(32, 36), nn.Linear(32, 32))
    inventory = Inventory.from_model(model)
    config = section(pattern="2:8", modules=["0", "1", "2"])
    found = plan_layers(config, RunContext(), inventory)
    assert reasons(found) == {
        "0": "in_features 36 not a multiple of M=8",
        "1": "out_features 36 not a multiple of M=8",
    }
    once = plan_layers(
        section(pattern="2:8", modules=["0", "1", "2"], double_prune=False), RunContext(), inventory
    )
    assert reasons(once) == {"0": "in_features 36 not a multiple of M=8"}


def test_groups_may_not_straddle_tensor_parallel_shards() -> None:
    """In a width of 64 on 4 ranks, 16 inputs or outputs of a shard are half a group of 32."""
    config, inventory = section(pattern="2:32"), Inventory.from_shape(SHAPE)
    assert len(sparse(plan_layers(config, RunContext(tensor_parallel_size=1), inventory))) == 16
    found = plan_layers(config, RunContext(tensor_parallel_size=4), inventory)
    expected = {
        # column-parallel: the outputs are cut (192 / 4 = 48 and 256 / 4 = 64), row-parallel: the inputs.
        "linear_qkv": "out_features 192 / 4 tensor-parallel ranks not a multiple of M=32",
        "linear_proj": "in_features 64 / 4 tensor-parallel ranks not a multiple of M=32",
    }
    for name, reason in expected.items():
        assert {why for module, why in reasons(found).items() if module.endswith(name)} == {reason}
    assert {name.rpartition(".")[2] for name in sparse(found)} == {"linear_fc1", "linear_fc2"}


def test_stacked_matrices_are_cut_one_by_one() -> None:
    """Two gated halves on 2 ranks: rank 1 holds the second half of the gate and of the up-projection."""
    assert shard_ranges(16, 8, "out", 1, 2, 2) == ([(4, 8), (12, 16)], (0, 8))
    assert shard_ranges(16, 8, "out", 1, 2, 1) == ([(8, 16)], (0, 8))
    assert shard_ranges(16, 8, "in", 1, 2, 1) == ([(0, 16)], (4, 8))
    assert shard_ranges(16, 8, None, 0, 1, 1) == ([(0, 16)], (0, 8))
    for stride in (1, 2, 4):
        rows = [
            row
            for rank in range(4)
            for first, end in shard_ranges(64, 8, "out", rank, 4, stride)[0]
            for row in range(first, end)
        ]
        assert sorted(rows) == list(range(64))


def test_a_weight_that_two_modules_share_stays_dense() -> None:
    model = Model(tied=True)
    model.layers[1].proj.weight = model.layers[0].proj.weight
    _, actions = applied(model)
    assert reasons(actions).keys() == {"lm_head", "layers.0.proj", "layers.1.proj"}
    assert reasons(actions)["layers.0.proj"] == "shares its weight"
    assert model.layers[1].proj.weight is model.layers[0].proj.weight


def test_a_layer_that_is_used_in_two_places_is_replaced_in_both() -> None:
    model = Model()
    model.layers[2].up = model.layers[0].up
    model.layers[1] = model.layers[0]
    _, actions = applied(model)
    assert isinstance(model.layers[0].up, SlopeLinear)
    assert model.layers[2].up is model.layers[1].up is model.layers[0].up
    assert sparse(actions).count("layers.0.up") == 1 and "layers.2.up" not in sparse(actions)


def test_names_that_no_layer_has_are_answered_with_the_names_there_are() -> None:
    technique = SlopeTechnique(section(), RunContext())
    with pytest.raises(UserError) as raised:
        technique.apply(Model(), technique.plan(Inventory.from_model(Model())))
    message = str(raised.value)
    assert "linear_qkv" in message and "called down, lm_head, proj, up" in message
    later = SlopeTechnique(section(), RunContext(pipeline_parallel_size=2))  # a stage may hold none of them
    later.apply(Model(), later.plan(Inventory.from_model(Model())))
    assert later.layers == []


def test_kinds_of_layers_that_take_no_product_are_refused_by_name() -> None:
    class Own(nn.Linear):
        pass

    model = Model()
    model.layers[1].up = Own(32, 96)
    with pytest.raises(UserError, match=r"layers\.1\.up is a Own.*slope\.exclude"):
        applied(model)
    _, actions = applied(model, exclude=["layers.1.up"])
    assert reasons(actions)["layers.1.up"] == "excluded"


def test_a_weight_that_is_computed_from_others_stays_dense_or_is_refused() -> None:
    model = Model()
    model.layers[1].up = nn.utils.parametrizations.weight_norm(nn.Linear(32, 96))
    _, actions = applied(model)
    assert reasons(actions) == {
        "layers.1.up": "its weight is computed from other parameters",
        "lm_head": "projection onto the vocabulary",
    }
    model = Model()
    model.layers[1].up = nn.utils.weight_norm(nn.Linear(32, 96))
    with pytest.raises(UserError, match=r"layers\.1\.up: .*computed from other parameters.*slope\.exclude"):
        applied(model)


def test_gpt2_of_transformers_with_its_conv1d_layers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    dense = {name: module for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    technique = SlopeTechnique(section(modules=["c_attn", "c_fc", "c_proj"]), RunContext())
    actions = technique.plan(Inventory.from_model(model))
    technique.apply(model, actions)
    assert len(technique.layers) == 8 and set(reasons(actions)) == {"lm_head"}
    for name, layer, _ in technique.layers:
        mask = layer.forward_mask()
        assert torch.equal(layer.dense_weight(), dense[name].weight.detach().t() * mask)
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("double_prune", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "2:8", "3:32"])
def test_planned_parameters_and_mask_bytes_are_the_real_ones(
    pattern: str, rank: int, double_prune: bool
) -> None:
    model = Model()
    adapter = {"rank": rank, "start_step": 1} if rank else {"rank": 0}
    before = Inventory.from_model(model)
    technique, actions = applied(model, pattern=pattern, adapter=adapter, double_prune=double_prune)
    assert len(technique.layers) == 9
    for action in actions:
        module = model.get_submodule(action.module)
        if not action.skipped:
            assert action.parameters == sum(parameter.numel() for parameter in module.parameters())
            assert action.buffer_bytes == sum(buffer.nbytes for buffer in module.buffers())
            assert sum(action.extra_parameters) == sum(p.numel() for p in module.slope.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert before.with_actions(actions).total_parameters == total


def test_operands_are_planned_where_the_hardware_takes_the_pattern() -> None:
    """Two compressed operands of 9/16 of the 16-bit weight; forward alone without double pruning."""
    inventory = Inventory.from_model(nn.Sequential(nn.Linear(64, 64)))

    def planned(**values: Any) -> int:
        return plan_layers(section(modules=["0"], **values), RunContext(), inventory)[0].buffer_bytes

    masks, operand = 64 * 64 // 8, 64 * 64 * 2 * 9 // 16
    assert planned(backend="auto") == planned(backend="cusparselt") == 2 * (masks + operand)
    assert planned(backend="auto", double_prune=False) == masks + operand
    assert planned(backend="auto", pattern="4:8") == planned(backend="dense") == 2 * masks


@pytest.mark.parametrize(
    ("operands", "micro_batches", "sixteenths"),
    [("auto", 1, 1), ("auto", 2, 9), ("auto", None, 9), ("rewritten", 4, 1), ("kept", 1, 9)],
)
def test_rewritten_operands_are_planned_with_their_metadata(
    operands: str, micro_batches: int | None, sixteenths: int
) -> None:
    """ "auto" rewrites where a step has one micro-batch; the layers are told the same."""
    model, context = nn.Sequential(nn.Linear(64, 64)), RunContext(total_steps=9, micro_batches=micro_batches)
    config = section(modules=["0"], operands=operands, backend="auto")
    technique = SlopeTechnique(config, context)
    actions = technique.plan(Inventory.from_model(model))
    assert actions[0].buffer_bytes == 2 * (64 * 64 // 8 + 64 * 64 * 2 * sixteenths // 16)
    technique.apply(model, actions)
    assert [product.operands.rewritten for _, _, product in technique.layers] == [sixteenths == 1]


def test_the_start_of_the_adapters_is_rounded_to_a_step() -> None:
    def start(total: int | None, **adapter: Any) -> float:
        return SlopeTechnique(
            section(adapter={"rank": 2, **adapter}), RunContext(total_steps=total)
        )._adapter_start()

    assert start(1000, last_fraction=0.01) == 990
    assert start(1040, last_fraction=0.01) == 1030
    assert start(10, last_fraction=0.01) == 9  # at least one step
    assert start(1, last_fraction=0.01) == 0
    assert start(100, last_fraction=1.0) == 0
    assert start(None, start_step=7) == start(3, start_step=7) == 7
    assert start(None, rank=0) == float("inf")
    with pytest.raises(UserError, match=r"last_fraction needs the length of the run.*total_steps"):
        start(None, last_fraction=0.01)


def test_a_run_without_a_length_is_refused_before_the_model_changes() -> None:
    model = Model()
    with pytest.raises(UserError, match="total_steps"):
        applied(model, adapter={"rank": 2, "last_fraction": 0.1})
    assert not any(isinstance(module, SlopeLinear) for module in model.modules())


def test_a_refused_layer_leaves_the_model_unchanged() -> None:
    class Own(nn.Linear):
        pass

    model = Model()
    model.layers[2].down = Own(96, 32)
    with pytest.raises(UserError, match="Own"):
        applied(model)
    assert not any(isinstance(module, SlopeLinear) for module in model.modules())


def test_draws_follow_the_layer_of_the_whole_model() -> None:
    assert global_name("decoder.layers.1.mlp.linear_fc1", 13) == "decoder.layers.13.mlp.linear_fc1"
    assert global_name("h.0.experts.layers.3.w", 5) == "h.5.experts.layers.3.w"
    assert global_name("head", None) == "head"
    one, other = (applied(Model(), context={"seed": seed})[0].layers for seed in (1, 2))
    again = applied(Model(), context={"seed": 1})[0].layers
    masks = [layer.slope.mask for _, layer, _ in one]
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)
    for same, mask, different in zip(again, masks, other, strict=True):
        assert torch.equal(same[1].slope.mask, mask)
        assert not torch.equal(different[1].slope.mask, mask)


def adapters(count: int = 1) -> list[SlopeLinear]:
    return [SlopeLinear(8, 8, adapter_rank=2, key=Key(number)) for number in range(count)]


def test_lists_of_parameters_are_split_in_order() -> None:
    first, second = adapters(2)
    given = [first.weight, *first.slope.parameters(), first.bias, second.weight, *second.slope.parameters()]
    state = torch.get_rng_state()
    groups = split_groups(iter(given))
    assert torch.equal(state, torch.get_rng_state())
    assert [list(group) for group in groups] == [["params"], ["name", "weight_decay", "params"]]
    expected = (
        [first.weight, first.bias, second.weight],
        [*first.slope.parameters(), *second.slope.parameters()],
    )
    for group, parameters in zip(groups, expected, strict=True):
        assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in parameters]


def test_groups_keep_their_options_and_adapters_get_no_decay() -> None:
    first, second = adapters(2)
    given = [
        {
            "params": (parameter for parameter in first.parameters()),
            "lr": 1.0,
            "weight_decay": 0.3,
            "name": "a",
        },
        {"params": list(second.slope.parameters()), "lr": 2.0, "weight_decay": 0.4, "betas": (0.5, 0.6)},
        {"params": second.weight, "name": "single"},
    ]
    groups = split_groups(given)
    assert [(group.get("name"), group.get("lr"), group.get("weight_decay")) for group in groups] == [
        ("a", 1.0, 0.3),
        ("slope_adapters", 1.0, 0.0),
        ("slope_adapters", 2.0, 0.0),
        ("single", None, None),
    ]
    assert groups[2]["betas"] == (0.5, 0.6)
    assert [len(group["params"]) for group in groups] == [2, 2, 2, 1]
    torch.optim.AdamW(groups)


def test_parameters_without_marks_stay_as_given() -> None:
    layer = nn.Linear(4, 4)
    groups = [{"params": [layer.weight], "lr": 1.0}, {"params": [layer.bias]}]
    assert split_groups(groups) == groups
    assert split_groups(layer.parameters()) == list(layer.parameters())
    assert split_groups([]) == []


def test_optimizers_and_parameters_of_before_are_refused_with_the_remedy() -> None:
    raw = {
        "train_micro_batch_size_per_gpu": 1,
        "slope": {"enabled": True, "modules": ALL, "adapter": {"rank": 0}},
    }
    model = Model()
    for argument, message in (
        ({"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}, "optimizer=lambda parameters"),
        ({"model_parameters": list(model.parameters())}, "model_parameters=lambda model"),
    ):
        with pytest.raises(UserError, match=message):
            ds_efficient.initialize(model=model, config=raw, dist_init_required=False, **argument)
        model = Model()
