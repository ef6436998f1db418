"""Low-rank inverse factors updated together: the dense form, truncation, guards, state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.core.keys import Key
from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.mkor.factored import FactoredInverse
from ds_efficient.ops import keyed_random, mkor
from ds_efficient.ops import mkor_reference as reference
from ds_efficient.ops.mkor_factored import FactoredFactors, damping

RULE = {"gamma": 0.95, "threshold": 3.0, "zeta": 0.8}


def vectors(step: int, sizes: list[int], length: float = 1.0) -> torch.Tensor:
    """A mean of their own and noise for each factor."""
    parts = []
    for index, size in enumerate(sizes):
        mean = keyed_random.normal(Key(1).fold(index), (size,))
        parts.append(length * (mean + 0.5 * keyed_random.normal(Key(2).fold(index).fold(step), (size,))))
    return torch.cat(parts)


def dense_update(matrix: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same in float64 with a matrix."""
    most = matrix.abs().max()
    return reference.updated(
        matrix, v.double(), most, RULE["gamma"], RULE["threshold"], RULE["zeta"], torch.float32
    )[0]


@pytest.mark.parametrize(("dtype", "bound"), ((torch.float64, 1e-11), (torch.float32, 3e-5)))
def test_exact_until_the_rank_limit_and_for_ever_where_it_is_the_size(dtype, bound):
    sizes, limit = [40, 9, 40, 12], 12
    factors = FactoredFactors(sizes, limit, dtype=dtype)
    matrices = [torch.eye(size, dtype=torch.float64) for size in sizes]
    for step in range(30):
        v = vectors(step, sizes, 0.6)
        factors.update_(v, **RULE)
        matrices = [dense_update(m, part) for m, part in zip(matrices, v.split(sizes), strict=True)]
        for index, matrix in enumerate(matrices):
            if step < limit or sizes[index] <= limit:
                error = (factors.dense(index) - matrix).abs().max() / matrix.abs().max()
                assert error < bound, (step, index, float(error))
    assert factors.rank.tolist() == [12, 9, 12, 12]
    assert [count > 0 for count in factors.truncations.tolist()] == [True, False, True, False]


@settings(deadline=None, max_examples=10)
@given(st.integers(2, 12), st.sampled_from((0.1, 1.0, 30.0)), st.integers(0, 1000))
def test_truncation_drops_what_the_single_form_drops(limit, length, seed):
    size = 24
    single = FactoredInverse(size, limit, torch.float64)
    factors = FactoredFactors([size], limit, dtype=torch.float64)
    for step in range(20):
        v = vectors(1000 * seed + step, [size], length)
        single.stabilize(RULE["threshold"], RULE["zeta"])
        single.update(v, RULE["gamma"])
        factors.update_(v, **RULE)
        assert torch.linalg.eigvalsh(factors.dense(0)).min() > 0
    # of nearly equal directions each form may drop another one
    error = (single.dense() - factors.dense(0)).abs().max() / single.dense().abs().max()
    assert error < 1e-3
    assert abs(single.truncation_error - float(factors.truncation_error[0])) < 1e-3


def test_the_measured_loss_is_the_distance_to_the_exact_update_in_the_spectral_norm():
    size, limit = 30, 5
    factors = FactoredFactors([size], limit, dtype=torch.float64)
    for step in range(15):
        before = factors.dense(0)
        v = vectors(step, [size])
        factors.update_(v, **RULE)
        if step >= limit:
            exact = dense_update(before, v)
            lost = torch.linalg.matrix_norm(factors.dense(0) - exact, 2) / factors.a[0]
            torch.testing.assert_close(factors.truncation_error[0], lost, rtol=1e-6, atol=1e-12)
    assert factors.largest_error[0] >= factors.truncation_error[0] > 0


def test_bases_stay_orthonormal_and_the_form_positive_definite_over_many_truncations():
    sizes = [64, 64]
    factors = FactoredFactors(sizes, 8)
    for step in range(200):
        factors.update_(vectors(step, sizes, 100.0), **RULE)
    for index in range(2):
        basis = factors.state(index)["basis"].double()
        assert (basis.mT @ basis - torch.eye(8)).abs().max() < 1e-5
        assert torch.linalg.eigvalsh(factors.dense(index)).min() > 0
        torch.testing.assert_close(
            factors.largest_entry()[index], factors.dense(index).abs().max(), rtol=1e-4, atol=0
        )


