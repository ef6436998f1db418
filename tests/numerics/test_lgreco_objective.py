"""What L-GreCo's planner takes: the time objective's regression and Accordion's defaults."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.lgreco import Accordion, error_budget, fit_synchronisation, plan_compression

# ---- time objective ----


def test_synchronisation_model_recovers_latency_and_coefficients():
    rng = np.random.default_rng(0)
    sizes = rng.uniform(1e5, 1e7, (400, 3))
    true = np.array([2e-9, 0.0, 8e-10])
    seconds = 5e-3 + sizes @ true + rng.normal(0, 1e-5, 400)
    model = fit_synchronisation(sizes, seconds)
    assert model.latency == pytest.approx(5e-3, rel=2e-3)
    assert np.allclose(model.seconds_per_byte, true, atol=2e-12) and min(model.seconds_per_byte) >= 0
    assert model.r_squared > 0.999 and model.samples == 400
    assert np.allclose(model.predict(sizes), seconds, atol=1e-4)


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_fit_is_the_least_squares_with_coefficients_not_negative(seed, buckets):
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0, 1, (30, buckets))
    seconds = sizes @ rng.normal(0, 1, buckets) + rng.normal(0, 0.1, 30) + rng.normal()
    model = fit_synchronisation(sizes, seconds)
    x = np.array([model.latency, *model.seconds_per_byte])
    slope = np.hstack([np.ones((30, 1)), sizes]).T @ (model.predict(sizes) - seconds)
    assert (x >= 0).all()
    assert (slope >= -1e-7).all() and np.abs(slope[x > 0]).max(initial=0) <= 1e-7  # Karush, Kuhn, Tucker


def test_slow_bucket_is_compressed_more():
    model = fit_synchronisation([[0, 0], [1, 0], [0, 1], [1, 1]], [1.0, 11.0, 2.0, 12.0])
    errors, sizes = [[0.0, 1.0]] * 2, [[10.0, 4.0], [20.0, 5.0]]
    assert plan_compression(errors, sizes, 1.0).tolist() == [0, 1]  # more bytes saved
    assert plan_compression(errors, model.costs(sizes, [0, 1]), 1.0).tolist() == [1, 0]  # more time saved


@pytest.mark.parametrize(
    ("sizes", "seconds", "message"),
    [
        ([[1.0]], [1.0, 2.0], "expected"),
        ([[1.0, 2.0]] * 2, [1.0, 2.0], "measure at least 3"),
        ([[1.0], [1.0], [1.0]], [1.0, 2.0, 3.0], "cannot tell the buckets apart"),
        ([[1.0], [2.0], [math.inf]], [1.0, 2.0, 3.0], "finite"),
    ],
)
def test_useless_measurements_are_refused(sizes, seconds, message):
    with pytest.raises(UserError, match=message):
        fit_synchronisation(sizes, seconds)


def test_costs_need_a_known_bucket_of_every_layer():
    model = fit_synchronisation([[0.0], [1.0]], [0.0, 1.0])
    with pytest.raises(UserError, match="layer 0 is in bucket 1"):
        model.costs([[1.0]], [1])
    with pytest.raises(UserError, match="1 layers, buckets 2"):
        model.costs([[1.0]], [0, 0])


# ---- Accordion ----


def test_accordion_sets_the_default_by_the_change_of_the_norm():
    accordion = Accordion(3, low=4, high=1, eta=0.5)
    assert accordion.defaults == [4, 4, 4]
    assert accordion.update([8.0, 8.0, 0.0]) == [4, 4, 4]  # nothing to compare with
    assert accordion.update([4.0, 5.0, 0.0]) == [4, 1, 1]
    assert accordion.update(torch.tensor([4.0, 9.0, 1.0])) == [1, 4, 4]
    assert accordion.update([4.0, 9.0, 1.0], learning_rate_cut=True) == [4, 4, 4]
    assert accordion.update([math.nan, 9.0, 1.0]) == [4, 1, 1]
    assert accordion.update([4.0, 9.0, 1.0]) == [1, 1, 1]  # against the last norm that was a number


def test_accordion_resumes():
    accordion = Accordion(2, low=[3, 5], high=[1, 2])
    accordion.update([1.0, 1.0])
    accordion.update([1.0, 9.0])
    resumed = Accordion(2, low=[3, 5], high=[1, 2])
    resumed.load_state_dict(accordion.state_dict())
    assert resumed.defaults == accordion.defaults == [1, 5]
    assert resumed.critical == [False, True]
    assert resumed.update([1.0, 8.0]) == accordion.update([1.0, 8.0]) == [1, 2]
    with pytest.raises(CheckpointError, match="2 layers, the model has 3"):
        Accordion(3, low=1, high=0).load_state_dict(accordion.state_dict())


def test_accordion_budget_follows_the_defaults():
    errors = [[0.5, 1.0], [0.25, 2.0]]
    accordion = Accordion(2, low=0, high=1)
    assert error_budget(errors, accordion.update([1.0, 1.0])) == 0.75
    assert error_budget(errors, accordion.update([1.0, 3.0])) == 1.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"eta": 1.0}, "eta=1.0"), ({"low": [1]}, "low="), ({"high": -1}, "high=-1")],
)
def test_accordion_refuses_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Accordion(2, **{"low": 1, "high": 0, **arguments})
    with pytest.raises(UserError, match="norms has 1 elements"):
        Accordion(2, low=1, high=0).update([1.0])
    with pytest.raises(UserError, match="is negative"):
        Accordion(1, low=1, high=0).update([-1.0])
