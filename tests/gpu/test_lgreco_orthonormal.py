"""Orthonormal columns on a GPU: many matrices in a launch, dependent columns, numbers that are not finite.

``-k small`` selects a subset that is quick under compute-sanitizer.
"""

from __future__ import annotations

import math

import pytest
import torch

from ds_efficient.core.keys import Key
from ds_efficient.lgreco import PowerSGD, compression_error
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_orthonormal as op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KEY = Key(7).fold("orthonormal")


def draw(n: int, r: int, *parts: int) -> torch.Tensor:
    return keyed_random.normal(KEY.fold(*parts), (n, r), device=torch.device("cuda"))


def assert_orthonormal(made: torch.Tensor, atol: float = 2e-6) -> None:
    wide = made.double()
    expected = torch.eye(wide.shape[1], dtype=torch.float64, device=made.device)
    torch.testing.assert_close(wide.T @ wide, expected, rtol=0, atol=atol)


def assert_spans(made: torch.Tensor, of: torch.Tensor, rtol: float = 1e-5) -> None:
    """Each column of ``of`` lies in the span of ``made``, to ``rtol`` of its norm."""
    wide, basis = of.double(), made.double()
    rest = wide - basis @ (basis.T @ wide)
    assert (rest.norm(dim=0) <= rtol * wide.norm(dim=0)).all()


def check(given: list[torch.Tensor]) -> list[torch.Tensor]:
    made = [matrix.clone() for matrix in given]
    op.orthonormalize_(made, backend="native")
    for result, matrix in zip(made, given, strict=True):
        assert_orthonormal(result)
        assert_spans(result, matrix)
    return made


def test_small_matrices_of_every_shape():
    check([draw(r + more, r) for r in (1, 2, 3, 4, 5, 8, 13, 31, 64) for more in (0, 1, 77)])


def test_small_dependent_columns_are_replaced():
    some = draw(50, 6)
    some[:, 2], some[:, 4] = 0, some[:, 1] * -3
    made = check([torch.zeros(9, 4, device="cuda"), draw(40, 1) @ draw(1, 7, 2), some])
    assert torch.equal(made[0], torch.eye(9, 4, device="cuda"))


def test_small_matrices_that_are_not_finite_become_nan():
    for bad in (math.nan, math.inf):
        given = [draw(20, 3, seed) for seed in range(3)]
        given[1][7, 2] = bad
        op.orthonormalize_(given)
        assert torch.isnan(given[1]).all()
        assert_orthonormal(given[0])
        assert_orthonormal(given[2])


def test_small_number_of_matrices_of_many_rows():
    given = [draw(4097, 3), draw(4100, 3, 2), draw(30, 2), draw(8200, 2, 3)]
    given[1][:, 1] = 2 * given[1][:, 0]
    check(given)
    given[3][8199, 0] = math.nan
    op.orthonormalize_(given)
    assert torch.isnan(given[3]).all()
    assert_orthonormal(given[0])


def test_large_matrices_of_a_model_and_more_than_one_launch_takes():
    check([draw(n, r, n, r) for r in (4, 32, 64) for n in (768, 2304, 3072, 4097)] * 12)
    check([draw(50_304, 32)])


def test_nearly_dependent_columns_at_every_scale():
    for scale in (1e-30, 1.0, 1e30):
        check([(draw(3000, 1) + distance * draw(3000, 12, 2)) * scale for distance in (1e-2, 1e-4)])


def test_the_same_bits_every_time_without_waiting_for_the_device():
    given = [draw(2000, 32), draw(700, 9)]
    first = check(given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [[matrix.clone() for matrix in given] for _ in range(5)]
        for made in again:
            op.orthonormalize_(made)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for made in again:
        assert all(torch.equal(a, b) for a, b in zip(made, first, strict=True))


def test_power_steps_approach_the_svd():
    x = draw(500, 1) @ draw(1, 300, 2) + 0.1 * draw(500, 300, 3)
    best = torch.linalg.svdvals(x)[4:].square().sum().sqrt()
    compressor = PowerSGD(4, power_steps=40)
    made = compressor.compress(x, compressor.first_q(x.shape, KEY, device="cuda"))
    error = compression_error(x, compressor.decompress(made, x.shape))
    assert best * (1 - 1e-4) <= error <= best * 1.02
