"""Masks of SLoPe: definition, statistics, shards, what training leaves of them, and the memory they save."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_efficient.core.keys import Key
from ds_efficient.ops import slope as ops
from ds_efficient.slope.linear import SlopeLinear
from ds_efficient.slope.masks import magnitude_mask, random_mask

PATTERNS = ((1, 2), (2, 4), (1, 4), (2, 8), (4, 8), (2, 16), (3, 32))
pattern_of = "{}:{}".format


def drawn(key: Key | int, rows: int, columns: int, n: int, m: int) -> Tensor:
    """Return the whole mask as bool (rows, columns)."""
    return ops.unpack_mask(random_mask(key, columns, n, m, rows=[(0, rows)]), columns)


def layer_of(n: int, m: int, out: int, inner: int, seed: int, **more: Any) -> SlopeLinear:
    return SlopeLinear(inner, out, pattern=pattern_of(n, m), key=Key(seed), **more)


@st.composite
def shapes(draw: Any) -> tuple[int, int, int, int, int]:
    """n, m, outputs, inputs, seed."""
    n, m = draw(st.sampled_from(PATTERNS))
    sizes = (m * draw(st.integers(1, max(1, 64 // m))) for _ in range(2))
    return (n, m, *sizes, draw(st.integers(0, 2**31)))  # type: ignore[return-value]


@settings(deadline=None, max_examples=60)
@given(shapes(), st.sampled_from(["random", "magnitude"]))
def test_row_groups_keep_n_and_column_groups_at_most_n_of_the_same_values(
    shape: tuple[int, int, int, int, int], kind: str
) -> None:
    n, m, out, inner, seed = shape
    layer = layer_of(n, m, out, inner, seed, mask=kind)
    forward, backward, weight = layer.forward_mask(), layer.backward_mask(), layer.dense_weight()
    assert bool((forward.view(out, inner // m, m).sum(2) == n).all())
    assert int(forward.sum()) * m == n * out * inner == layer.weight.numel() * m
    groups = forward.view(out // m, m, inner).sum(1)
    left = backward.view(out // m, m, inner).sum(1)
    assert torch.equal(left, groups.clamp(max=n))  # at most n, and none lost where there are no more
    assert not bool((backward & ~forward).any())
    twice = layer.slope.dense_weight(layer.weight, backward=True)
    assert torch.equal(twice, weight * backward) and torch.equal(weight, weight * forward)


@settings(deadline=None, max_examples=40)
@given(shapes(), st.booleans())
def test_magnitude_masks_keep_the_largest_and_of_equal_ones_the_first(
    shape: tuple[int, int, int, int, int], ties: bool
) -> None:
    n, m, out, inner, seed = shape
    weight = torch.randn(out, inner, generator=torch.Generator().manual_seed(seed))
    if ties:
        weight = weight.round()
    mask = ops.unpack_mask(magnitude_mask(weight, n, m), inner)
    for row in range(out):
        for start in range(0, inner, m):
            group = weight[row, start : start + m].abs().tolist()
            expected = sorted(range(m), key=lambda place: (-group[place], place))[:n]
            assert sorted(expected) == mask[row, start : start + m].nonzero().flatten().tolist()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_weights_give_the_lowest_outputs_every_time(value: float) -> None:
    layer = layer_of(2, 4, 16, 32, 1)
    nn.init.constant_(layer.weight, value)
    layer.refresh()
    forward = layer.forward_mask().view(4, 4, 32)
    first = forward & (forward.cumsum(1) <= 2)
    for _ in range(2):
        assert torch.equal(layer.backward_mask(), first.view(16, 32))
        layer.refresh()


@pytest.mark.parametrize(("n", "m", "percent"), [(1, 2, 12.5), (2, 4, 9.375), (1, 4, 7.91), (2, 8, 5.84)])
def test_a_layer_loses_the_share_of_the_formula_to_the_column_pass(n: int, m: int, percent: float) -> None:
    """2:8 loses 5.84 % of all elements; the paper's text says 3.39 %."""
    share = n / m
    formula = sum(
        math.comb(m, j) * share**j * (1 - share) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1)
    )
    assert 100 * formula == pytest.approx(percent, abs=0.005)
    layer = layer_of(n, m, 1024, 2048, 3)
    lost = layer.forward_mask().sum() - layer.backward_mask().sum()
    assert 100 * float(lost) / 1024 / 2048 == pytest.approx(percent, abs=0.2)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (2, 8), (16, 32)])
