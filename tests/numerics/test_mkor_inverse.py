"""MKOR's inverse factors: rank-1 updates against explicit inverses, dense and factored, and the switch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.mkor import DenseInverse, FactoredInverse, HybridSwitch, rank1_inverse_update
from ds_efficient.mkor.inverse import precondition, printed_inverse_update, stabilize

DTYPES = (torch.float32, torch.float64)


def vectors(count: int, size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, size, generator=generator, dtype=torch.float64)


def smallest_eigenvalue(m: torch.Tensor) -> float:
    return float(torch.linalg.eigvalsh(m.double())[0])


@st.composite
def histories(draw) -> list[torch.Tensor]:
    """Some vectors of one size: zero, repeated, huge, tiny, unit vectors, random ones."""
    size = draw(st.integers(1, 12))
    found: list[torch.Tensor] = []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["zero", "repeat", "unit", "random"]))
        scale = 10.0 ** draw(st.sampled_from([-20, -3, 0, 0, 2, 4, 15]))
        if kind == "repeat" and found:
            found.append(found[draw(st.integers(0, len(found) - 1))])
        elif kind == "unit":
            found.append(scale * torch.eye(size, dtype=torch.float64)[draw(st.integers(0, size - 1))])
        elif kind == "zero":
            found.append(torch.zeros(size, dtype=torch.float64))
        else:
            found.append(vectors(1, size, draw(st.integers(0, 2**31)), scale)[0])
    return found


@pytest.mark.parametrize("gamma", [0.9, 0.95, 0.99])
def test_the_update_is_the_inverse_of_the_averaged_factor(gamma):
    size = 32
    m = factor = torch.eye(size, dtype=torch.float64)
    for v in vectors(200, size, 1):
        m = rank1_inverse_update(m, v, gamma)
        factor = gamma * factor + (1 - gamma) * torch.outer(v, v)
    exact = torch.linalg.inv(factor)
    assert (m - exact).abs().max() <= 1e-10 * exact.abs().max()
    assert torch.equal(m, m.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_update_is_exact_to_the_type(dtype):
    v = vectors(1, 20, 2)[0]
    exact = torch.linalg.inv(0.95 * torch.eye(20, dtype=torch.float64) + 0.05 * torch.outer(v, v))
    found = rank1_inverse_update(torch.eye(20, dtype=dtype), v, 0.95)
    assert (found - exact).abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=60)
@given(history=histories(), gamma=st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]))
def test_inverses_stay_symmetric_and_positive_definite_whatever_the_vectors(dtype, history, gamma):
    size = len(history[0])
    dense, factored = DenseInverse(size, dtype), FactoredInverse(size, size, dtype)
    for v in history:
        for factor in (dense, factored):
            factor.stabilize(10.0, 0.9)
            factor.update(v, gamma)
            assert torch.isfinite(factor.dense()).all()
        assert torch.equal(dense.m, dense.m.T)
        assert smallest_eigenvalue(dense.m) > 0
        assert smallest_eigenvalue(factored.dense()) > 0
        assert float(factored.a) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
def test_half_types_keep_the_inverse_positive_definite(dtype, scale):
    factor = DenseInverse(24, dtype)
    for v in vectors(150, 24, 3, scale):
        factor.stabilize(10.0, 0.9)
        factor.update(v, 0.95)
        assert smallest_eigenvalue(factor.m) > 0
    assert not torch.equal(factor.m, torch.eye(24, dtype=dtype))


@settings(deadline=None, max_examples=40)
@given(history=histories())
def test_gamma_of_one_leaves_the_identity(history):
    size = len(history[0])
    for factor in (DenseInverse(size), FactoredInverse(size, size)):
        for v in history:
            factor.update(v, 1.0)
        assert torch.equal(factor.dense(), torch.eye(size))


def test_a_zero_vector_divides_by_gamma():
    m = rank1_inverse_update(torch.eye(5, dtype=torch.float64), vectors(1, 5, 4)[0], 0.9)
    assert torch.equal(rank1_inverse_update(m, torch.zeros(5, dtype=torch.float64), 0.5), m / 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_vector_that_is_not_finite_changes_nothing(bad, form):
    factor = DenseInverse(6) if form == "dense" else FactoredInverse(6, 4)
    factor.update(vectors(1, 6, 5)[0], 0.9)
    before = factor.dense().clone()
    v = torch.ones(6)
    v[3] = bad
    factor.update(v, 0.9)
    assert torch.equal(factor.dense(), before)


def test_the_printed_formula_diverges_and_is_no_inverse():
    size, gamma = 32, 0.95
    printed = right = torch.eye(size, dtype=torch.float64)
    first = vectors(1, size, 6)[0]
    one = printed_inverse_update(printed, first, gamma)
    factor = gamma * torch.eye(size, dtype=torch.float64) + (1 - gamma) * torch.outer(first, first)
    assert (one @ factor - torch.eye(size)).abs().max() > 0.3
    for v in vectors(200, size, 6):
        printed = printed_inverse_update(printed, v, gamma)
        right = rank1_inverse_update(right, v, gamma)
    assert printed.abs().max() > 1e30
    assert right.abs().max() < 100


@settings(deadline=None, max_examples=60)
@given(threshold=st.floats(0.5, 20), zeta=st.sampled_from([0.0, 0.5, 0.9]), seed=st.integers(0, 1000))
def test_the_stabiliser_fires_above_its_threshold_alone(threshold, zeta, seed):
    half = vectors(6, 6, seed)
    m = half @ half.T + torch.eye(6, dtype=torch.float64)
    result, fired = stabilize(m, threshold, zeta)
    assert bool(fired) == bool(m.abs().max() > threshold)
    eye = torch.eye(6, dtype=torch.float64)
    assert torch.allclose(result, zeta * m + (1 - zeta) * eye if fired else m, rtol=1e-14, atol=1e-14)
    assert smallest_eigenvalue(result) > 0
    if zeta == 0 and fired:
        assert torch.equal(result, eye)


@pytest.mark.parametrize("kind", ["repeated", "around a mean", "huge"])
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_long_histories_leave_a_large_inverse_positive_definite_in_fp32(kind, form):
    factor = DenseInverse(64) if form == "dense" else FactoredInverse(64, 16)
    mean = vectors(1, 64, 20)[0]
    for v in vectors(120, 64, 21):
        factor.stabilize(10.0, 0.9)
        factor.update({"repeated": 1e3 * mean, "around a mean": mean + 0.1 * v, "huge": 1e5 * v}[kind], 0.95)
    assert smallest_eigenvalue(factor.dense()) > 0
    assert factor.dense().abs().max() <= 10 / 0.95 + 1e-3


@pytest.mark.parametrize("gamma", [0.3, 0.95])
def test_a_half_type_never_overflows(gamma):
    factor = DenseInverse(4, torch.float16)
    for _ in range(300):
        factor.update(torch.zeros(4), gamma)
    assert torch.isfinite(factor.m).all() and factor.m.max() > 1e4


def test_the_stabiliser_bounds_directions_that_nothing_excites():
    v = torch.zeros(8)
    v[0] = 1
    free, bound = DenseInverse(8), DenseInverse(8)
    for _ in range(200):
        free.update(v, 0.95)
        bound.stabilize(10.0, 0.9)
        bound.update(v, 0.95)
    assert free.m.max() > 28000
    assert bound.m.max() <= 10 / 0.95 + 1e-3
    assert int(bound.hits) > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 3e-3)])
def test_the_factored_form_is_the_dense_one_below_its_rank(dtype, tolerance):
    size, count = 40, 12
    dense, factored = DenseInverse(size, dtype), FactoredInverse(size, count, dtype)
    history = vectors(count, size, 7)
    x = vectors(size, 3, 8).to(dtype)
    for v in [*history, *history.flip(0), torch.zeros(size), history[0] - 2 * history[3]]:
        for factor in (dense, factored):
            factor.stabilize(2.0, 0.9)
            factor.update(v, 0.95)
        assert (dense.m - factored.dense()).abs().max() <= tolerance * dense.m.abs().max()
        assert torch.allclose(
            factored.largest_entry().to(dtype), dense.m.abs().max(), rtol=tolerance, atol=tolerance
        )
    assert torch.allclose(dense.times(x), factored.times(x), rtol=tolerance, atol=30 * tolerance)
    assert int(dense.hits) == int(factored.hits) > 0
    assert factored.rank == count and not factored.truncations


def test_a_truncation_changes_the_inverse_by_the_error_it_reports():
    size, rank = 30, 5
    factored = FactoredInverse(size, rank, torch.float64)
    for v in vectors(rank, size, 9):
        factored.update(v, 0.95)
    for v in vectors(20, size, 10):
        exact = DenseInverse(size, torch.float64)
        exact.m = factored.dense()
        exact.update(v, 0.95)
        factored.update(v, 0.95)
        difference = torch.linalg.matrix_norm(factored.dense() - exact.m, 2)
        relative = difference / torch.linalg.matrix_norm(exact.m, 2)
        assert abs(float(relative) - factored.truncation_error) <= 1e-9
        basis = factored.basis
        assert torch.allclose(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-12)
        assert smallest_eigenvalue(factored.dense()) > 0
    assert factored.rank == rank and factored.truncations == 20
    assert 0 < factored.truncation_error <= factored.largest_error < 1


def test_a_truncation_drops_the_direction_that_matters_least():
    factored = FactoredInverse(6, 2, torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    for strength, axis in ((10.0, 0), (8.0, 1), (0.5, 2)):
        factored.update(strength * eye[axis], 0.9)
    assert torch.allclose(factored.dense()[2, 2], factored.a)
    assert (factored.dense().diagonal()[:2] < 0.3 * factored.a).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=40)
@given(history=histories(), out=st.integers(1, 6), seed=st.integers(0, 1000))
def test_preconditioning_keeps_the_norm_and_descends(dtype, history, out, seed):
    left, right = DenseInverse(out, dtype), DenseInverse(len(history[0]), dtype)
    for v in history:
        right.stabilize(10.0, 0.9)
        right.update(v.clamp(-3, 3), 0.95)
    for v in vectors(3, out, seed):
        left.update(v, 0.9)
    gradient = vectors(out, right.size, seed + 1).to(dtype)
    result = precondition(gradient, left, right)
    assert torch.linalg.vector_norm(result).item() == pytest.approx(
        torch.linalg.vector_norm(gradient).item(), rel=1e-5
    )
    assert (result * gradient).sum() > 0
    assert torch.equal(precondition(torch.zeros_like(gradient), left, right), torch.zeros_like(gradient))
    left.m = -left.m  # what rounding could do to a half type, at worst
    assert torch.equal(precondition(gradient, left, right), gradient)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_state_round_trip_goes_on_bit_for_bit(form):
    def fresh():
        return DenseInverse(9) if form == "dense" else FactoredInverse(9, 4)

    first, second = fresh(), fresh()
    history = vectors(12, 9, 11)
    for v in history[:7]:
        first.stabilize(1.5, 0.9)
        first.update(v, 0.9)
    second.load_state_dict(first.state_dict())
    for factor in (first, second):
        for v in history[7:]:
            factor.stabilize(1.5, 0.9)
            factor.update(v, 0.9)
    assert torch.equal(first.dense(), second.dense())
    assert int(first.hits) == int(second.hits)
    for other in (DenseInverse(8), DenseInverse(9, torch.float64), FactoredInverse(8, 4)):
        with pytest.raises(CheckpointError, match="inverse factor"):
            other.load_state_dict(first.state_dict())


def test_arguments_out_of_range_are_refused_by_name():
    eye = torch.eye(3)
    for gamma in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(UserError, match="gamma"):
            rank1_inverse_update(eye, torch.ones(3), gamma)
    with pytest.raises(UserError, match="threshold"):
        stabilize(eye, 0.0, 0.9)
    with pytest.raises(UserError, match="zeta"):
        stabilize(eye, 1.0, 1.0)
    with pytest.raises(UserError, match="formula"):
        DenseInverse(3, formula="other")
    with pytest.raises(UserError, match="max_rank"):
        FactoredInverse(3, 0)
    with pytest.raises(UserError, match="state_dtype"):
        FactoredInverse(3, 2, torch.bfloat16)
    for wrong in ({"beta": 1.0}, {"ema": 0}, {"min_steps": -1}):
        with pytest.raises(UserError, match=f"hybrid.{next(iter(wrong))}"):
            HybridSwitch(**wrong)


def knee(step: int) -> float:
    return 5.0 - min(step, 40) * 0.1 - 0.0001 * step


def test_the_hybrid_switches_once_after_the_knee():
    switch = HybridSwitch(beta=0.1, ema=5, min_steps=10)
    seen = [switch.observe(knee(step)) for step in range(100)]
    assert switch.switched_at is not None and 41 <= switch.switched_at <= 60
    assert seen == [step >= switch.switched_at for step in range(100)]
    assert all(switch.observe(5.0 - step) for step in range(5))  # for good


def test_the_hybrid_waits_for_its_fewest_steps_and_ignores_losses_that_are_not_finite():
    flat = HybridSwitch(beta=0.5, ema=2, min_steps=30)
    at = [flat.observe(1 / (1 + step)) for step in range(60)].index(True)
    assert at == flat.switched_at == 30
    steady = HybridSwitch(beta=0.5, ema=2, min_steps=3)
    losses = [10.0 - step if step % 7 else math.nan for step in range(50)]
    assert not any(steady.observe(loss) for loss in losses)


@pytest.mark.parametrize("saved_at", [3, 30, 90])
def test_the_hybrid_decides_the_same_after_a_resume(saved_at):
    straight, first = HybridSwitch(ema=5, min_steps=10), HybridSwitch(ema=5, min_steps=10)
    for step in range(100):
        straight.observe(knee(step))
    for step in range(saved_at):
        first.observe(knee(step))
    second = HybridSwitch(ema=5, min_steps=10)
    second.load_state_dict(first.state_dict())
    for step in range(saved_at, 100):
        second.observe(knee(step))
    assert straight.switched_at is not None
    assert second.state_dict() == straight.state_dict()
    with pytest.raises(CheckpointError, match="missing"):
        second.load_state_dict({"step": 1})
