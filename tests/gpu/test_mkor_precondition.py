"""Preconditioning on a GPU: error of half products, batches, rescaling, no wait for the device."""

from __future__ import annotations

import pytest
import torch

from ds_efficient.core.keys import Key
from ds_efficient.ops import keyed_random
from ds_efficient.ops import mkor_reference as reference
from ds_efficient.ops.mkor_factored import FactoredFactors, damping
from ds_efficient.ops.mkor_precondition import LowRank, precondition_, rescale_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
RULE = {"gamma": 0.95, "threshold": 10.0, "zeta": 0.9}


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers on the GPU."""
    return keyed_random.normal(Key(seed), shape, device="cuda")


def updated(sizes: list[int], dtype: torch.dtype, rank: int = 16, device: str = "cuda") -> FactoredFactors:
    """Factors after some updates by vectors with a mean."""
    factors = FactoredFactors(sizes, rank, device=device, operand_dtype=dtype)
    mean = keyed_random.normal(Key(1), (sum(sizes),))
    for step in range(2 * rank):
        v = mean + keyed_random.normal(Key(2).fold(step), (sum(sizes),))
        factors.update_(v.to(device), **RULE)
    return factors


@every_dtype
@pytest.mark.parametrize(
    "kinds", (("low", "low"), ("low", None), (None, "low"), ("dense", "low"), ("dense", "dense"))
)
@pytest.mark.parametrize(("shape", "bias"), (((256, 512), True), ((2048, 1024), False), ((96, 40), True)))
def test_products_against_float64_and_the_norm(dtype, shape, bias, kinds):
    rows, columns = shape
    factors = updated([rows, columns + bias], dtype)
    g = normal(3, rows, columns + bias).to(dtype)
    weight = g[:, :columns].clone(memory_format=torch.contiguous_format)
    column = g[:, -1].clone() if bias else None
    exact = g.double()
    chosen: list = [None, None]
    for index, kind in enumerate(kinds):
        m = factors.dense(index) / factors.a[index]
        if kind == "low":
            share = damping(dtype)
            m = (1 - share) * m
            m.diagonal().add_(share)
        if kind is not None:
            chosen[index] = LowRank(factors.operand(index)) if kind == "low" else m.float()
            exact = m @ exact if index == 0 else exact @ m
    sums = precondition_([weight], [column], chosen[:1], chosen[1:])
    exact *= g.double().norm() / exact.norm()
    made = weight if column is None else torch.cat([weight, column[:, None]], 1)
    eps = max(torch.finfo(dtype).eps, 2e-4)  # float32 products may be made in TF32 where torch is told so
    assert (made.double() - exact).norm() <= 2 * eps * g.double().norm()
    torch.testing.assert_close(made.double().norm(), g.double().norm(), rtol=1e-3, atol=0)
    assert sums.shape == (1, 3) and sums[0, 2] > 0


@every_dtype
def test_layers_together_as_one_by_one(dtype):
    shapes = [(64, 48), (64, 48), (128, 48), (1500, 1200), (64, 48), (1500, 1200), (1200, 1000)]
    made = []
    for together in (True, False):
        weights = [normal(index, *shape).to(dtype) for index, shape in enumerate(shapes)]
        biases = [normal(50 + index, shape[0]).to(dtype) for index, shape in enumerate(shapes)]
        sizes = [size for rows, columns in shapes for size in (rows, columns + 1)]
        factors = updated(sizes, dtype, 8)
        lefts = [LowRank(factors.operand(2 * index)) for index in range(len(shapes))]
        rights: list = [LowRank(factors.operand(2 * index + 1)) for index in range(len(shapes))]
        rights[1] = factors.dense(3).float()
        if together:
            sums = precondition_(weights, biases, lefts, rights)
        else:
            parts = [
                precondition_(weights[i : i + 1], biases[i : i + 1], lefts[i : i + 1], rights[i : i + 1])
                for i in range(len(shapes))
            ]
            sums = torch.cat(parts)
        made.append((weights, biases, sums))
    eps = max(torch.finfo(dtype).eps, 1e-5)
    for first, second in zip(made[0][0] + made[0][1], made[1][0] + made[1][1], strict=True):
        assert (first - second).float().norm() <= eps * second.float().norm()
    torch.testing.assert_close(made[0][2], made[1][2], rtol=4 * eps, atol=0)


def test_factors_on_the_gpu_as_on_the_cpu():
    sizes = [300, 64, 300]
    gpu, cpu = updated(sizes, torch.float32, 8), updated(sizes, torch.float32, 8, "cpu")
    for index in range(3):
        error = (gpu.dense(index).cpu() - cpu.dense(index)).abs().max()
        assert error < 1e-4 * cpu.dense(index).abs().max()
    assert torch.equal(gpu.rank.cpu(), cpu.rank) and torch.equal(gpu.truncations.cpu(), cpu.truncations)


@every_dtype
@pytest.mark.parametrize("offset", (0, 1))
def test_small_rescaling_as_the_reference(dtype, offset):
    sizes, counts = [5, 64, 20001], [1, 2]
    gradients, products = [], []
    for index, size in enumerate(sizes):
        g = keyed_random.normal(Key(index), (size,)).to(dtype)
        gradients.append(g)
        products.append(g / 2 + keyed_random.normal(Key(90 + index), (size,)).to(dtype) / 8)
    held = [torch.cat([g[:1]] * offset + [g]).cuda()[offset:] for g in gradients]
    sums = rescale_(held, [p.cuda() for p in products], counts, subtract=bool(offset), backend="native")
    wanted = reference.rescale_(gradients, products, counts, bool(offset))
    torch.testing.assert_close(sums.cpu(), wanted, rtol=1e-12, atol=1e-12)
    for made, value in zip(held, gradients, strict=True):
        torch.testing.assert_close(made.cpu(), value, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_gradients_that_are_zero_or_not_finite_or_turned_away_stay():
    cases = [normal(index, 33, 70) for index in range(5)]
    before = [case.clone() for case in cases]
    for group in (cases, before):
        group[0].zero_()
        group[1][3, 4] = torch.nan
        group[2][3, 4] = torch.inf
    minus = -torch.eye(33, device="cuda")
    factors = updated([33], torch.float32, 4)
    lefts = [LowRank(factors.operand(0))] * 3 + [minus, minus * -3e38]
    precondition_(cases, [None] * 5, lefts, [None] * 5)
    for made, value in zip(cases[:4], before[:4], strict=True):
        torch.testing.assert_close(made, value, rtol=0, atol=0, equal_nan=True)
    assert cases[4].isfinite().all()


def test_nothing_waits_for_the_device():
    sizes = [256, 129]
    factors = updated(sizes, torch.bfloat16, 8)
    v, weight, bias = normal(4, sum(sizes)), normal(5, 256, 128).bfloat16(), normal(6, 256).bfloat16()

    def step() -> None:
        factors.update_(v, **RULE)
        left, right = LowRank(factors.operand(0)), LowRank(factors.operand(1))
        precondition_([weight, weight.clone()], [bias, bias.clone()], [left, left], [right, right])
        precondition_([weight], [bias], [torch.eye(256, device="cuda")], [right])

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
