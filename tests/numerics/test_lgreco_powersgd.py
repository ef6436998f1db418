"""PowerSGD: bounds by the SVD, warm start, several ranks, what is not finite."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ds_efficient.core.keys import Key
from ds_efficient.lgreco import Factors, PowerSGD, compression_error
from ds_efficient.lgreco.powersgd import orthonormal, orthonormal_
from ds_efficient.ops import keyed_random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEY = Key(20221017).fold("test")


def draw(shape: tuple[int, ...], *parts: int | str) -> torch.Tensor:
    return keyed_random.normal(KEY.fold(*parts), shape)


def spectrum(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix whose singular values fall by 0.7 each, and these."""
    small = min(n, m)
    values = 0.7 ** torch.arange(small)
    u, v = (torch.linalg.qr(draw((rows, small), rows, "basis")).Q for rows in (n, m))
    return (u * values) @ v.T, values


@pytest.mark.parametrize("shape", ((40, 60), (60, 40)))
@pytest.mark.parametrize("rank", (1, 3, 8))
def test_low_rank_errs_no_less_than_the_svd_and_approaches_it_with_power_steps(shape, rank):
    x, values = spectrum(*shape)
    best = values[rank:].square().sum().sqrt()
    errors = []
    for steps in (1, 2, 12):
        compressor = PowerSGD(rank, power_steps=steps)
        made = compressor.compress(x, compressor.first_q(shape, KEY))
        errors.append(compression_error(x, compressor.decompress(made, shape)))
    assert all(error >= best * (1 - 1e-5) for error in errors)
    assert errors[0] > errors[1] and errors[2] <= best * 1.001
    assert errors[0] <= 4 * best


def test_a_warm_start_gains_what_power_steps_gain():
    x, _ = spectrum(40, 60)
    many, one = PowerSGD(3, power_steps=5), PowerSGD(3)
    q = one.first_q(x.shape, KEY)
    expected = many.decompress(many.compress(x, q), x.shape)
    for _ in range(5):
        made = one.compress(x, q)
        q = made.q
    torch.testing.assert_close(one.decompress(made, x.shape), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", ((5, 7), (7, 5), (1, 9), (4, 3, 2), (6, 6)))
def test_full_rank_is_exact(shape):
    x = draw(shape)
    compressor = PowerSGD(max(shape) * 10)
    made = compressor.compress(x, compressor.first_q(shape, KEY))
    torch.testing.assert_close(compressor.decompress(made, shape), x, rtol=1e-4, atol=1e-5)


def test_ranks_that_average_factors_get_the_factors_of_the_mean():
    xs = [draw((30, 20), rank) for rank in range(3)]
    compressor = PowerSGD(4, power_steps=2)
    q = compressor.first_q((30, 20), KEY)
    whole = compressor.compress(torch.stack(xs).mean(0), q)
    barrier, parts, sizes = threading.Barrier(3), [torch.empty(0)] * 3, []

    def rank(number: int) -> Factors:
        def reduce(part: torch.Tensor) -> None:
            if number == 0:
                sizes.append(part.nbytes)
            parts[number] = part.clone()
            barrier.wait(20)
            part.copy_(torch.stack(parts).mean(0))
            barrier.wait(20)

        return compressor.compress(xs[number], q, reduce)

    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(rank, range(3)))
    assert sum(sizes) == compressor.nbytes((30, 20))
    assert all(torch.equal(a, b) for other in made for a, b in zip(made[0], other, strict=True))
    torch.testing.assert_close(
        compressor.decompress(made[0], (30, 20)), compressor.decompress(whole, (30, 20)), rtol=1e-3, atol=1e-4
    )


def test_a_zero_gradient_does_not_end_the_warm_start():
    compressor, shape = PowerSGD(2), (6, 5)
    made = compressor.compress(torch.zeros(shape), compressor.first_q(shape, KEY))
    assert torch.equal(compressor.decompress(made, shape), torch.zeros(shape))
    x = draw((6, 1)) @ draw((1, 5))
    q = made.q
    for _ in range(3):
        made = compressor.compress(x, q)
        q = made.q
    torch.testing.assert_close(compressor.decompress(made, shape), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", (1e-30, 1e-12, 1.0, 1e30))
def test_columns_are_orthonormal_at_every_scale_and_rank(scale):
    for matrix in (draw((9, 4)), torch.zeros(9, 4), draw((9, 1)) @ draw((1, 4))):
        p = orthonormal(matrix * scale)
        torch.testing.assert_close(p.T @ p, torch.eye(4), rtol=0, atol=1e-5)


def test_many_matrices_become_orthonormal_at_once_whatever_their_rank():
    given = [draw((80, r), r) for r in (1, 64, 65, 80)]
    given[2][:, 7] = given[2][:, 3]
    made = [matrix.clone() for matrix in given]
    orthonormal_(made)
    for p, matrix in zip(made, given, strict=True):
        torch.testing.assert_close(p.T @ p, torch.eye(p.shape[1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(p @ (p.T @ matrix), matrix, rtol=0, atol=1e-4)
        assert torch.equal(p, orthonormal(matrix))


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_low_rank_of_what_is_not_finite_is_nan(bad):
    x = draw((6, 5))
    x[2, 3] = bad
    compressor = PowerSGD(2)
    back = compressor.decompress(compressor.compress(x, compressor.first_q(x.shape, KEY)), x.shape)
    assert torch.isnan(back).all()


def test_a_change_of_rank_keeps_the_columns():
    shape, x = (40, 60), spectrum(40, 60)[0]
    few, many = PowerSGD(3), PowerSGD(6)
    q = few.compress(x, few.first_q(shape, KEY)).q
    wider = many.resized_q(q, shape, KEY)
    assert wider.shape == (60, 6) and torch.equal(wider[:, :3], q)
    assert torch.linalg.matrix_rank(wider) == 6
    assert torch.equal(few.resized_q(wider, shape, KEY), q)
    made = many.compress(x, wider)
    error = compression_error(x, many.decompress(made, shape))
    assert error < compression_error(x, few.decompress(few.compress(x, q), shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_takes_and_gives_every_dtype(dtype):
    x = (draw((16, 1)) @ draw((1, 8))).to(dtype)
    compressor = PowerSGD(1)
    made = compressor.compress(x, compressor.first_q(x.shape, KEY))
    assert isinstance(made, Factors) and made.p.dtype == made.q.dtype == torch.float32
    back = compressor.decompress(made, x.shape, dtype=dtype)
    assert back.dtype == dtype
    torch.testing.assert_close(back.float(), x.float(), rtol=2e-2, atol=2e-2)
    total = torch.ones(x.shape)
    compressor.decompress(made, x.shape, out=total, weight=0.5, accumulate=True)
    torch.testing.assert_close(total, 1 + 0.5 * compressor.decompress(made, x.shape))
