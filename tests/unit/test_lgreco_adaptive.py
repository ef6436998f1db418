"""When the adaptive reducer observes, compresses and plans; what it resumes with; the places in DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_efficient.core import deepspeed_reduction as reduction
from ds_efficient.core.keys import Key
from ds_efficient.errors import CheckpointError, UnsupportedVersion, UserError
from ds_efficient.lgreco import AdaptiveReducer, GradientWindow, SimulatedGroup
from ds_efficient.lgreco.config import LgrecoConfig
from ds_efficient.lgreco.window import STEPS
from ds_efficient.lgreco.wire import slice_of

SHAPES = {"a": (64, 48), "bias": (64,), "b": (96, 40)}


def adaptive(shapes: Any = SHAPES, **keys: Any) -> AdaptiveReducer:
    config = LgrecoConfig(enabled=True, **{"default": 8, "range": (2, 16), "interval": 4, **keys})
    return AdaptiveReducer(config, shapes, SimulatedGroup(1).transports[0], key=Key(1))


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    low = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    right = torch.randn(2, 48, generator=torch.Generator().manual_seed(999))
    low["a"] = torch.randn(64, 2, generator=generator) @ right  # the sum over steps has rank 2 too
    return low


def step(reducer: AdaptiveReducer, number: int, **options: Any) -> bool:
    named = gradients(number)
    if reducer.observes(number):
        reducer.observe(named)
    if reducer.compresses(number):
        reducer.reducer.reduce(named)
    return reducer.end_step(number, **options)


@pytest.mark.parametrize(
    ("interval", "start", "plans"),
    [(4, 0, [4, 8, 12]), (4, 3, [3, 7, 11]), (1, 0, list(range(1, 13))), (20, 5, [5]), (50, 0, [])],
)
def test_plans_come_at_the_start_and_then_every_interval(interval: int, start: int, plans: list[int]) -> None:
    reducer = adaptive(interval=interval, start_step=start)
    assert [number for number in range(1, 13) if step(reducer, number)] == plans
    assert reducer.plans == len(plans)
    assert [number for number in range(1, 13) if not reducer.compresses(number)] == list(range(1, start + 1))


def test_only_the_last_steps_before_a_plan_are_summed() -> None:
    reducer = adaptive(interval=25, start_step=30)
    observed = [number for number in range(1, 56) if reducer.observes(number)]
    assert observed == [*range(31 - STEPS, 31), *range(56 - STEPS, 56)]


def test_a_layer_of_low_rank_gets_a_low_rank_within_the_budget() -> None:
    reducer = adaptive()
    assert {option.setting for option in reducer.current.choices.values()} == {8}
    for number in range(1, 5):
        step(reducer, number)
    plan = reducer.current
    assert plan.choices["a"] == ("powersgd", 2)
    assert plan.error <= plan.budget * (1 + 1e-9)
    assert plan.nbytes < plan.default_nbytes
    assert reducer.metrics()["ratio_to_default"] > 1
    assert reducer.metrics()["bits/a"] != reducer.metrics()["bits/b"]
    assert "bias" not in plan.choices


def test_a_step_that_was_left_out_does_not_count_in_the_plan() -> None:
    config = LgrecoConfig(enabled=True, default=8, range=(2, 16), interval=2)
    plain, other = (
        AdaptiveReducer(config, SHAPES, SimulatedGroup(1).transports[0], key=Key(1), immediate=False)
        for _ in range(2)
    )
    step(plain, 2)
    other.observe({name: torch.full(shape, torch.inf) for name, shape in SHAPES.items()})
    other.end_step(1, applied=False)
    step(other, 2)
    assert plain.current.error == other.current.error
    assert plain.plans == other.plans == 1


def test_an_interval_of_overflows_leaves_the_plan_as_it_is() -> None:
    reducer = adaptive(interval=1)
    assert not reducer.end_step(1, applied=False)
    assert reducer.plans == 0


def test_other_settings_start_with_their_default_and_keep_the_errors() -> None:
    saved = adaptive()
    for number in range(1, 6):
        step(saved, number)
    state, own = saved.state_dict(), saved.rank_state()
    for keys, same in (({}, True), ({"default": 6}, False), ({"interval": 9}, True)):
        resumed = adaptive(**keys)
        resumed.load_state_dict(state)
        resumed.load_rank_state([own])
        assert (resumed.current.choices == saved.current.choices) == same
        assert same or {option.setting for option in resumed.current.choices.values()} == {6}
        assert all(
            torch.equal(error, own["errors"][name]) for name, error in resumed.reducer.errors().items()
        )
        assert resumed.reducer.errors().keys() == {"a", "b"}
        step(resumed, 6)
    with pytest.raises(CheckpointError, match="damaged"):
        adaptive().load_rank_state([{"errors": {}}])


def test_the_objective_time_measures_once_and_resumes_with_the_same_times() -> None:
    reducer = adaptive(objective="time", interval=2)
    for number in (1, 2, 3, 4):
        step(reducer, number)
    state = reducer.state_dict()
    assert len(state["times"][1]) == 2 and min(state["times"][1]) > 0
    resumed = adaptive(objective="time", interval=2)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["times"] == state["times"]


def test_a_cut_of_the_learning_rate_makes_all_layers_critical() -> None:
    accordion = {"enabled": True, "low": 16, "high": 4}
    rates = {"steady": [1.0] * 8, "falling slowly": [0.95**k for k in range(8)], "cut": [1.0] * 6 + [0.1] * 2}
    critical = {}
    for name, values in rates.items():
        reducer = adaptive(accordion=accordion)
        for number, rate in enumerate(values, 1):
            named = gradients(1)  # the same in both periods: nothing else is critical
            if reducer.observes(number):
                reducer.observe(named)
            reducer.end_step(number, learning_rate=rate)
        critical[name] = {option.setting for option in reducer.current.defaults.values()}
    assert critical == {"steady": {4}, "falling slowly": {4}, "cut": {16}}


def test_slices_of_the_ranks_make_the_whole_sum() -> None:
    value = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(5, 7)
    for rank in range(3):
        window = GradientWindow({"w": (5, 7)}, slices=lambda n, rank=rank: slice_of(n, rank, 3), ranks=3)
        window.add({"w": value.clone(), "other": value}, unscale=0.5)
        start, end = slice_of(35, rank, 3)
        window.add({"w": value.view(-1)[start:end].clone()})  # ZeRO 3 hands slices over
        assert not window
        window.commit()
        assert window.nbytes == 4 * (end - start)
        taken = window.take()
        assert "w" in taken and list(taken) == ["w"] and not window
        total += taken["w"] / 3  # the plan averages over the ranks
        assert "w" not in taken
    torch.testing.assert_close(total, 1.5 * value)


def engine(optimizer: Any, stage: int = 1, **more: Any) -> Any:
    zero = SimpleNamespace(zenflow=None, zero_quantized_gradients=False, zero_hpz_partition_size=1)
    return SimpleNamespace(
        optimizer=optimizer,
        zero_optimization_stage=lambda: stage,
        _config=SimpleNamespace(zero_config=zero),
        **more,
    )


def test_copies_on_other_model_parallel_ranks_are_found() -> None:
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(2, 2, bias=False) for name in ("cut", "whole", "tied")}
    )
    model["cut"].weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    model["tied"].weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    model["tied"].weight.shared_embedding = True  # type: ignore[attr-defined]

    def copied(tensor: int, pipeline: int) -> set[str]:
        where = SimpleNamespace(module=model)
        return reduction.copied_elsewhere(where, tensor_parallel=tensor, pipeline_parallel=pipeline)

    assert copied(1, 1) == set()
    assert copied(2, 1) == {"whole.weight"}
    assert copied(1, 2) == {"tied.weight"}
    assert copied(2, 2) == {"whole.weight", "tied.weight"}


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({}, False),  # fp32 without ZeRO: torch's own
        ({"overflow": False}, True),  # wrappers of half precision without ZeRO
        ({"overflow": False, "check_grad_overflow": False, "dtype": torch.bfloat16}, False),
        ({"overflow": False, "check_grad_overflow": True, "dtype": torch.bfloat16}, True),
        ({"overflow": False, "check_grad_overflow": False, "dtype": torch.float32}, True),
    ],
)
def test_optimizers_that_leave_steps_out_are_known(optimizer: dict[str, Any], expected: bool) -> None:
    assert reduction.steps_can_be_skipped(engine(SimpleNamespace(**optimizer))) is expected


def test_an_unknown_optimizer_wrapper_is_refused_as_an_unsupported_version() -> None:
    with pytest.raises(UnsupportedVersion, match="SimpleNamespace at ZeRO stage 2"):
        reduction.place_of(engine(SimpleNamespace(), 2))
    bucket = SimpleNamespace(gradient_reduction_w_predivide=None, contiguous_gradients=True)
    with pytest.raises(UnsupportedVersion, match="lacks ipg_buckets, bit16_groups"):
        reduction.replace_reduction(engine(bucket), lambda gradients, original: None)


def test_every_setting_that_does_not_go_together_is_named_at_once() -> None:
    bucket = SimpleNamespace(gradient_reduction_w_predivide=None, contiguous_gradients=False)
    wrong = engine(bucket, has_moe_layers=True, sequence_parallel_size=2, gradient_average=False)
    with pytest.raises(UserError) as refused:
        reduction.replace_reduction(wrong, lambda gradients, original: None)
    for words in ("mixture-of-experts", "sequence parallelism", '"sum"', "contiguous_gradients"):
        assert words in str(refused.value)
