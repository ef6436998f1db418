"""The factors of one rank: both forms agree, multiply many gradients, say how they are, come back whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_efficient.errors import CheckpointError
from ds_efficient.mkor.bank import FactorBank
from ds_efficient.mkor.inverse import DenseInverse, precondition

SIZES = {"a": (6, 5), "b": (9, 7), "c": (6, 5)}


def bank(**changes: Any) -> FactorBank:
    settings: dict[str, Any] = {
        "sides": "both",
        "form": "dense",
        "max_rank": 16,
        "dtype": torch.float32,
        "operand_dtype": torch.float32,
        "gamma": 0.9,
        "threshold": 1.3,
        "zeta": 0.5,
        "device": torch.device("cpu"),
    }
    return FactorBank(SIZES, **(settings | changes))


def vectors(seed: int) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(seed)
    return {n: {"left": torch.randn(o), "right": torch.randn(i)} for n, (o, i) in SIZES.items()}


def gradients() -> list[tuple[Tensor, Tensor | None]]:
    torch.manual_seed(77)
    return [(torch.randn(6, 4), torch.randn(6)), (torch.randn(9, 7), None), (torch.randn(6, 5), None)]


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("sides", ["both", "right"])
def test_both_forms_do_what_the_readable_factors_do(form: str, sides: str) -> None:
    made = bank(form=form, sides=sides)
    by_hand = {n: {"left": DenseInverse(o), "right": DenseInverse(i)} for n, (o, i) in SIZES.items()}
    for seed in range(6):
        found = vectors(seed)
        made.update(found)
        for name, pair in by_hand.items():
            for side, factor in pair.items():
                factor.stabilize(1.3, 0.5)
                factor.update(found[name][side], 0.9)
    given = gradients()
    whole = [weight if bias is None else torch.cat([weight, bias[:, None]], 1) for weight, bias in given]
    expected = []
    for name, gradient in zip(SIZES, whole, strict=True):
        left = by_hand[name]["left"] if sides == "both" else None
        expected.append(precondition(gradient, left, by_hand[name]["right"]))
    sums = made.precondition(list(SIZES), given)
    for (weight, bias), wanted, before, row in zip(given, expected, whole, sums, strict=True):
        result = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        assert torch.allclose(result, wanted, atol=2e-5)
        assert row[0] == pytest.approx(float(before.square().sum()), rel=1e-5)
    hits = [int(by_hand[name][side].hits) for name in SIZES for side in made.sides]
    assert made.hits.tolist() == hits and sum(hits) > 0
    assert made.taken.tolist() == [6] * len(hits)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_conditions_are_those_of_the_eigenvalues(form: str) -> None:
    made = bank(form=form)
    for seed in range(4):
        made.update(vectors(seed))
    found = made.conditions()
    eye = {size: torch.eye(size) for pair in SIZES.values() for size in pair}
    exact = []
    for name, (rows, columns) in SIZES.items():
        for side, size in (("left", rows), ("right", columns)):
            times: Any = made._multiplier(name, side)
            values = torch.linalg.eigvalsh(times.times(eye[size]).double())
            exact.append(float(values[-1] / values[0]))
    assert found == pytest.approx(exact, rel=0.05) and min(exact) > 1.5


def test_a_vector_that_is_not_finite_leaves_both_factors_of_its_block() -> None:
    made = bank()
    before = made.state("b")
    found = vectors(0)
    found["b"]["left"][2] = math.nan
    made.update(found)
    after = made.state("b")
    for side in ("left", "right"):
        assert torch.equal(after["factors"][side]["m"], before["factors"][side]["m"])
    assert made.left_out.tolist() == [0, 0, 1, 1, 0, 0] and made.taken.tolist() == [1, 1, 0, 0, 1, 1]


def test_a_sparse_gradient_stays_sparse_and_keeps_its_norm() -> None:
    made = bank()
    made.update(vectors(0))
    weight, bias = torch.randn(6, 4), torch.randn(6)
    mask = torch.tensor([[1.0, 0, 1, 0]] * 6)
    weight *= mask
    (result, offset), sums = made.precondition_sparse("a", (weight, bias), lambda dense: dense * mask)
    assert offset is not None and torch.equal(result * mask, result)
    norm = weight.square().sum() + bias.square().sum()
    assert float(result.square().sum() + offset.square().sum()) == pytest.approx(float(norm), rel=1e-5)
    assert 0 < float(sums[2]) < float(sums[0])


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_states_come_back_to_the_bit_and_only_into_what_they_fit(form: str) -> None:
    made, again = bank(form=form, max_rank=3), bank(form=form, max_rank=3)
    for seed in range(5):
        made.update(vectors(seed))
    for name in SIZES:
        again.load(name, made.state(name))
    for one in (made, again):
        one.update(vectors(9))
    first, second = gradients(), gradients()
    made.precondition(list(SIZES), first)
    again.precondition(list(SIZES), second)
    for (weight, bias), (other, other_bias) in zip(first, second, strict=True):
        assert torch.equal(weight, other)
        assert bias is None or (other_bias is not None and torch.equal(bias, other_bias))
    assert torch.equal(made.hits, again.hits)
    for changes in ({"sides": "left"}, {"form": "dense" if form == "factored" else "factored"}):
        with pytest.raises(CheckpointError, match="mkor: a: "):
            bank(**changes).load("a", made.state("a"))
