"""The learning-rate schedule: shape, limits, and its state."""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining.arguments import LR_DECAY_STYLES
from pretraining.schedule import LRScheduler, Schedule, schedule_from

from ds_efficient.errors import UserError


@st.composite
def schedules(draw: st.DrawFn, styles: tuple[str, ...] = LR_DECAY_STYLES) -> Schedule:
    peak = draw(st.floats(1e-6, 1.0))
    decay = draw(st.integers(2, 500))
    return Schedule(
        peak=peak,
        minimum=peak * draw(st.floats(0.0, 1.0)),
        style=draw(st.sampled_from(styles)),
        warmup_steps=draw(st.integers(0, decay - 1)),
        decay_steps=decay,
        warmup_init=peak * draw(st.floats(0.0, 1.0)),
    )


@given(schedules())
@settings(deadline=None)
def test_the_warm_up_rises_in_a_straight_line_to_the_peak(schedule: Schedule) -> None:
    rates = [schedule(step) for step in range(schedule.warmup_steps + 1)]
    assert rates[-1] == pytest.approx(schedule.peak)
    steps = [after - before for before, after in itertools.pairwise(rates)]
    if steps:
        assert rates[0] == schedule.warmup_init
        assert steps == pytest.approx(
            [(schedule.peak - schedule.warmup_init) / schedule.warmup_steps] * len(steps)
        )


@given(schedules())
@settings(deadline=None)
def test_after_the_warm_up_it_never_rises_and_stays_within_its_limits(schedule: Schedule) -> None:
    rates = [schedule(step) for step in range(schedule.warmup_steps, schedule.decay_steps + 20)]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(rates))
    slack = 1e-12 * schedule.peak
    assert all(schedule.minimum - slack <= rate <= schedule.peak + slack for rate in rates)


@given(schedules(styles=("linear", "cosine")))
@settings(deadline=None)
def test_the_decay_ends_at_the_minimum_and_stays_there(schedule: Schedule) -> None:
    assert schedule(schedule.decay_steps) == pytest.approx(schedule.minimum, abs=1e-9 * schedule.peak)
    assert schedule(schedule.decay_steps + 1000) == schedule.minimum


@given(schedules(styles=("linear", "cosine")))
@settings(deadline=None)
def test_no_step_jumps(schedule: Schedule) -> None:
    """Continuity at the end of the warm-up too: cosine's steepest step is pi/2 times the straight line's."""
    steps = range(schedule.warmup_steps, schedule.decay_steps)
    largest = 0.5 * math.pi * (schedule.peak - schedule.minimum) / len(steps)
    assert all(abs(schedule(step + 1) - schedule(step)) <= largest * 1.001 + 1e-15 for step in steps)


def test_values_by_hand() -> None:
    common = {"peak": 1.0, "minimum": 0.2, "warmup_steps": 4, "decay_steps": 12}
    assert Schedule(style="linear", **common)(8) == pytest.approx(0.6)
    assert Schedule(style="cosine", **common)(6) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5)))
    assert Schedule(style="inverse-square-root", **common)(9) == pytest.approx(2 / 3)
    assert Schedule(style="constant", **common)(100) == 1.0


def arguments(**given: Any) -> argparse.Namespace:
    defaults = {
        "min_lr": 0.0,
        "lr_decay_style": "linear",
        "lr_decay_iters": None,
        "lr_warmup_iters": 0,
        "lr_warmup_fraction": None,
        "lr_warmup_init": 0.0,
    }
    return argparse.Namespace(**{**defaults, **given})


def test_the_command_line_says_how_long() -> None:
    assert schedule_from(arguments(), 1.0, 50).decay_steps == 50
    assert schedule_from(arguments(lr_decay_iters=20), 1.0, 50).decay_steps == 20
    assert schedule_from(arguments(lr_warmup_fraction=0.1), 1.0, 50).warmup_steps == 5


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({"min_lr": 2.0}, "--min-lr 2.0"),
        ({"lr_warmup_iters": 50}, "--lr-warmup-iters 50"),
        ({"lr_warmup_iters": 10, "lr_decay_iters": 5}, "decay's 5 steps"),
    ],
)
def test_what_contradicts_is_refused(given_: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        schedule_from(arguments(**given_), 1.0, 50)


def optimizer() -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr_mult": 0.5}], lr=9.0)


@given(schedules(), st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None)
def test_a_restored_scheduler_goes_on_as_the_first(schedule: Schedule, before: int, after: int) -> None:
    first = LRScheduler(optimizer(), schedule)
    for _ in range(before):
        first.step()
    second = LRScheduler(optimizer(), schedule)
    second.load_state_dict(first.state_dict())
    assert second.get_lr() == first.get_lr() == second.get_last_lr()
    first.step(after)
    for _ in range(after):
        second.step()
    assert second.get_lr() == first.get_lr() == [schedule(before + after), 0.5 * schedule(before + after)]


def test_it_sets_the_rate_of_the_groups() -> None:
    chosen = optimizer()
    scheduler = LRScheduler(chosen, Schedule(1.0, 0.0, "linear", 0, 10))
    scheduler.step(5)
    assert [group["lr"] for group in chosen.param_groups] == [0.5, 0.25]
    chosen.param_groups[0]["lr"] = 7.0  # as when an optimizer's state is loaded over it
    scheduler.apply()
    assert scheduler.get_lr() == [0.5, 0.25]
