"""L-GreCo's planner: guarantee against all plans, edges, C++ against the reference."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.errors import UserError
from ds_efficient.lgreco import error_budget, mix_options, plan_compression
from ds_efficient.ops import lgreco_planner as op

INF = math.inf


def all_plans(errors, sizes):
    """(exact error, exact size, choices) of every plan of usable options."""
    usable = [[c for c, e in enumerate(row) if math.isfinite(e)] for row in errors]
    for plan in itertools.product(*usable):
        error = sum((Fraction(errors[layer][c]) for layer, c in enumerate(plan)), Fraction(0))
        yield error, sum((Fraction(sizes[layer][c]) for layer, c in enumerate(plan)), Fraction(0)), plan


def totals(errors, sizes, plan):
    """Exact error and size of one plan."""
    return tuple(
        sum((Fraction(table[layer][c]) for layer, c in enumerate(plan)), Fraction(0))
        for table in (errors, sizes)
    )


def optimum(errors, sizes, budget):
    """Least size of all plans within the budget, None without one."""
    return min((size for error, size, _ in all_plans(errors, sizes) if error <= budget), default=None)


def random_instance(seed, layers=5, options=5):
    rng = np.random.default_rng(seed)
    errors = np.sort(rng.uniform(0, 1, (layers, options)), axis=1)
    sizes = np.sort(rng.uniform(1, 100, (layers, options)), axis=1)[:, ::-1].copy()
    return errors, sizes


# ---- small instances against all plans ----


@pytest.mark.parametrize(("buckets", "least"), [(20, 0.1), (100, 0.5), (1000, 0.85), (10_000, 0.97)])
def test_random_instances_come_ever_nearer_to_the_optimum(buckets, least):
    found = 0
    for seed in range(60):
        errors, sizes = random_instance(seed, 4, 5)
        budget = error_budget(errors, 2)
        grids = [
            [row[index] for row, index in zip(table, np.indices((5,) * 4), strict=True)]
            for table in (errors, sizes)
        ]
        best = sum(grids[1])[sum(grids[0]) <= budget * (1 + 1e-12)].min()
        plan = plan_compression(errors, sizes, budget, buckets=buckets, default=2).tolist()
        error, size = totals(errors, sizes, plan)
        assert error <= Fraction(budget) * (1 + Fraction(1e-9))
        assert size <= totals(errors, sizes, [2] * 4)[1]
        assert float(size) >= best * (1 - 1e-12)
        found += float(size) <= best * (1 + 1e-12)
    assert found >= least * 60


numbers = st.one_of(
    st.just(0.0),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    st.floats(0, 10, allow_subnormal=False),
    st.sampled_from([INF, math.nan, 1e-300, 1e300]),
)


@st.composite
def instances(draw):
    layers = draw(st.integers(1, 4))
    errors, sizes = [], []
    for _ in range(layers):
        row = draw(st.lists(numbers, min_size=1, max_size=4))
        errors.append(row)
        sizes.append(
            draw(st.lists(st.integers(0, 6) | st.floats(0, 1e6), min_size=len(row), max_size=len(row)))
        )
    default = [draw(st.integers(0, len(row) - 1)) for row in errors]
    usable = all(math.isfinite(row[c]) for row, c in zip(errors, default, strict=True))
    of_default = math.fsum(row[c] for row, c in zip(errors, default, strict=True)) if usable else INF
    budgets = [st.just(0.0), st.floats(0, 30)]
    if of_default < 1e100:
        budgets.append(st.just(of_default))
    return errors, sizes, draw(st.one_of(budgets)), default, draw(st.sampled_from([1, 3, 10, 1000]))


@given(instances(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_guarantee_on_every_instance(instance, with_default):
    errors, sizes, budget, default, buckets = instance
    tolerant = Fraction(budget) * (1 + Fraction(1, 10**9))
    plain = [[e if e <= 1e290 else INF for e in row] for row in errors]  # NaN is not <=
    feasible = [plan for plan in all_plans(plain, sizes) if plan[0] <= Fraction(budget)]
    arguments = {"buckets": buckets, "default": default if with_default else None}
    try:
        plan = plan_compression(errors, sizes, budget, **arguments).tolist()
    except UserError:
        assert not feasible
        return
    assert all(math.isfinite(plain[layer][c]) for layer, c in enumerate(plan))
    error, size = totals(errors, sizes, plan)
    assert error <= tolerant
    if with_default and all(math.isfinite(plain[layer][c]) for layer, c in enumerate(default)):
        of_default = totals(errors, sizes, default)
        assert of_default[0] > Fraction(budget) or float(size) <= float(of_default[1])
    reach = Fraction(budget) * (1 - Fraction(len(errors), buckets))
    better = [other for other_error, other, _ in feasible if other_error <= reach]
    assert not better or float(size) <= float(min(better)) * (1 + 1e-12)
    assert plan == plan_compression(errors, sizes, budget, **arguments, backend="reference").tolist()


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_errors_that_are_whole_buckets_give_the_optimum(data):
    layers, options = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    buckets = data.draw(st.integers(1, 12))
    step = data.draw(st.floats(1e-6, 1e6))
    row = st.lists(st.integers(0, 8), min_size=options, max_size=options)
    cells = data.draw(st.lists(row, min_size=layers, max_size=layers))
    sizes = data.draw(st.lists(row, min_size=layers, max_size=layers))
    errors = [[cell * step for cell in one] for one in cells]
    best = optimum(cells, sizes, buckets)
    if best is None:
        with pytest.raises(UserError, match="least possible sum of errors"):
            plan_compression(errors, sizes, buckets * step, buckets=buckets)
        return
    plan = plan_compression(errors, sizes, buckets * step, buckets=buckets).tolist()
    cell, size = totals(cells, sizes, plan)
    assert cell <= buckets and size == best
    # Of equal sizes the least error.
    assert cell == min(e for e, s, _ in all_plans(cells, sizes) if e <= buckets and s == best)


@given(st.integers(0, 10_000), st.sampled_from([7, 50, 1000]), st.floats(1.0, 3.0))
@settings(deadline=None, max_examples=60)
def test_a_larger_budget_and_one_more_option_never_cost_more(seed, buckets, factor):
    errors, sizes = random_instance(seed, 4, 4)
    budget = error_budget(errors, 2)

    def cost(errors, sizes, budget):
        plan = plan_compression(errors, sizes, budget, buckets=buckets, default=2).tolist()
        return float(totals(errors, sizes, plan)[1])

    first = cost(errors, sizes, budget)
    assert cost(errors, sizes, budget * factor) <= first
    more = np.random.default_rng(seed + 1).uniform(0, 1, (4, 1))
    assert cost(np.hstack([errors, more]), np.hstack([sizes, 100 * more]), budget) <= first


# ---- edges ----


def test_default_that_rounding_makes_infeasible_is_returned():
    errors, sizes = [[1.0, 0.0]] * 3, [[1.0, 9.0]] * 3
    budget = error_budget(errors, 0)  # 3, in two buckets: each error is rounded up to 1.5
    assert plan_compression(errors, sizes, budget, buckets=2, default=0).tolist() == [0, 0, 0]
    assert plan_compression(errors, sizes, budget, buckets=3).tolist() == [0, 0, 0]
    without = plan_compression(errors, sizes, budget, buckets=2)
    assert sorted(without.tolist()) == [0, 0, 1]


def test_least_error_is_returned_where_rounding_leaves_nothing_else():
    errors = [[1.0, 1.5]] * 3
    assert plan_compression(errors, [[9.0, 1.0]] * 3, 3.0, buckets=2).tolist() == [0, 0, 0]


def test_default_above_the_budget_does_not_bind():
    assert plan_compression([[0.0, 5.0]], [[9.0, 1.0]], 1.0, default=1).tolist() == [0]


def test_budget_below_every_plan_names_the_least_error():
    with pytest.raises(UserError, match=r"budget=1 cannot be met: .* is 3; raise"):
        plan_compression([[1.0, 2.0], [2.0, 3.0]], [[2.0, 1.0]] * 2, 1.0, default=0)


def test_budget_of_zero_allows_only_zero_errors():
    assert plan_compression([[0.0, 1e-300, 0.0]] * 2, [[9.0, 1.0, 5.0]] * 2, 0.0).tolist() == [2, 2]
    with pytest.raises(UserError, match="budget=0 cannot be met"):
        plan_compression([[1e-300]], [[1.0]], 0.0)


def test_zero_errors_everywhere_give_the_smallest_sizes():
    assert plan_compression(torch.zeros(3, 2), torch.tensor([[2, 1], [1, 2], [1, 1]]), 1.0).tolist() == [
        1,
        0,
        0,
    ]


def test_unusable_options_are_never_chosen_and_their_sizes_not_read():
    errors = [[math.nan, 1.0, INF], [INF, 1.0, 0.5]]
    sizes = [[math.nan, 5.0, -1.0], [0.0, 1.0, 2.0]]
    assert plan_compression(errors, sizes, 10.0).tolist() == [1, 1]
    with pytest.raises(UserError, match="layer 1 has no option with a finite error"):
        plan_compression([[1.0], [math.nan]], [[1.0], [1.0]], 10.0)


def test_one_layer_one_option_and_no_layers():
    assert plan_compression([[3.0, 2.0, 1.0]], [[1.0, 2.0, 3.0]], 2.0).tolist() == [1]
    assert plan_compression([[3.0]], [[1.0]], 3.0, buckets=1).tolist() == [0]
    assert plan_compression(torch.zeros(0, 3), torch.zeros(0, 3), 1.0, default=0).tolist() == []


def test_option_above_the_budget_is_never_rounded_into_it():
    assert plan_compression([[2.0, 1.0]], [[1.0, 2.0]], 1.999, buckets=1).tolist() == [1]


def test_error_slightly_above_whole_buckets_is_rounded_up():
    plan = plan_compression([[5.001, 0.0]] * 2, [[1.0, 9.0]] * 2, 10.0, buckets=10)
    assert sorted(plan.tolist()) == [0, 1]


def test_layers_may_have_different_numbers_of_options():
    errors = [torch.tensor([0.0, 1.0]), np.array([0.0, 0.5, 1.0]), [0.25]]
    sizes = [[8, 1], [8, 4, 1], [3]]
    assert plan_compression(errors, sizes, 1.75, buckets=7).tolist() == [1, 1, 0]
    padded = [[0.0, 1.0, INF], [0.0, 0.5, 1.0], [0.25, INF, INF]]
    assert plan_compression(padded, [[8, 1, 0], [8, 4, 1], [3, 0, 0]], 1.75, buckets=7).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": [[-1.0, 1.0]]}, "errors: option 0 of layer 0 is -1"),
        ({"sizes": [[1.0, math.nan]]}, "sizes: option 1 of layer 0 is nan"),
        ({"sizes": [[1.0]]}, "layer 0: 2 and 1 options"),
        ({"sizes": []}, "1 and 0 layers"),
        ({"errors": [[]], "sizes": [[]]}, "layer 0 has no options"),
        ({"errors": [1.0], "sizes": [1.0]}, "row 0 has 0 dimensions"),
        ({"budget": math.nan}, "budget=nan"),
        ({"budget": -1.0}, "budget=-1"),
        ({"buckets": 0}, "buckets=0"),
        ({"default": 2}, "layer 0 has no option 2"),
        ({"default": [0, 0]}, "default has shape"),
        ({"default": 0.5}, "default=0.5"),
        ({"backend": "gpu"}, "backend='gpu'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"errors": [[0.0, 1.0]], "sizes": [[2.0, 1.0]], "budget": 1.0, **change}
    with pytest.raises(UserError, match=message):
        plan_compression(**arguments)


def test_error_budget_is_the_sum_of_the_default():
    errors = torch.tensor([[1.0, 2.0], [4.0, INF]])
    assert error_budget(errors, [1, 0]) == 6.0 and error_budget(errors, 0, alpha=2) == 10.0
    with pytest.raises(UserError, match="option 1 of layer 1 has no finite error"):
        error_budget(errors, 1)


def test_mixed_compressors_are_at_least_as_good_as_each_alone():
    rng = np.random.default_rng(3)
    tables = [(rng.uniform(0, 1, (6, k)), rng.uniform(1, 9, (6, k))) for k in (3, 5)]
    mixed = mix_options(tables)
    plan = plan_compression(mixed.errors, mixed.sizes, 2.5)
    size = sum(row[c] for row, c in zip(mixed.sizes, plan, strict=True))
    for errors, sizes in tables:
        alone = plan_compression(errors, sizes, 2.5)
        assert size <= sizes[np.arange(6), alone.numpy()].sum() + 1e-9
    for layer, choice in enumerate(plan.tolist()):
        compressor, option = mixed.origins[layer][choice]
        assert mixed.sizes[layer][choice] == tables[compressor][1][layer, option]
    with pytest.raises(UserError, match="numbers of layers"):
        mix_options([tables[0], (tables[1][0][:2], tables[1][1][:2])])


# ---- C++ against the reference ----


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 3000), st.booleans())
@settings(deadline=None, max_examples=150)
def test_native_is_the_reference_bit_for_bit(seed, layers, capacity, with_ties):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0 if seed % 17 == 0 else 1, 9, layers)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    high = max(1, 2 * capacity // max(1, layers))
    cells = torch.from_numpy(rng.integers(0, high + 1, int(offsets[-1])))
    costs = rng.integers(0, 4, len(cells)).astype(float) if with_ties else rng.uniform(0, 1, len(cells))
    arguments = (offsets, cells, torch.from_numpy(costs), capacity)
    native = op.plan(*arguments, backend="native")
    assert torch.equal(native, op.plan(*arguments, backend="reference"))
    if layers and native.min() >= 0:
        assert cells[offsets[:-1] + native].sum() <= capacity


def test_operator_has_a_fake_implementation():
    arguments = (torch.tensor([0, 2, 3]), torch.tensor([1, 2, 0]), torch.tensor([2.0, 1.0, 1.0]).double(), 5)
    torch.library.opcheck(
        torch.ops.ds_efficient.lgreco_plan,
        (*arguments, "native"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.tensor([0, 3]), "offsets must ascend"),
        (1, torch.tensor([1, -2]), "numbers >= 0"),
        (1, torch.tensor([1.0, 2.0]), "cells is torch.float32"),
        (2, torch.tensor([1.0, math.nan]).double(), "numbers >= 0"),
        (2, torch.tensor([1.0]).double(), "costs has 1 elements"),
        (3, -1, "capacity=-1"),
    ],
)
def test_operator_refuses_wrong_arguments(place, value, message):
    arguments = [torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([2.0, 1.0]).double(), 5]
    arguments[place] = value
    with pytest.raises(UserError, match=message):
        op.plan(*arguments)


def test_many_layers_and_options_fit_the_budget():
    errors, sizes = random_instance(1, 300, 60)
    budget = error_budget(errors, 30)
    plan = plan_compression(errors, sizes, budget, default=30, backend="native").numpy()
    layers = np.arange(300)
    assert errors[layers, plan].sum() <= budget * (1 + 1e-9)
    assert sizes[layers, plan].sum() < sizes[:, 30].sum()