def test_the_mean_masked_weight_is_the_share_of_the_weight(n: int, m: int) -> None:
    """E[M W] = N/M W (theorem 2.2), where 16:32 is drawn by another method than the small ones."""
    count, rows, columns = 600, 4, 64
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = torch.stack([drawn(Key(5, (number,)), rows, columns, n, m) for number in range(count)])
    mean, share = (masks * weight).mean(0), n / m
    deviation = weight.abs() * math.sqrt(share * (1 - share) / count)
    assert float(((mean - share * weight).abs() / deviation).max()) < 4.5  # 256 normal numbers: p < 0.2 %


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (2, 8), (4, 8)])
def test_every_choice_of_a_group_is_equally_frequent(n: int, m: int) -> None:
    choices = [sum(1 << place for place in chosen) for chosen in itertools.combinations(range(m), n)]
    groups = drawn(Key(11, (n, m)), 512, 32 * m, n, m).view(-1, m)
    codes = (groups.long() << torch.arange(m)).sum(1)
    frequency = torch.bincount(codes, minlength=1 << m)[choices].double()
    assert int(frequency.sum()) == len(codes)
    expected = len(codes) / len(choices)
    chi_square = float(((frequency - expected) ** 2 / expected).sum())
    freedom = len(choices) - 1
    # Wilson and Hilferty: the cube root is nearly normal; 4 standard deviations.
    normal = ((chi_square / freedom) ** (1 / 3) - 1 + 2 / 9 / freedom) / math.sqrt(2 / 9 / freedom)
    assert abs(normal) < 4


def test_neighbouring_groups_choose_independently() -> None:
    groups = drawn(Key(2), 256, 512, 1, 2).view(256, 256, 2)[..., 0].double() - 0.5
    for axis in (0, 1):
        moved = groups.roll(1, axis)
        assert abs(float((4 * groups * moved).mean())) < 4.5 / math.sqrt(groups.numel())