def test_outcomes_and_vectors_that_are_zero_or_not_finite():
    sizes = [10, 10, 6]
    factors = FactoredFactors(sizes, 4)
    v = vectors(0, sizes)
    v[3], v[10:20] = torch.nan, 0
    assert factors.update_(v, **RULE).tolist() == [mkor.LEFT, mkor.UPDATED, mkor.UPDATED]
    assert torch.equal(factors.dense(0), torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(factors.dense(1), torch.eye(10, dtype=torch.float64) / 0.95)
    assert factors.rank.tolist() == [0, 0, 1]
    found = [factors.update_(torch.zeros(26), **RULE).tolist() for _ in range(30)]
    assert found[0] == [mkor.UPDATED] * 3
    assert all(mkor.BLENDED in (row[index] for row in found) for index in range(3))
    assert factors.a.max() < 4


@pytest.mark.parametrize("length", (1e-30, 1e15, 1e30))
def test_vectors_of_any_length(length):
    factors = FactoredFactors([20], 6)
    for step in range(10):
        factors.update_(vectors(step, [20], length), **RULE)
        assert torch.linalg.eigvalsh(factors.dense(0)).min() > 0


def test_gamma_one_changes_nothing():
    factors = FactoredFactors([20], 3)
    for step in range(6):
        factors.update_(vectors(step, [20]), **RULE)
    before = factors.dense(0)
    for step in range(6):
        factors.update_(vectors(step, [20]), gamma=1.0, threshold=100.0, zeta=0.8)
    assert torch.equal(factors.dense(0), before)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_operands_give_the_matrix_up_to_damping_and_rounding_and_stay_definite(dtype):
    factors = FactoredFactors([50], 12, operand_dtype=dtype)
    for step in range(25):
        factors.update_(vectors(step, [50], 100.0), **RULE)
    w = factors.operand(0)
    assert w.dtype == dtype and w.shape == (50, 12)
    share = damping(dtype)
    made = torch.eye(50) - w.double() @ w.double().mT
    expected = (1 - share) * factors.dense(0) / factors.a[0] + share * torch.eye(50)
    assert torch.linalg.matrix_norm(made - expected, 2) < 2 * torch.finfo(dtype).eps
    assert torch.linalg.eigvalsh(made).min() > 0
    x = keyed_random.normal(Key(9), (50, 3))
    torch.testing.assert_close(
        factors.times(0, x).double(), factors.dense(0) @ x.double(), rtol=1e-4, atol=1e-4
    )


def test_a_state_goes_on_with_the_same_bits_in_another_collection():
    sizes = [20, 33, 20]
    first = FactoredFactors(sizes, 5)
    for step in range(9):
        first.update_(vectors(step, sizes), **RULE)
    second = FactoredFactors(sizes, 5)
    for index in range(3):
        second.load_state(index, first.state(index))
        assert torch.equal(second.operand(index), first.operand(index))
    for step in range(9, 14):
        v = vectors(step, sizes)
        assert torch.equal(first.update_(v, **RULE), second.update_(v, **RULE))
    for index in range(3):
        for name, value in first.state(index).items():
            assert torch.equal(value, second.state(index)[name]), name


@pytest.mark.parametrize(
    ("sizes", "limit", "dtype", "message"),
    (
        ([4], 0, torch.float32, "max_rank=0"),
        ([4, 0], 2, torch.float32, r"sizes=\[4, 0\]"),
        ([4], 2, torch.bfloat16, "float64"),
    ),
)
def test_bad_arguments_are_named(sizes, limit, dtype, message):
    with pytest.raises(UserError, match=message):
        FactoredFactors(sizes, limit, dtype=dtype)


def test_bad_calls_and_states_are_named():
    factors = FactoredFactors([4, 6], 2)
    with pytest.raises(UserError, match="gamma=0"):
        factors.update_(torch.zeros(10), gamma=0.0, threshold=1.0, zeta=0.5)
    with pytest.raises(UserError, match=r"expected \(10,\)"):
        factors.update_(torch.zeros(9), **RULE)
    with pytest.raises(CheckpointError, match=r"inverse factor 1: \(4, 2\)"):
        factors.load_state(1, factors.state(0))
    with pytest.raises(CheckpointError, match="no factored form"):
        factors.load_state(0, {})
