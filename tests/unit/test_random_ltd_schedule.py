"""random-LTD's schedule, layer tokens, budgets and predictions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ltd_schedules import schedules

from ds_efficient.core.flops import executed_flops_per_token
from ds_efficient.core.shape import ModelShape
from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.random_ltd.accounting import LayerTokens, budget_reached
from ds_efficient.random_ltd.prediction import (
    describe,
    interpolated_step_cost,
    predict,
    relative_step_cost,
)
from ds_efficient.random_ltd.schedule import TokenSchedule, schedule_by_tokens

GPT = TokenSchedule(128, 2048, 200_000, total_layer_num=24, batch_size=512)
BILLION = 10**9


@given(schedules())
@settings(deadline=None)
def test_it_starts_at_the_minimum_never_falls_and_is_full_from_the_required_step_on(
    schedule: TokenSchedule,
) -> None:
    assert schedule.require_steps is not None
    end = math.ceil(schedule.require_steps)
    kept = [schedule.kept(step) for step in range(end + 3)]
    if end > 0:
        assert kept[0] == schedule.min_value
    assert kept == sorted(kept)
    assert kept[end:] == [schedule.max_value] * 3
    grown = {value - schedule.min_value for value in kept[:end]}
    assert all(value % schedule.seq_per_step == 0 for value in grown)
    if schedule.schedule_type == "constant":
        assert grown <= {0}


@given(schedules(schedule_type="fixed_linear"))
@settings(deadline=None)
def test_increases_come_at_equal_intervals(schedule: TokenSchedule) -> None:
    growth = schedule.max_value - schedule.min_value
    for step in range(math.ceil(schedule.require_steps or 0)):
        exact = step * growth / (schedule.seq_per_step * Fraction(schedule.require_steps or 1))
        assert schedule.kept(step) - schedule.min_value == schedule.seq_per_step * math.floor(exact)


def deepspeed_value(low: int, high: int, steps: int, increase: int, step: int, number: Any) -> int:
    """What DeepSpeed computes for fixed_linear, with `number` as its arithmetic."""
    value = math.floor(number(step) / steps * (high - low) + low)
    return min(value - value % increase, high)


@given(st.integers(1, 20), st.integers(0, 20), st.integers(1, 32), st.integers(1, 300))
@settings(deadline=None)
def test_it_is_deepspeeds_where_minimum_and_maximum_are_multiples_of_the_increase(
    low: int, more: int, increase: int, steps: int
) -> None:
    schedule = TokenSchedule(low * increase, (low + more) * increase, steps, increase)
    for step in range(steps + 5):
        assert schedule.kept(step) == deepspeed_value(
            schedule.min_value, schedule.max_value, steps, increase, step, Fraction
        )


def test_it_is_deepspeeds_in_every_step_of_the_papers_gpt() -> None:
    for step in range(0, 200_100, 7):
        assert GPT.kept(step) == deepspeed_value(128, 2048, 200_000, 16, step, float)


def test_it_does_not_share_deepspeeds_two_errors() -> None:
    low = TokenSchedule(200, 512, 1000, 16)
    assert deepspeed_value(200, 512, 1000, 16, 0, float) == 192
    assert low.kept(0) == 200
    images = TokenSchedule(66, 197, 1000, 16)
    assert deepspeed_value(66, 197, 1000, 16, 1000, float) == 192
    assert (images.kept(999), images.kept(1000)) == (194, 197)


def test_without_an_end_the_constant_schedule_stays() -> None:
    schedule = TokenSchedule(64, 256, schedule_type="constant", total_layer_num=4)
    assert schedule.full_from is None
    assert {schedule.kept(step) for step in (0, 1, 10**9)} == {64}
    assert schedule.consumed_layer_tokens(10) == 10 * (2 * 64 + 2 * 256)


@given(schedules(), st.integers(0, 500))
@settings(deadline=None)
@example(TokenSchedule(3, 300, Fraction(1, 3), 1, total_layer_num=3), 4)  # many increases in one step
def test_totals_and_plateaus_are_the_sums_of_the_steps(schedule: TokenSchedule, steps: int) -> None:
    assert schedule.consumed_layer_tokens(steps) == sum(map(schedule.layer_tokens, range(steps)))
    spread = [kept for first, last, kept in schedule.plateaus(steps) for _ in range(first, last or 0)]
    assert spread == [schedule.kept(step) for step in range(steps)]
    assert schedule.dense_layer_tokens(steps) == steps * schedule.batch_size * schedule.length * (
        schedule.total_layer_num or 0
    )


@given(schedules(), st.integers(-5, 10**7))
@settings(deadline=None)
def test_steps_to_a_number_of_layer_tokens_are_the_fewest(schedule: TokenSchedule, tokens: int) -> None:
    steps = schedule.steps_to(tokens)
    assert schedule.consumed_layer_tokens(steps) >= tokens
    assert steps == 0 or schedule.consumed_layer_tokens(steps - 1) < tokens


@given(schedules(), st.integers(1, 8))
@settings(deadline=None)
def test_rounding_to_shards_goes_up_and_no_further_than_needed(plain: TokenSchedule, shards: int) -> None:
    values = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    values |= {"min_value": plain.min_value * shards, "max_value": plain.max_value * shards}
    exact = TokenSchedule(**values)
    rounded = TokenSchedule(**{**values, "multiple_of": shards})
    for step in range(0, 450, 7):
        assert rounded.kept(step) % shards == 0
        assert 0 <= rounded.kept(step) - exact.kept(step) < shards


def test_shorter_sequences_keep_at_most_what_they_have() -> None:
    assert GPT.kept(100_000, length=64) == 64
    assert GPT.layer_tokens(0, length=1024) == 512 * (22 * 128 + 2 * 1024)
    short = TokenSchedule(128, 2048, 10, seq_length=256, total_layer_num=3)
    assert [short.kept(step) for step in (0, 9, 10)] == [128, 256, 256]
    assert short.layer_tokens(10) == 3 * 256


# Savings of arXiv 2211.11586: steps, the schedule in the paper's words, 22 of 24 layers, percent.
@pytest.mark.parametrize(
    ("schedule", "steps", "percent"),
    [
        (schedule_by_tokens(128, 2048, 16, 1_750_000_000, batch_size=512, total_layer_num=24),
         300 * BILLION // (512 * 2048), "30.3"),
        (schedule_by_tokens(200, 512, 16, 48 * BILLION, batch_size=1024, total_layer_num=24),
         2_000_000, "26.23"),
        (schedule_by_tokens(128, 512, 16, 38 * BILLION, batch_size=1024, total_layer_num=24),
         2_000_000, "31.14"),
        (schedule_by_tokens(256, 512, 16, 3_800_000_000, batch_size=1024, total_layer_num=24),
         200_000, "14.12"),
        (schedule_by_tokens(256, 512, 16, 6 * BILLION, batch_size=1024, total_layer_num=24),
         200_000, "22.29"),
    ],
    ids=["GPT", "BERT-L 1", "BERT-L 2", "BERT-L 3", "BERT-L 4"],
)  # fmt: skip
def test_layer_tokens_of_the_paper_are_saved_to_the_digit(
    schedule: TokenSchedule, steps: int, percent: str
) -> None:
    saving = predict(schedule, steps, lambda kept: 1.0).share
    digits = len(percent.partition(".")[2])
    assert f"{100 * saving:.{digits}f}" == percent


def test_a_budget_of_layer_tokens_takes_more_data() -> None:
    steps = GPT.steps_to(24 * 200 * BILLION)
    assert round(steps * 512 * 2048 / BILLION) == 291
    assert GPT.steps_to(24 * 512 * 2048 * 10**7) > 10**7


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({"min_value": 300}, "min_value 300 is larger than max_value 200"),
        ({"min_value": 0}, "min_value 0: must be at least 1"),
        ({"seq_per_step": 0}, "seq_per_step 0"),
        ({"require_steps": None}, "require_steps: needed"),
        ({"require_steps": -1}, "require_steps -1"),
        ({"schedule_type": "root"}, 'schedule_type "root": allowed are fixed_linear and constant'),
        ({"interval": Fraction(3)}, "in place of require_steps"),
        ({"require_steps": None, "schedule_type": "constant", "interval": Fraction(3)}, "nothing grows"),
        ({"multiple_of": 3}, "max_value 200: must be a multiple of 3"),
        ({"random_ltd_layer_num": 5, "total_layer_num": 4}, "random_ltd_layer_num 5: must be from 0 to"),
        ({"seq_length": 0}, "seq_length 0"),
        ({"total_layer_num": 0}, "total_layer_num 0"),
    ],
)
def test_what_contradicts_is_refused(given_: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        TokenSchedule(**{"min_value": 100, "max_value": 200, "require_steps": 10, **given_})


def test_layer_tokens_need_the_number_of_layers() -> None:
    with pytest.raises(UserError, match="total_layer_num: needed"):
        TokenSchedule(100, 200, 10).layer_tokens(0)
    with pytest.raises(ValueError, match="step -1"):
        GPT.kept(-1)


@given(schedules(), st.lists(st.integers(1, 4), min_size=1, max_size=30))
@settings(deadline=None)
def test_a_step_counts_once_however_often_it_is_announced(
    schedule: TokenSchedule, announcements: list[int]
) -> None:
    tokens = LayerTokens(schedule)
    for step, times in enumerate(announcements):
        counted = [tokens.count(step) for _ in range(times)]
        assert counted == [schedule.layer_tokens(step), *[0] * (times - 1)]
        assert tokens.last == schedule.layer_tokens(step)
    assert tokens.consumed == schedule.consumed_layer_tokens(len(announcements))
    assert tokens.tokens == len(announcements) * schedule.batch_size * schedule.length
    assert tokens.saving == pytest.approx(1 - tokens.consumed / schedule.dense_layer_tokens(tokens.steps))


def test_steps_with_other_lengths_count_as_they_were() -> None:
    tokens = LayerTokens(TokenSchedule(4, 8, 2, 4, total_layer_num=3, batch_size=2))
    assert tokens.count(0, length=6) == 2 * (4 + 2 * 6)
    for _ in range(2):
        tokens.add(1, 10, 24)
    assert (tokens.tokens, tokens.consumed, tokens.steps, tokens.last) == (22, 56, 2, 24)
    assert tokens.saving == pytest.approx(1 - 56 / 66)


def test_counts_are_exact_beyond_the_reach_of_floats() -> None:
    tokens = LayerTokens(TokenSchedule(2**40 - 1, 2**40, 10**6, 1, total_layer_num=3, batch_size=2**20 + 1))
    tokens.count(0)
    assert tokens.consumed == (2**20 + 1) * (3 * 2**40 - 1)
    assert tokens.consumed != int(float(tokens.consumed))


@pytest.mark.parametrize("value", [None, -1, 2.0, True, "7"])
def test_a_damaged_count_is_refused_and_changes_nothing(value: Any) -> None:
    tokens = LayerTokens(GPT)
    tokens.count(0)
    before = tokens.state_dict()
    with pytest.raises(CheckpointError, match="steps"):
        tokens.load_state_dict({**before, "consumed_layer_tokens": 5, "steps": value})
    assert tokens.state_dict() == before


def test_a_run_ends_at_its_budgets() -> None:
    assert budget_reached(10, 20) is None
    assert budget_reached(10, 20, token_budget=11, layer_token_budget=21) is None
    assert budget_reached(10, 20, token_budget=10) == "token_budget 10 reached"
    assert budget_reached(10, 20, token_budget=11, layer_token_budget=20) == "layer_token_budget 20 reached"


SHAPE = ModelShape(24, 2048, 16, 50304, 2048)


def test_a_dense_steps_cost_is_one_and_its_products_are_those_of_the_plan() -> None:
    cost = relative_step_cost(GPT, SHAPE)
    assert cost(2048) == pytest.approx(1.0)
    per_token = executed_flops_per_token(SHAPE)
    parts = (per_token.projections + per_token.mlp) / 24, per_token.attention / 24
    saved = 22 * (parts[0] / 2 + parts[1] * 3 / 4)
    assert 1 - cost(1024) == pytest.approx(saved / per_token.total)


@given(schedules(), st.integers(1, 300), st.floats(0, 1))
@settings(deadline=None)
def test_what_does_not_shrink_shortens_the_saving_in_proportion(
    schedule: TokenSchedule, steps: int, fixed: float
) -> None:
    shape = ModelShape(schedule.total_layer_num or 1, 64, 4, 512, schedule.length)
    whole = predict(schedule, steps, relative_step_cost(schedule, shape))
    part = predict(schedule, steps, relative_step_cost(schedule, shape, fixed_share=fixed))
    assert part.time == pytest.approx((1 - fixed) * whole.time, abs=1e-12)
    assert (part.layer_tokens, part.steps) == (schedule.consumed_layer_tokens(steps), steps)
    assert -1e-12 <= whole.time <= 1.0


def test_measured_steps_are_integrated_over_the_schedule() -> None:
    schedule = TokenSchedule(2, 8, 3, 2, total_layer_num=3)  # 2, 4, 6, then 8
    cost = interpolated_step_cost({2: 50.0, 4: 60.0, 8: 100.0}, dense=100.0)
    assert cost(6) == pytest.approx(0.8)
    found = predict(schedule, 4, cost)
    assert found.time == pytest.approx(1 - (0.5 + 0.6 + 0.8 + 1.0) / 4)
    assert found.share == pytest.approx((6 + 4 + 2) / (4 * 3 * 8))
    with pytest.raises(UserError, match="9 kept tokens"):
        cost(9)
    with pytest.raises(UserError, match="0 steps"):
        predict(schedule, 0, cost)
    with pytest.raises(ValueError, match="fixed_share"):
        relative_step_cost(GPT, SHAPE, fixed_share=1.5)


def test_the_outlook_names_the_end_of_the_schedule_and_what_it_saves() -> None:
    text, numbers = describe(GPT, SHAPE, 286_102)
    assert text.startswith(
        "128 of 2,048 tokens at first, all tokens from step 200,000; in 286,102 steps 30.3 %"
    )
    assert numbers["layer_tokens_saved"] == pytest.approx(0.30288, abs=1e-5)
    assert numbers["time_saved"] == predict(GPT, 286_102, relative_step_cost(GPT, SHAPE)).time
    assert f"{100 * numbers['time_saved']:.1f} % of the time" in text
    assert describe(GPT, SHAPE, None)[1]["steps"] == 200_000
    constant = TokenSchedule(512, 2048, schedule_type="constant", total_layer_num=24)
    text, numbers = describe(constant, SHAPE, None)
    assert "never all tokens; in every step 68.8 % of the layer tokens" in text
    full = TokenSchedule(2048, 2048, 5, total_layer_num=24)
    assert describe(full, SHAPE, None)[1] == {"steps": 1, "layer_tokens_saved": 0, "time_saved": 0}
