"""Rank-1 updates on a GPU: as exact as plain torch, guards, no wait for the device.

``-k small`` selects a subset that is quick under compute-sanitizer: few blocks, and everything but the
kernels on the CPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from mkor_factors import DTYPES, Factors

from ds_efficient.ops import mkor
from ds_efficient.ops.mkor_native import GROUP, CudaLibrary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RULE = (0.9, 3.0, 0.8)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def draw(sizes: list[int], dtype: torch.dtype, seed: int = 1, **options: object) -> Factors:
    """Factors on the GPU."""
    return Factors.draw(sizes, dtype, seed, device="cuda", **options)


def run(factors: Factors) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Matrices, largest entries and outcomes after a call with `RULE`; ``factors`` stay as they are."""
    matrices, largest = [matrix.clone() for matrix in factors.matrices], factors.largest.clone()
    gamma, threshold, zeta = RULE
    outcome = mkor.update_(
        matrices, factors.vectors, largest, gamma=gamma, threshold=threshold, zeta=zeta, backend="native"
    )
    return matrices, largest, outcome


def run_small(
    sizes: list[int], dtype: torch.dtype, *, offset: int = 0, bad: int | None = None
) -> tuple[Factors, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Draw and compare on the CPU; only copies and the kernels run on the GPU."""
    factors = Factors.draw(sizes, dtype, 1, entry=(0.5, 2.9, 3.1, 50.0))
    if bad is not None:
        factors.vectors[bad] = math.nan
    buffers = []
    for matrix in factors.matrices:
        buffer = torch.full((matrix.numel() + 2 * offset,), 77, dtype=dtype)
        buffer[offset : offset + matrix.numel()] = matrix.flatten()
        buffers.append(buffer.cuda())
    held = [
        buffer[offset : offset + matrix.numel()].view_as(matrix)
        for buffer, matrix in zip(buffers, factors.matrices, strict=True)
    ]
    largest = factors.largest.cuda()
    gamma, threshold, zeta = RULE
    outcome = mkor.update_(
        held, factors.vectors.cuda(), largest, gamma=gamma, threshold=threshold, zeta=zeta, backend="native"
    )
    made = []
    for buffer, matrix in zip(buffers, factors.matrices, strict=True):
        here = buffer.cpu()
        assert (here[:offset] == 77).all() and (here[offset + matrix.numel() :] == 77).all()
        made.append(here[offset : offset + matrix.numel()].view_as(matrix))
    return factors, made, largest.cpu(), outcome.cpu()


@every_dtype
@pytest.mark.parametrize("offset", (0, 3))
def test_small_odd_sizes_and_addresses(dtype, offset):
    factors, made, largest, outcome = run_small([3, 136, 131], dtype, offset=offset)
    factors.check(made, largest, outcome, RULE)


def test_small_three_launches_and_a_bad_vector(monkeypatch):
    monkeypatch.setattr(CudaLibrary, "LIMITS", (0,))
    factors, made, largest, outcome = run_small([130, 5, 260], torch.float32, bad=132)
    assert outcome[1] == mkor.LEFT and torch.equal(made[1], factors.matrices[1])
    factors.check(made, largest, outcome, RULE, left=(1,))


@every_dtype
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_bad_vectors_leave_their_factors_alone(dtype, bad):
    factors = draw([140, 20, 300], dtype)
    factors.vectors[150] = bad
    matrices, largest, outcome = run(factors)
    assert outcome.tolist() == [mkor.UPDATED, mkor.LEFT, mkor.UPDATED]
    assert torch.equal(matrices[1], factors.matrices[1]) and largest[1] == factors.largest[1]
    factors.check(matrices, largest, outcome, RULE, left=(1,))


def test_indefinite_matrices_start_again_from_the_identity():
    factors = draw([300, 20], torch.bfloat16)
    factors.matrices[0].neg_()
    matrices, largest, outcome = run(factors)
    assert outcome.tolist() == [mkor.RESET, mkor.UPDATED] and largest[0] == 1
    assert torch.equal(matrices[0], torch.eye(300, device="cuda").bfloat16())


def test_more_factors_than_one_launch_takes():
    factors = draw([5 + i % 7 for i in range(2 * GROUP + 3)], torch.float32)
    factors.check(*run(factors), RULE)


@every_dtype
@pytest.mark.parametrize("size", (1024, 3000, 4096, 4097, 8192))
def test_large_factors(dtype, size):
    factors = draw([size], dtype, entry=(50.0,))
    factors.check(*run(factors), RULE)


@every_dtype
def test_mixed_sizes_give_the_same_bits_every_time(dtype):
    factors = draw([2048, 512, 1, 777, 1536] * 4, dtype, entry=(2.0, 9.0))
    made = [run(factors) for _ in range(5)]
    factors.check(*made[0], RULE)
    for matrices, largest, _ in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(matrices, made[0][0], strict=True))
        assert torch.equal(largest, made[0][1])


@every_dtype
@pytest.mark.parametrize("sizes", ([40, 128, 300], [64, 1300], [72] * 100))
def test_updates_that_begin_early_see_what_those_before_wrote(dtype, sizes):
    factors, (gamma, threshold, zeta) = draw(sizes, dtype), RULE

    def updated(apart: bool) -> list[torch.Tensor]:
        matrices, largest = [matrix.clone() for matrix in factors.matrices], factors.largest.clone()
        vectors = factors.vectors.clone()
        for turn in range(20):
            vectors.mul_(-0.9)
            mkor.update_(
                matrices, vectors, largest, gamma=gamma, threshold=threshold, zeta=zeta, backend="native"
            )
            vectors.add_(0.01 * turn)
            if apart:
                torch.cuda.synchronize()
        return [*matrices, largest]

    together, apart = updated(apart=False), updated(apart=True)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_many_updates_stay_the_inverse():
    size, gamma = 300, 0.95
    mean = torch.eye(size, dtype=torch.float64, device="cuda")
    matrix, largest = torch.eye(size, device="cuda"), torch.ones(1, device="cuda")
    for step in range(40):
        vector = draw([size], torch.float32, step).vectors
        mkor.update_([matrix], vector, largest, gamma=gamma)
        mean = gamma * mean + (1 - gamma) * torch.outer(vector.double(), vector.double())
    expected = torch.linalg.inv(mean)
    assert (matrix.double() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(matrix, matrix.T) and largest == matrix.abs().max()


def test_the_call_does_not_wait_for_the_device():
    factors = draw([256, 1024], torch.float32)
    run(factors)
    matrices, largest = [matrix.clone() for matrix in factors.matrices], factors.largest.clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in ("native", "reference"):
            mkor.update_(matrices, factors.vectors, largest, gamma=0.9, threshold=10.0, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_repeats_the_update():
    factors = draw([700, 64], torch.float32)
    expected, most, _ = run(factors)
    matrices, largest = [matrix.clone() for matrix in factors.matrices], factors.largest.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mkor.update_(matrices, factors.vectors, largest, gamma=0.9, threshold=3.0, zeta=0.8)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(matrices, expected, strict=True))
    assert torch.equal(largest, most)


def test_operator_contract():
    factors = draw([9, 140], torch.float32)
    arguments = (factors.matrices, factors.vectors, factors.largest, *RULE, "native")
    torch.library.opcheck(torch.ops.ds_efficient.mkor_update_.default, arguments)
