"""Rank-1 updates of inverse factors: the inverse in float64, guards, the contract of operators."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mkor_factors import DTYPES, Factors
from torch._subclasses import FakeTensorMode

from ds_efficient.core.keys import Key
from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.mkor.inverse import rank1_inverse_update
from ds_efficient.ops import keyed_random, mkor, native
from ds_efficient.ops import mkor_reference as reference

BACKENDS = ("native", "reference")
RULE = (0.9, 3.0, 0.8)
both = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def run(
    factors: Factors, rule: tuple[float, float, float], backend: str
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Matrices, largest entries and outcomes after a call; ``factors`` stay as they are."""
    matrices, largest = [matrix.clone() for matrix in factors.matrices], factors.largest.clone()
    gamma, threshold, zeta = rule
    outcome = mkor.update_(
        matrices, factors.vectors, largest, gamma=gamma, threshold=threshold, zeta=zeta, backend=backend
    )
    assert outcome.dtype == torch.int32 and outcome.shape == (len(matrices),)
    return matrices, largest, outcome


# ---- the update ----


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.one_of(st.integers(1, 70), st.sampled_from((128, 515))), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from((0.3, 0.9, 0.95, 1.0)),
    st.sampled_from((0.0, 1e-30, 1e-3, 1.0, 1e4)),
    st.integers(0, 2**32),
)
def test_native_code_updates_as_the_reference_in_float64(sizes, dtype, gamma, length, seed):
    factors = Factors.draw(sizes, dtype, seed, entry=(0.5, 2.9, 3.1, 50.0), length=length)
    rule = (gamma, 3.0, 0.8)
    factors.check(*run(factors, rule, "native"), rule)


