"""Keyed random numbers: the distributions are right. Keys are fixed, so each result is always the same."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from ds_efficient.core.keys import Key
from ds_efficient.ops import keyed_random as kr

N = 1_000_000
KS_LIMIT = 1.95  # sqrt(n) times the Kolmogorov-Smirnov statistic exceeds it with probability 0.1 %
KEYS = [Key(0), Key(1234).fold("rmm", 7), 1, 2**64 - 1]


def kolmogorov_smirnov(probabilities: torch.Tensor) -> float:
    """sqrt(n) times the largest distance to the uniform distribution."""
    p = probabilities.sort().values.numpy()
    steps = np.arange(len(p) + 1) / len(p)
    return math.sqrt(len(p)) * max((steps[1:] - p).max(), (p - steps[:-1]).max())


def chi_square_limit(freedom: int) -> float:
    """About the 0.1 % point (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_uniform_is_uniform(key):
    u = kr.uniform(key, N).to(torch.float64)
    assert u.min() >= 0 and u.max() < 1
    assert kolmogorov_smirnov(u) < KS_LIMIT
    assert abs(u.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / N)
    assert abs(u.var().item() - 1 / 12) < 4 * math.sqrt(1 / 180 / N)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_normal_is_normal(key):
    z = kr.normal(key, N).to(torch.float64)
    assert kolmogorov_smirnov(torch.special.ndtr(z)) < KS_LIMIT
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((z**power).mean().item() - moment) < 4 * math.sqrt(variance / N)


def test_tails_of_the_normal_distribution():
    n = 20_000_000
    z = kr.normal(Key(5).fold("tails"), n).abs()
    for limit in (3.0, 4.0, 4.5, 5.0):
        expected = n * math.erfc(limit / math.sqrt(2))
        assert abs((z > limit).sum().item() - expected) < 4 * math.sqrt(expected)
    assert 5.2 < z.max() < 6.34


def test_bytes_of_the_words_are_equally_frequent():
    data = kr.random_bits(Key(6), N).numpy().view(np.uint8).reshape(-1, 4)
    for column in range(4):
        counts = np.bincount(data[:, column], minlength=256)
        assert ((counts - N / 256) ** 2 / (N / 256)).sum() < chi_square_limit(255)


def test_neighbours_and_neighbouring_keys_are_uncorrelated():
    root = Key(11)
    draws = [kr.normal(key, N).to(torch.float64) for key in (root.fold(0), root.fold(1), 5, 6, root)]
    for a, b in itertools.combinations(draws, 2):
        assert abs((a * b).mean().item()) < 4.5 / math.sqrt(N)
        assert abs(((a**2 - 1) * (b**2 - 1)).mean().item()) < 4.5 * 2 / math.sqrt(N)
    for lag in (1, 2, 3, 4, 64):
        assert abs((draws[0][:-lag] * draws[0][lag:]).mean().item()) < 4.5 / math.sqrt(N)


@pytest.mark.parametrize(("n", "k"), [(5, 2), (6, 3), (7, 1), (4, 3)])
def test_every_subset_is_equally_likely(n, k):
    batch = 40_000
    rows = kr.sample_k_of_n(Key(21).fold(n, k), n, k, batch=batch)
    counts = Counter(map(tuple, rows.tolist()))
    subsets = list(itertools.combinations(range(n), k))
    assert set(counts) == set(subsets)
    expected = batch / len(subsets)
    assert sum((counts[s] - expected) ** 2 / expected for s in subsets) < chi_square_limit(len(subsets) - 1)


@pytest.mark.parametrize(("n", "k"), [(64, 16), (129, 100)])
def test_inclusion_of_elements_and_of_pairs(n, k):
    batch = 20_000
    rows = kr.sample_k_of_n(Key(22), n, k, batch=batch)
    chosen = torch.zeros(batch, n).scatter_(1, rows, 1.0)
    p = k / n
    counts = chosen.sum(0).to(torch.float64)
    # The counts sum to batch * k, so their covariance has rank n - 1 and one eigenvalue,
    # batch p (1 - p) n / (n - 1).
    statistic = ((counts - batch * p) ** 2).sum().item() / (batch * p * (1 - p) * n / (n - 1))
    assert statistic < chi_square_limit(n - 1)
    pairs = (chosen.T @ chosen).to(torch.float64)[~torch.eye(n, dtype=torch.bool)]
    q = k * (k - 1) / (n * (n - 1))
    worst = ((pairs - batch * q) / math.sqrt(batch * q * (1 - q))).abs().max().item()
    assert worst < 5.2  # n^2 / 2 pairs: the largest of 8000 normal numbers exceeds it with probability 0.2 %


def test_rows_of_a_choice_are_independent():
    rows = kr.sample_k_of_n(Key(23), 32, 8, batch=40_000)
    chosen = torch.zeros(40_000, 32).scatter_(1, rows, 1.0) - 0.25
    product = (chosen[:-1] * chosen[1:]).mean(1).to(torch.float64)
    assert abs(product.mean().item()) < 4 * product.std().item() / math.sqrt(len(product))
