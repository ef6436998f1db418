"""Variance of RMM's weight gradients: formulas against simulation, what the paper has wrong, the monitor."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.ops.rmm import SKETCHES, Partition, partition, sketch_matrix
from ds_efficient.rmm import monitor
from ds_efficient.rmm.variance import (
    correlation,
    partition_variance,
    printed_variance,
    sgd_variance,
    sketch_variance,
)

TOLERANCE = 0.03


def example(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """X and Y with unequal row norms and a large correlation, so that f, t and r all matter."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 7)) * rng.uniform(0.2, 2.0, (rows, 1)) + 0.5
    y = x @ rng.standard_normal((7, 5)) * 0.3 + 0.4 * rng.standard_normal((rows, 5)) * x[:, :1] + 0.4
    return x, y


def draw(sketch: str, rows: int, projected: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """`draws` matrices S (rows, projected), from their definitions."""
    shape = (draws, rows, projected)
    if sketch == "gaussian":
        return rng.standard_normal(shape) / math.sqrt(projected)
    if sketch == "rademacher":
        return rng.choice((-1.0, 1.0), shape) / math.sqrt(projected)
    if sketch == "count":
        s = np.zeros(shape)
        columns = rng.integers(0, projected, (draws, rows, 1))
        np.put_along_axis(s, columns, rng.choice((-1.0, 1.0), (draws, rows, 1)), 2)
        return s
    n = rows if sketch == "rows" else 1 << (rows - 1).bit_length()
    chosen = rng.random((draws, n)).argsort(1)[:, :projected]
    if sketch == "rows":
        return np.equal(np.arange(rows)[None, :, None], chosen[:, None]) * math.sqrt(rows / projected)
    hadamard = np.ones((1, 1))
    while len(hadamard) < n:
        hadamard = np.kron(hadamard, [[1.0, 1.0], [1.0, -1.0]])
    signs = rng.choice((-1.0, 1.0), (draws, rows, 1))
    return signs * hadamard[:rows].T[chosen].transpose(0, 2, 1) / math.sqrt(projected)


def block_diagonal(sketch: str, cuts: list[tuple[int, int]], draws: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    s = np.zeros((draws, sum(rows for rows, _ in cuts), sum(projected for _, projected in cuts)))
    at = at_p = 0
    for rows, projected in cuts:
        s[:, at : at + rows, at_p : at_p + projected] = draw(sketch, rows, projected, draws, rng)
        at, at_p = at + rows, at_p + projected
    return s


def simulated(s: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared distance of the estimates to the gradient."""
    st_ = s.transpose(0, 2, 1)
    return float(np.square((st_ @ y).transpose(0, 2, 1) @ (st_ @ x) - y.T @ x).sum((1, 2)).mean())


def both(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize(
    ("block_size", "cuts"),
    [(0, [(22, 8)]), (22, [(22, 8)]), (8, [(8, 4), (8, 4), (6, 3)])],
    ids=["whole", "one block", "blocks, the last ragged"],
)
def test_simulated_variance_is_within_3_percent(
    sketch: str, block_size: int, cuts: list[tuple[int, int]]
) -> None:
    x, y = example(22)
    found = simulated(block_diagonal(sketch, cuts, 12_000, 1), x, y)
    assert found == pytest.approx(sketch_variance(*both(x, y), cuts[0][1], sketch, block_size), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("sketch", "block_size"), [*((sketch, 16) for sketch in SKETCHES), ("gaussian", 0), ("srht", 0)]
)
def test_variance_of_the_sketch_that_trains_is_within_3_percent(sketch: str, block_size: int) -> None:
    x, y = example(44)
    parts = partition(44, 0.5, block_size=block_size, min_rows=1)
    keys = (Key(3, ("variance", sketch, i)) for i in range(2000))
    s = np.stack([sketch_matrix(key, sketch, parts, dtype=torch.float64).numpy() for key in keys])
    assert simulated(s, x, y) == pytest.approx(partition_variance(*both(x, y), parts, sketch), rel=TOLERANCE)


def test_the_printed_equation_11_is_too_small_by_2a_over_1_plus_a() -> None:
    x, y = example(22)
    a = correlation(*both(x, y))
    right, printed = sketch_variance(*both(x, y), 8, "gaussian"), printed_variance(*both(x, y), 8)
    assert a > 0.1
    assert 1 - printed / right == pytest.approx(2 * a / (1 + a), rel=1e-12)
    found = simulated(block_diagonal("gaussian", [(22, 8)], 20_000, 2), x, y)
    assert found == pytest.approx(right, rel=TOLERANCE)
    assert found != pytest.approx(printed, rel=5 * TOLERANCE)
    assert 1 - printed / found == pytest.approx(2 * a / (1 + a), abs=TOLERANCE)


def test_theorem_2_3_has_counter_examples() -> None:
    """Neither a + 1, as printed, nor (a + 1) / a bounds p / (B - 1) D^2 / D^2_SGD."""
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [1.0]])
    a = correlation(x, y)
    assert (a, (a + 1) / a) == (16 / 25, pytest.approx(2.5625))
    assert sgd_variance(x, y) == 0  # both rows contribute 2
    assert sketch_variance(x, y, 1, "gaussian") == 41  # so that the ratio is infinite
    y = torch.tensor([[2.0], [1.01]])
    a = correlation(x, y)
    for variance in (sketch_variance(x, y, 1, "gaussian"), printed_variance(x, y, 1)):
        assert variance / sgd_variance(x, y) > 1000 * (a + 1) / a


@given(rows=st.integers(2, 30), p=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_what_does_hold_is_a_lower_bound(rows: int, p: int, seed: int) -> None:
    x, y = both(*example(rows, seed))
    a = correlation(x, y)
    left = p * sketch_variance(x, y, p, "gaussian")
    assert left * (rows - a) >= (1 + a) * (rows - 1) * sgd_variance(x, y) * (1 - 1e-9)


@pytest.mark.parametrize("e", [0.5, 0.1, 0.01])
def test_equation_14_needs_the_inverse(e: float) -> None:
    x = torch.tensor([[1.0, 0.0], [e, 0.0]], dtype=torch.float64)
    printed = torch.tensor([[1.0, 0.0], [-e, 0.0]], dtype=torch.float64)
    right = torch.tensor([[1.0, 0.0], [-1 / e, 0.0]], dtype=torch.float64)
    assert correlation(x, printed) > 0.1
    assert correlation(x, right) == pytest.approx(0.0, abs=1e-20)
    # f = 2 + e^2 + e^-2 grows without bound, SGD's variance stays.
    assert sketch_variance(x, right, 1, "gaussian") == pytest.approx(2 + e**2 + e**-2)
    assert sgd_variance(x, right) == pytest.approx(4.0)


def test_sampled_rows_have_a_multiple_of_sgds_noise_and_end_at_zero() -> None:
    x, y = both(*example(20))
    assert sketch_variance(x, y, 4, "rows") == pytest.approx(16 / 4 * sgd_variance(x, y))
    assert sketch_variance(x, y, 20, "rows") == 0
    assert sketch_variance(x[:16], y[:16], 16, "srht") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_one_row_no_row_and_zeros_divide_by_nothing(sketch: str) -> None:
    x, y = both(*example(4))
    assert sgd_variance(x[:1], y[:1]) == sgd_variance(x[:0], y[:0]) == 0
    one = sketch_variance(x[:1], y[:1], 1, sketch)
    f = float(x[:1].square().sum() * y[:1].square().sum())
    assert one == (pytest.approx(2 * f) if sketch == "gaussian" else 0)
    for u, v in ((x * 0, y), (x, y * 0), (x[:0], y[:0])):
        assert (correlation(u, v), sketch_variance(u, v, 2, sketch)) == (0, 0)
    assert correlation(x[:1], y[:1]) == pytest.approx(1)
    assert sketch_variance(x.view(2, 2, 7), y.view(2, 2, 5), 2, sketch) == sketch_variance(x, y, 2, sketch)


def test_wrong_arguments_are_named() -> None:
    x, y = both(*example(4))
    for match, call in (
        (r"shape \(4, 7\)", lambda: sgd_variance(x, y[:3])),
        ("sketch='fourier'", lambda: sketch_variance(x, y, 2, "fourier")),
        ("rows=0", lambda: sketch_variance(x, y, 0, "gaussian")),
        ("rows=0", lambda: printed_variance(x, y, 0)),
        ("rows=5", lambda: sketch_variance(x, y, 5, "rows")),
        ("block_size=-1", lambda: sketch_variance(x, y, 2, "rows", -1)),
        ("partition is one of 8", lambda: partition_variance(
            x, y, partition(8, 0.5, block_size=0, min_rows=1), "rows")),
        ("target_variance_ratio=0", lambda: monitor.rows_for_target(
            monitor.Noise(1, 1, 1, 1), 0, 8, "rows")),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            call()


def shard_sum(x: torch.Tensor, y: torch.Tensor, parts: Partition, sketch: str, shards: int) -> float:
    return sum(
        partition_variance(a, b, parts, sketch) for a, b in zip(x.chunk(shards), y.chunk(shards), strict=True)
    )


def measurements(
    sketch: str, parts: Partition, shards: int, draws: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """X, Y and what the monitor finds with each draw."""
    x, y = both(*example(shards * parts.rows))
    whole = parts.rows // parts.block
    cuts = [(parts.block, parts.projected)] * whole
    cuts += [(parts.last_rows, parts.last_projected)] * bool(parts.last_rows)
    norms = monitor.squared_norms(x), monitor.squared_norms(y)
    for s in torch.from_numpy(block_diagonal(sketch, cuts * shards, draws, 4)):
        p, q = s.t() @ x, s.t() @ y
        yield x, y, monitor.measure(*norms, p, q, q.t() @ p, parts, sketch, shards=shards)


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize(("block_size", "shards"), [(0, 1), (16, 2)])
def test_the_monitors_estimates_are_unbiased(sketch: str, block_size: int, shards: int) -> None:
    parts = partition(44 // shards, 0.5, block_size=block_size, min_rows=1)
    found = list(measurements(sketch, parts, shards, 800))
    x, y, _ = found[0]
    noise = torch.stack([noise for *_, noise in found])
    t = float((x.t() @ y).square().sum())
    mean, sigma = noise.mean(0), noise.std(0) / math.sqrt(len(noise))
    expected = (shard_sum(x, y, parts, sketch, shards), sgd_variance(x, y), None, t)
    for got, error, want in zip(mean.tolist(), sigma.tolist(), expected, strict=True):
        assert want is None or abs(got - want) < 5 * error + 1e-9 * t
    # The known parts carry most of it: a single estimate is near.
    assert float(noise[:, 0].std()) < 0.5 * expected[0]


def test_measured_in_bf16_is_near() -> None:
    x, y = both(*example(64))
    parts = partition(64, 0.5, block_size=32, min_rows=1)
    s = torch.from_numpy(block_diagonal("gaussian", [(32, 16)] * 2, 1, 5)[0])
    p, q = s.t() @ x, s.t() @ y
    args = [monitor.squared_norms(x), monitor.squared_norms(y), p, q, q.t() @ p]
    exact = monitor.measure(*args, parts, "gaussian")
    rounded = monitor.measure(*(z.bfloat16() for z in args), parts, "gaussian")
    torch.testing.assert_close(rounded[:3], exact[:3], rtol=0.02, atol=0)


@given(
    rows=st.integers(1, 60), block_size=st.sampled_from([0, 8, 16]), sketch=st.sampled_from(SKETCHES),
    target=st.floats(0.05, 50), seed=st.integers(0, 9),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_rows_for_target_are_the_fewest_that_keep_to_it(
    rows: int, block_size: int, sketch: str, target: float, seed: int
) -> None:
    """From an exact gradient, which tells the noise that a sketch would have."""
    x, y = both(*example(rows, seed))
    parts = partition(rows, 1.0, block_size=block_size, min_rows=1)
    assert parts.exact
    norms = monitor.squared_norms(x), monitor.squared_norms(y)
    (noise,) = monitor.read(monitor.measure(*norms, x, y, y.t() @ x, parts, sketch)[None])
    assert noise.variance == 0
    assert noise.sgd_variance == pytest.approx(sgd_variance(x, y), rel=1e-9, abs=1e-9)
    block = min(block_size or rows, rows)
    chosen = monitor.rows_for_target(noise, target, block, sketch)
    assert chosen == block or (chosen % 8 == 0 and 0 < chosen < block)
    if rows % block:
        return  # a ragged block rounds for itself
    if chosen < block:
        assert sketch_variance(x, y, chosen, sketch, block) <= target * noise.sgd_variance * (1 + 1e-9)
    if chosen > 8:
        fewer = (chosen - 1) // 8 * 8
        assert sketch_variance(x, y, fewer, sketch, block) > target * noise.sgd_variance * (1 - 1e-9)


def test_rows_for_target_at_the_edges() -> None:
    noise = monitor.Noise(variance=4.0, sgd_variance=0.0, scale=2.0, squared_gradient=1.0)
    assert noise.ratio == math.inf
    assert monitor.rows_for_target(noise, 8.0, 512, "gaussian") == 512  # only the exact gradient keeps to 0
    silent = monitor.Noise(0.0, 0.0, 0.0, 0.0)
    assert silent.ratio == 0
    assert monitor.rows_for_target(silent, 8.0, 512, "rows", min_rows=64) == 64
    even = monitor.Noise(variance=8.0, sgd_variance=1.0, scale=1.0, squared_gradient=1.0)
    assert monitor.rows_for_target(even, 8.0, 512, "gaussian") == 64
    assert monitor.rows_for_target(even, 7.0, 512, "srht") == 64
    assert monitor.rows_for_target(even, math.inf, 512, "count", min_rows=16) == 16


def test_nothing_is_measured_of_no_rows() -> None:
    parts = partition(0, 0.5, block_size=16, min_rows=1)
    empty = torch.zeros(0, 3)
    norms = monitor.squared_norms(empty)
    found = monitor.measure(norms, norms, empty, empty, torch.zeros(3, 3), parts, "gaussian")
    assert found.tolist() == [0, 0, 0, 0]
