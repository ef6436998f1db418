"""random-LTD's learning rate by layer tokens."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltd_schedules import schedules
from pretraining.schedule import Schedule

from ds_efficient.errors import UserError
from ds_efficient.random_ltd.accounting import LayerTokens
from ds_efficient.random_ltd.learning_rate import LayerTokenCurve, LayerTokenLR
from ds_efficient.random_ltd.schedule import TokenSchedule


def optimizer(*rates: float) -> torch.optim.SGD:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups)


def rates_of(scheduler: LayerTokenLR, steps: int) -> list[float]:
    """The rate of each step."""
    found = []
    for _ in range(steps):
        found.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


STYLES = st.sampled_from(("cosine", "linear", "constant"))


@given(STYLES, st.integers(0, 20), st.integers(1, 40), st.floats(0, 1), st.integers(1, 5), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_without_dropping_it_is_the_ordinary_schedule_in_tokens(
    style: str, warmup: int, decay: int, share: float, batch: int, layers: int
) -> None:
    full = TokenSchedule(64, 64, 0, total_layer_num=layers, batch_size=batch)
    each = full.layer_tokens(0)
    scheduler = LayerTokenLR(
        optimizer(0.5),
        full,
        warmup_layer_tokens=warmup * each,
        decay_layer_tokens=(warmup + decay) * each,
        decay_style=style,
        min_lr=0.5 * share,
    )
    ordinary = Schedule(0.5, 0.5 * share, style, warmup, warmup + decay)
    found = rates_of(scheduler, warmup + decay + 5)
    assert found == pytest.approx([ordinary(step) for step in range(len(found))], rel=1e-12, abs=1e-15)


@given(schedules(), st.integers(1, 60), STYLES)
@settings(deadline=None, max_examples=30)
def test_with_dropping_it_lags_behind(schedule: TokenSchedule, warmup: int, style: str) -> None:
    each = schedule.dense_layer_tokens(1)
    shape: dict[str, Any] = {"warmup_layer_tokens": warmup * each, "decay_layer_tokens": 3 * warmup * each,
                             "decay_style": style}  # fmt: skip
    curve = LayerTokenCurve(**shape)
    found = rates_of(LayerTokenLR(optimizer(1.0), schedule, **shape), 3 * warmup)
    for step, rate in enumerate(found):
        consumed = schedule.consumed_layer_tokens(step)
        assert rate == curve(consumed, 1.0)
        ordinary = curve(step * each, 1.0)
        if step <= warmup:
            assert rate <= ordinary
        elif consumed >= warmup * each:
            assert rate >= ordinary


def test_the_warm_up_ends_at_the_configured_layer_tokens() -> None:
    schedule = TokenSchedule(64, 256, 1000, total_layer_num=4, batch_size=2)
    wanted = 20 * schedule.dense_layer_tokens(1)
    steps = schedule.steps_to(wanted)
    found = rates_of(
        LayerTokenLR(optimizer(1.0), schedule, warmup_layer_tokens=wanted, decay_style="constant"), steps + 3
    )
    assert steps > 25
    assert found.index(1.0) == steps
    assert found[steps:] == [1.0] * 3
    rises = [after - before for before, after in itertools.pairwise(found[:steps])]
    assert min(rises) > 0


def test_groups_keep_their_own_peaks_and_factors() -> None:
    chosen = optimizer(1.0, 0.25)
    chosen.param_groups[1]["lr_mult"] = 0.5
    scheduler = LayerTokenLR(chosen, TokenSchedule(8, 8, 0, total_layer_num=1), decay_style="linear",
                             decay_layer_tokens=16, min_lr=0.5)  # fmt: skip
    assert scheduler.get_last_lr() == [1.0, 0.125]
    chosen.step()
    scheduler.step()
    assert [group["lr"] for group in chosen.param_groups] == [0.75, 0.125]  # the minimum is no rise


def test_a_counter_that_others_count_with_sets_the_rate() -> None:
    tokens = LayerTokens(TokenSchedule(4, 8, 2, 4, total_layer_num=3))
    scheduler = LayerTokenLR(optimizer(1.0), tokens, decay_style="linear", decay_layer_tokens=100)
    scheduler.optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [1.0]  # nobody counted
    tokens.count(0)
    tokens.count(1)  # left out by an overflow: its tokens are consumed, the rate moves on with the next step
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(1 - tokens.consumed / 100)]


def test_rates_held_in_tensors_stay_tensors() -> None:
    rate = torch.tensor(1.0)
    chosen = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=rate, foreach=True, capturable=True)
    scheduler = LayerTokenLR(chosen, TokenSchedule(8, 8, 0, total_layer_num=1), decay_style="linear",
                             decay_layer_tokens=16)  # fmt: skip
    scheduler.tokens.count(0)
    scheduler.apply()
    held = chosen.param_groups[0]["lr"]
    assert isinstance(held, torch.Tensor)
    assert float(held) == 0.5


@given(schedules(), st.integers(0, 60), st.integers(1, 60))
@settings(deadline=None, max_examples=30)
def test_a_resumed_run_goes_on_as_the_first(schedule: TokenSchedule, before: int, after: int) -> None:
    shape: dict[str, Any] = {
        "warmup_layer_tokens": 10 * schedule.batch_size * schedule.length,
        "decay_layer_tokens": 200 * schedule.batch_size * schedule.length,
        "min_lr": 0.1,
    }
    first = LayerTokenLR(optimizer(1.0), schedule, **shape)
    rates_of(first, before)
    state = first.state_dict()
    assert all(type(value) is int for value in state.values())
    tokens = LayerTokens(schedule)
    second = LayerTokenLR(optimizer(1.0), tokens, **shape)
    second.load_state_dict(state)
    assert (tokens.consumed, tokens.steps) == (schedule.consumed_layer_tokens(before), before)
    assert second.optimizer.param_groups[0]["lr"] == first.get_last_lr()[0]
    third = LayerTokenLR(optimizer(1.0), schedule, **shape)
    third.load_state_dict(state)
    assert rates_of(third, after) == rates_of(first, after)


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({}, 'decay_layer_tokens: needed with decay_style "cosine"'),
        ({"decay_layer_tokens": 5, "warmup_layer_tokens": 5}, "decay_layer_tokens 5: must be larger"),
        ({"decay_style": "root"}, 'decay_style "root": allowed are cosine, linear, constant'),
        ({"decay_style": "constant", "warmup_layer_tokens": -1}, "warmup_layer_tokens -1"),
        ({"decay_style": "constant", "min_lr": math.nan}, "min_lr nan"),
        ({"decay_style": "constant", "min_lr": 2.0}, "min_lr 2.0: must not be above the optimizer's lr 1.0"),
    ],
)
def test_a_learning_rate_that_contradicts_is_refused(given_: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        LayerTokenLR(optimizer(1.0), TokenSchedule(8, 8, 0, total_layer_num=1), **given_)