@settings(deadline=None, max_examples=40)
@given(shapes(), st.data())
def test_shards_are_slices_of_the_whole_mask(shape: tuple[int, int, int, int, int], data: Any) -> None:
    n, m, out, inner, seed = shape
    whole = drawn(Key(seed), out, inner, n, m)
    cuts = sorted(data.draw(st.lists(st.integers(0, out), min_size=4, max_size=4)))
    first, end = sorted(data.draw(st.lists(st.integers(0, inner // m), min_size=2, max_size=2)))
    rows, columns = [(cuts[0], cuts[1]), (cuts[2], cuts[3])], (first * m, end * m)
    if columns[0] < columns[1]:
        part = random_mask(Key(seed), inner, n, m, rows=rows, columns=columns)
        expected = torch.cat([whole[slice(*cut)] for cut in rows])[:, slice(*columns)]
        assert torch.equal(ops.unpack_mask(part, columns[1] - columns[0]), expected)


def test_masks_follow_their_key_alone() -> None:
    torch.manual_seed(1)
    first = drawn(Key(1, ("a",)), 64, 64, 2, 4)
    torch.manual_seed(2)
    assert torch.equal(drawn(Key(1, ("a",)), 64, 64, 2, 4), first)
    assert torch.equal(drawn(Key(1, ("a",)).value, 64, 64, 2, 4), first)
    for other in (Key(1, ("b",)), Key(2, ("a",))):
        assert 0.3 < float((drawn(other, 64, 64, 2, 4) == first).double().mean()) < 0.7


def test_nothing_touches_the_global_random_state() -> None:
    before = torch.get_rng_state()
    layer = layer_of(2, 4, 16, 32, 1, adapter_rank=4)
    SlopeLinear.from_linear(layer.to_linear(), mask="magnitude")
    layer.activate_adapter()
    layer(torch.ones(2, 32)).sum().backward()
    layer.refresh()
    drawn(Key(1), 4, 64, 16, 32)
    assert torch.equal(torch.get_rng_state(), before)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_and_training_is_that_of_the_masked_dense_layer(name: str) -> None:
    layer = layer_of(2, 4, 8, 32, 6, dtype=torch.float64)
    forward, column = layer.slope.mask.clone(), layer.slope.column_mask.clone()
    mask = layer.forward_mask()
    dense = layer.dense_weight().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    steps = OPTIMIZERS[name](layer.parameters()), OPTIMIZERS[name]([dense, bias])
    for number in range(8):
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        for optimizer, y in zip(steps, (layer(x), x @ (dense * mask).t() + bias), strict=True):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        whole = layer.dense_weight()
        assert int(whole[~mask].count_nonzero()) == 0 and int(dense[~mask].count_nonzero()) == 0
        torch.testing.assert_close(whole, dense.detach(), rtol=1e-10, atol=1e-12)
    assert torch.equal(layer.slope.mask, forward)
    assert torch.equal(layer.slope.column_mask, column)  # not chosen anew by itself
    layer.refresh()
    assert not torch.equal(layer.slope.column_mask, column)
    assert torch.equal(layer.slope.mask, forward)


@settings(deadline=None, max_examples=30)
@given(shapes(), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_start_of_an_adapter_changes_no_output_and_no_input_gradient(
    shape: tuple[int, int, int, int, int], rank: int, dtype: torch.dtype
) -> None:
    n, m, out, inner, seed = shape
    layer = layer_of(n, m, out, inner, seed, adapter_rank=rank, dtype=dtype)
    x = torch.randn(3, inner, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = []
    for active in (False, True):
        if active:
            layer.activate_adapter()
        given_x = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(given_x)
        y.square().sum().backward()
        found.append((y, given_x.grad))
        assert (layer.slope.adapter_up.grad is not None) == active
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not layer.slope.adapter_down.grad.any() and layer.slope.adapter_up.grad.any()  # L = 0


def test_the_first_factor_of_an_adapter_has_variance_one_over_the_inputs() -> None:
    down = layer_of(2, 4, 8, 1024, 1, adapter_rank=64).slope.adapter_down.detach()
    assert float(down.var()) == pytest.approx(1 / 1024, rel=0.03)
    assert abs(float(down.mean())) < 4.5 / math.sqrt(1024 * down.numel())


def test_the_size_ratios_of_the_paper_follow_from_the_index_bits() -> None:
    """For each group of M, in bits: Adam with fp32 moments, 16-bit weights and gradients."""
    n, m = 2, 4
    kept, byte_mask = 16 * n + ops.index_bits(n, m), 8 * m
    assert kept / (16 * m) == pytest.approx(0.547, abs=5e-4)  # inference
    dense, moments = 2 * 16 * m + 64 * m, 64 * n
    # Both operands, compact gradients, byte mask, moments.
    sparse = 2 * kept + 16 * n + byte_mask + moments
    assert sparse / dense == pytest.approx(0.682, abs=5e-4)
    assert (sparse + 32 * n) / (dense + 32 * m) == pytest.approx(0.637, abs=5e-4)  # with fp32 masters


@pytest.mark.parametrize("double_prune", [False, True])
def test_a_layer_holds_its_kept_values_and_one_bit_for_each_place_and_mask(double_prune: bool) -> None:
    layer = layer_of(2, 4, 64, 256, 1, dtype=torch.bfloat16, bias=False, double_prune=double_prune)
    masks = sum(buffer.nbytes for buffer in layer.buffers())
    dense = 64 * 256
    assert layer.weight.nbytes == 2 * dense // 2
    assert masks == (2 if double_prune else 1) * dense // 8
    assert (layer.weight.nbytes + masks) / (2 * dense) == (0.625 if double_prune else 0.5625)
    # Compact values, gradients, masters and moments with both masks stay below the paper's share.
    training = (2 + 2 + 4 + 8) * dense // 2 + masks
    assert training / ((2 + 2 + 4 + 8) * dense) < 0.637


def test_a_layer_without_outputs_has_a_mask_without_rows() -> None:
    assert drawn(Key(1), 0, 32, 2, 4).shape == drawn(Key(1), 0, 64, 16, 32)[:, :32].shape == (0, 32)
    for kind in ("random", "magnitude"):
        y = layer_of(2, 4, 0, 32, 1, mask=kind)(torch.ones(3, 32))
        assert y.shape == (3, 0)