@pytest.mark.parametrize(("gamma", "steps", "bound"), ((0.5, 25, 1e-6), (0.95, 60, 1e-11)))
def test_the_reference_keeps_the_inverse_in_float64(gamma, steps, bound):
    size = 32
    factors = Factors.draw([size] * steps, torch.float32, 4)
    inverse, mean = torch.eye(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    for vector in factors.vectors.double().split(size):
        one = torch.ones((), dtype=torch.float64)
        inverse, largest, outcome = reference.updated(inverse, vector, one, gamma, math.inf, 1.0)
        mean = gamma * mean + (1 - gamma) * torch.outer(vector, vector)
        assert outcome == mkor.UPDATED and largest == inverse.abs().max()
        assert torch.linalg.eigvalsh(inverse).min() > 0
    assert (inverse @ mean - torch.eye(size, dtype=torch.float64)).abs().max() < bound


@both
def test_many_updates_in_float32_stay_the_inverse(backend):
    size, gamma, steps = 48, 0.95, 40
    mean = torch.eye(size, dtype=torch.float64)
    matrix, largest = torch.eye(size), torch.ones(1)
    for step in range(steps):
        vector = Factors.draw([size], torch.float32, step).vectors
        mkor.update_([matrix], vector, largest, gamma=gamma, backend=backend)
        mean = gamma * mean + (1 - gamma) * torch.outer(vector.double(), vector.double())
    expected = torch.linalg.inv(mean)
    assert torch.equal(matrix, matrix.T) and largest == matrix.abs().max()
    assert (matrix.double() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.linalg.eigvalsh(matrix.double()).min() > 0


@both
@every_dtype
def test_zero_vectors_divide_by_gamma_and_gamma_one_changes_nothing(backend, dtype):
    factors = Factors.draw((5, 40), dtype, 5)
    factors.vectors[:5] = 0
    matrices, _, outcome = run(factors, (0.5, math.inf, 1.0), backend)
    assert torch.equal(matrices[0], factors.matrices[0] * 2) and outcome.tolist() == [mkor.UPDATED] * 2
    matrices, largest, _ = run(factors, (1.0, math.inf, 1.0), backend)
    assert all(torch.equal(a, b) for a, b in zip(matrices, factors.matrices, strict=True))
    assert torch.equal(largest, factors.largest)


@both
def test_the_blend_fires_above_the_threshold_only(backend):
    factors = Factors.draw((20, 20, 20), torch.float32, 6, entry=(2.999, 3.0, 3.001))
    factors.largest.copy_(torch.tensor((2.999, 3.0, 3.001)))
    assert run(factors, RULE, backend)[2].tolist() == [mkor.UPDATED, mkor.UPDATED, mkor.BLENDED]
    matrices, _, _ = run(factors, (1.0, 3.0, 0.0), backend)
    assert torch.equal(matrices[2], torch.eye(20)) and torch.equal(matrices[1], factors.matrices[1])


@both
@every_dtype
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_vectors_that_are_not_finite_leave_their_factor_alone(backend, dtype, bad):
    factors = Factors.draw((30, 17, 8), dtype, 7, entry=(2.0, 9.0, 2.0))
    factors.vectors[33] = bad
    matrices, largest, outcome = run(factors, RULE, backend)
    assert outcome.tolist() == [mkor.UPDATED, mkor.LEFT, mkor.UPDATED]
    assert torch.equal(matrices[1], factors.matrices[1]) and largest[1] == factors.largest[1]
    factors.check(matrices, largest, outcome, RULE, left=(1,))


@both
def test_products_that_overflow_and_huge_matrices_are_left_alone_and_indefinite_ones_start_again(backend):
    factors = Factors.draw((12, 12, 12, 12), torch.float32, 8)
    factors.vectors[:12] = 3e38
    factors.matrices[1].neg_()
    factors.matrices[2].fill_diagonal_(3.3e38)
    factors.vectors[24:36] = 0
    factors.largest[2] = 3.3e38
    matrices, largest, outcome = run(factors, (0.9, math.inf, 1.0), backend)
    assert outcome.tolist() == [mkor.LEFT, mkor.RESET, mkor.LEFT, mkor.UPDATED]
    for index in (0, 2):
        assert torch.equal(matrices[index], factors.matrices[index])
        assert largest[index] == factors.largest[index]
    assert torch.equal(matrices[1], torch.eye(12)) and largest[1] == 1


@both
@every_dtype
def test_along_a_long_vector_the_matrix_keeps_what_rounding_cannot_turn_negative(backend, dtype):
    size, length = 40, 1e6
    factors = Factors.draw((size,), dtype, 14, length=length)
    (matrix,), _, outcome = run(factors, (0.9, math.inf, 1.0), backend)
    v = factors.vectors.double() / factors.vectors.double().norm()
    kept = float(v @ matrix.double() @ v / factors.largest[0].double())
    eps = torch.finfo(dtype).eps
    assert outcome.tolist() == [mkor.UPDATED]
    # 32 eps, up to the rounding of the entries: at most half an epsilon each of a matrix of norm about 1
    assert 24 * eps <= kept <= 40 * eps


@both
@every_dtype
@pytest.mark.parametrize("length", (0.0, 1e-3, 1.0, 1e3, 1e6))
def test_one_rule_with_the_single_matrix_form(backend, dtype, length):
    factors = Factors.draw((24,), dtype, 17, length=length)
    (matrix,), _, _ = run(factors, (0.9, math.inf, 1.0), backend)
    expected = rank1_inverse_update(factors.matrices[0], factors.vectors, 0.9)
    error = (matrix.double() - expected.double()).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * expected.abs().max().double()


@every_dtype
@pytest.mark.parametrize("kind", ("normal", "mean", "repeated", "huge", "heavy"))
def test_stabilised_matrices_stay_positive_definite_in_every_type(dtype, kind):
    size = 32
    mean = keyed_random.normal(Key(15), (size,))
    matrix, largest = torch.eye(size, dtype=dtype), torch.ones(1)
    for step in range(120):
        noise = keyed_random.normal(Key(16).fold(step), (size,))
        v = {
            "normal": noise, "mean": 3 * mean + 0.3 * noise, "repeated": mean, "huge": 1e4 * noise,
            "heavy": noise * torch.exp(2 * noise.flip(0)),
        }[kind]  # fmt: skip
        outcome = mkor.update_([matrix], v, largest, gamma=0.95, threshold=10.0, zeta=0.9, backend="native")
        assert outcome[0] in (mkor.UPDATED, mkor.BLENDED)
        if step % 20 == 19:
            assert torch.linalg.eigvalsh(matrix.double()).min() > 0


def test_large_finite_vectors_do_not_overflow():
    factors = Factors.draw((64,), torch.float32, 9, length=1e30)
    matrices, largest, outcome = run(factors, RULE, "native")
    factors.check(matrices, largest, outcome, RULE)
    assert outcome.tolist() == [mkor.UPDATED]


def test_results_do_not_depend_on_the_number_of_threads():
    factors = Factors.draw((300, 700, 1, 513), torch.float32, 10, entry=(2.0, 9.0))
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            matrices, largest, _ = run(factors, RULE, "native")
            made.append(torch.cat([*(matrix.flatten() for matrix in matrices), largest]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


# ---- the contract ----


@both
def test_operator_contract(backend):
    factors = Factors.draw((9, 4), torch.float32, 11)
    arguments = (factors.matrices, factors.vectors, factors.largest, *RULE, backend)
    torch.library.opcheck(torch.ops.ds_efficient.mkor_update_.default, arguments)


def test_fake_and_meta_tensors_give_outcomes_without_a_library():
    with FakeTensorMode():
        outcome = mkor.update_([torch.empty(8, 8)], torch.empty(8), torch.empty(1), gamma=0.9)
    assert outcome.shape == (1,) and outcome.dtype == torch.int32


@both
def test_no_factors_give_no_outcomes(backend):
    outcome = mkor.update_([], torch.empty(0), torch.empty(0), gamma=0.9, backend=backend)
    assert outcome.shape == (0,) and outcome.dtype == torch.int32


def test_parameters_are_updated_without_a_gradient():
    matrix = torch.nn.Parameter(torch.eye(3))
    mkor.update_([matrix], torch.ones(3), torch.ones(1), gamma=0.5)
    assert matrix.requires_grad and not torch.equal(matrix.detach(), torch.eye(3))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"gamma": math.nan}, "gamma=nan"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"zeta": 1.1}, "zeta=1.1"),
        ({"backend": "fast"}, "backend='fast'"),
        ({"matrices": [torch.eye(3)[:2]]}, r"matrices\[0\] has shape \(2, 3\)"),
        ({"matrices": [torch.empty(0, 0)]}, r"matrices\[0\] has shape \(0, 0\)"),
        ({"matrices": [torch.eye(3).double()]}, "float64"),
        ({"matrices": [torch.eye(3), torch.eye(3).bfloat16()]}, r"matrices\[1\] is torch.bfloat16"),
        ({"matrices": [torch.eye(6)[::2, ::2]]}, "strides"),
        ({"vectors": torch.ones(4)}, r"vectors .* shape \(4,\)"),
        ({"vectors": torch.ones(3, dtype=torch.float64)}, "vectors is torch.float64"),
        ({"largest": torch.ones(2)}, r"largest .* shape \(2,\)"),
    ),
)
def test_bad_arguments_are_named(change, message):
    given_arguments = {
        "matrices": [torch.eye(3)], "vectors": torch.ones(3), "largest": torch.ones(1), "gamma": 0.9, **change
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        mkor.update_(**given_arguments)


def test_without_a_compiler_the_reference_stands_in_once_reported(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    native.forget()
    try:
        factors = Factors.draw((6,), torch.float32, 12)
        caplog.clear()  # drawing them has reported its own
        for _ in range(2):
            factors.check(*run(factors, RULE, "auto"), RULE)
        assert [record.message.count("the same update, slower") for record in caplog.records] == [1]
        with pytest.raises(OpBuildError):
            run(factors, RULE, "native")
    finally:
        native.forget()


def test_the_check_of_these_tests_finds_a_wrong_sign():
    factors = Factors.draw((16,), torch.float32, 13)
    (matrix,), vector = factors.matrices, factors.vectors
    u = matrix @ vector
    wrong = matrix / 0.9 + 0.1 / (0.9 * (0.9 + 0.1 * (u @ vector))) * torch.outer(u, u)
    with pytest.raises(AssertionError):
        factors.check([wrong], wrong.abs().max()[None], torch.zeros(1, dtype=torch.int32), RULE)
