"""Gradients between inverse factors: float64 products, the norm, half types, what is left alone."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mkor_factors import Factors
from torch.utils._python_dispatch import TorchDispatchMode

from ds_efficient.core.keys import Key
from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.ops import keyed_random, mkor_precondition
from ds_efficient.ops.mkor_factored import FactoredFactors, damping
from ds_efficient.ops.mkor_precondition import LowRank, operations, precondition_, rescale_

KINDS = (None, "dense", "low")
OUT, IN = 24, 40


def factor(kind: str | None, size: int, dtype: torch.dtype) -> tuple[object, torch.Tensor]:
    """A factor, and the matrix that it stands for in float64."""
    if kind is None:
        return None, torch.eye(size, dtype=torch.float64)
    if kind == "dense":
        matrix = Factors.draw([size], torch.float32, size).matrices[0]
        return matrix, matrix.double()
    factors = FactoredFactors([size], 7, operand_dtype=dtype)
    for step in range(12):
        v = keyed_random.normal(Key(5).fold(step), (size,))
        factors.update_(v, gamma=0.9, threshold=10.0, zeta=0.8)
    share = damping(dtype)
    identity = torch.eye(size, dtype=torch.float64)
    return LowRank(factors.operand(0)), (1 - share) * factors.dense(0) + share * factors.a[0] * identity


def gradient(dtype: torch.dtype, bias: bool, seed: int = 0) -> torch.Tensor:
    """(out, in), or with the bias's gradient as last column."""
    return keyed_random.normal(Key(6).fold(seed), (OUT, IN + bias)).to(dtype)


def split(joined: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias."""
    if not bias:
        return joined.clone(), None
    return joined[:, :-1].contiguous(), joined[:, -1].contiguous()


def joined(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """One matrix again."""
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("bias", (True, False))
def test_products_at_the_norm_of_the_gradient_for_all_kinds_of_factors(dtype, bias):
    weights, biases, lefts, rights, expected = [], [], [], [], []
    for seed, (left_kind, right_kind) in enumerate(itertools.product(KINDS, KINDS)):
        left, left_matrix = factor(left_kind, OUT, dtype)
        right, right_matrix = factor(right_kind, IN + bias, dtype)
        g = gradient(dtype, bias, seed)
        p = left_matrix @ g.double() @ right_matrix
        expected.append((g.double(), p * g.double().norm() / p.norm()))
        weight, column = split(g, bias)
        weights.append(weight)
        biases.append(column)
        lefts.append(left)
        rights.append(right)
    sums = precondition_(weights, biases, lefts, rights)
    for index, (g, p) in enumerate(expected):
        made = joined(weights[index], biases[index]).double()
        eps = torch.finfo(dtype).eps
        assert (made - p).norm() <= max(2 * eps, 1e-6) * g.norm(), index
        torch.testing.assert_close(made.norm(), g.norm(), rtol=max(eps, 1e-6), atol=0)
        assert (made * g).sum() > 0 and sums[index, 2] > 0
        torch.testing.assert_close(sums[index, 0], g.norm().square(), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=20)
@given(st.integers(-60, 40), st.sampled_from((1e-20, 1.0, 1e15)))
def test_the_scale_of_the_gradient_does_not_matter(exponent, scale):
    right, _ = factor("low", IN + 1, torch.float32)
    left, _ = factor("dense", OUT, torch.float32)
    made = []
    for factor_of_two in (1.0, 2.0**exponent):
        weight, bias = split(gradient(torch.float32, True), True)
        weight, bias = weight * factor_of_two, bias * factor_of_two
        precondition_([weight], [bias], [left], [right])
        made.append(joined(weight, bias) / factor_of_two)
    torch.testing.assert_close(made[0], made[1], rtol=1e-6, atol=1e-6)


def test_gradients_that_are_zero_or_not_finite_or_turned_away_stay():
    left, _ = factor("dense", OUT, torch.float32)
    negative = -torch.eye(OUT)
    huge = 3e38 * torch.eye(OUT)
    cases = [gradient(torch.float32, True, seed) for seed in range(5)]
    cases[0] = torch.zeros_like(cases[0])
    cases[1][2, 3] = torch.nan
    cases[2][1, -1] = torch.inf
    cases[4] = cases[4] * 1e10
    parts = [split(case, True) for case in cases]
    precondition_(
        [weight for weight, _ in parts], [bias for _, bias in parts],
        [left, left, left, negative, huge], [None] * 5,
    )  # fmt: skip
    for case, (weight, bias) in zip(cases, parts, strict=True):
        torch.testing.assert_close(joined(weight, bias), case, rtol=0, atol=0, equal_nan=True)


def test_weight_and_bias_share_one_scale():
    g, p = torch.full((2, 2), 3.0), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    c, q = torch.full((2,), 4.0), torch.tensor([10.0, 20.0])
    sums = rescale_([g, c], [p, q], [2])
    scale = ((4 * 9 + 2 * 16) / (30 + 500)) ** 0.5
    torch.testing.assert_close(g, p * scale)
    torch.testing.assert_close(c, q * scale)
    assert sums.tolist() == [[68.0, 530.0, 3.0 * 10 + 4.0 * 30]]


def test_products_given_as_differences():
    g, p = gradient(torch.bfloat16, False), gradient(torch.bfloat16, False, 1) / 4
    made, expected = g.clone(), g.clone()
    sums = rescale_([made], [p], [1], subtract=True)
    wanted = rescale_([expected], [g.float() - p.float()], [1])
    assert torch.equal(made, expected) and torch.equal(sums, wanted)


class Calls(TorchDispatchMode):
    """Counts calls of operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def layers_in(layout: str, number: int) -> tuple[list, list]:
    """Gradients of equal layers one behind the other in a buffer, from the last to the first, or anywhere."""
    made = [split(gradient(torch.float32, True, seed), True) for seed in range(number)]
    if layout == "apart":
        return [weight for weight, _ in made], [bias for _, bias in made]
    flat = torch.cat([torch.cat([weight.flatten(), bias]) for weight, bias in made])
    pairs = [piece.split([OUT * IN, OUT]) for piece in flat.split(OUT * IN + OUT)]
    if layout == "reversed":
        for (weight, bias), (w, b) in zip(made, reversed(pairs), strict=True):
            w.copy_(weight.flatten())
            b.copy_(bias)
        pairs = pairs[::-1]
    return [weight.view(OUT, IN) for weight, _ in pairs], [bias for _, bias in pairs]


@pytest.mark.parametrize("layout", ("flat", "reversed", "apart"))
@pytest.mark.parametrize("large", (False, True))
def test_equal_layers_together_are_those_one_by_one(monkeypatch, layout, large):
    factors = FactoredFactors([OUT, IN + 1] * 7, 5)
    for step in range(8):
        v = keyed_random.normal(Key(9).fold(step), (7 * (OUT + IN + 1),))
        factors.update_(v, gamma=0.9, threshold=10.0, zeta=0.8)
    operands = [LowRank(factors.operand(index)) for index in range(14)]
    weights, biases = layers_in(layout, 7)
    expected = [(weight.clone(), bias.clone()) for weight, bias in zip(weights, biases, strict=True)]
    rows = [
        precondition_([weight], [bias], operands[2 * index : 2 * index + 1], operands[2 * index + 1 :][:1])
        for index, (weight, bias) in enumerate(expected)
    ]
    if large:  # three products at a time
        monkeypatch.setattr(mkor_precondition, "_SMALL", 0)
        monkeypatch.setattr(mkor_precondition, "_WAITING", 3 * OUT * IN)
    sums = precondition_(weights, biases, operands[::2], operands[1::2])
    torch.testing.assert_close(sums, torch.cat(rows), rtol=1e-6, atol=1e-6)
    for weight, bias, (wanted, column) in zip(weights, biases, expected, strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias, column, rtol=1e-5, atol=1e-6)


def test_in_a_flat_buffer_calls_do_not_grow_with_the_layers(monkeypatch):
    monkeypatch.setattr(mkor_precondition, "_SMALL", 0)
    counts = []
    for number in (2, 12):
        factors = FactoredFactors([OUT, IN + 1] * number, 5)
        operands = [LowRank(factors.operand(index)) for index in range(2 * number)]
        weights, biases = layers_in("flat", number)
        with Calls() as calls:
            precondition_(weights, biases, operands[::2], operands[1::2])
        counts.append(len(calls.names))
        assert calls.names.count("mm") == 0 and calls.names.count("bmm") == 6
    assert counts[0] == counts[1]


@pytest.mark.parametrize("case", ("converted gradients", "dense factors of narrow layers"))
def test_what_is_copied_for_layers_together_is_bounded(monkeypatch, case):
    """On the CPU half gradients are converted; a factor may be larger than the gradient that it is for."""
    if case == "converted gradients":
        monkeypatch.setattr(mkor_precondition, "_SMALL", 0)
        weights = [gradient(torch.bfloat16, False, seed) for seed in range(7)]
        factors = [factor("low", size, torch.float32)[0] for size in (OUT, IN)]
        room = 3 * (OUT * IN + (OUT + IN) * 7 * 2)
    else:
        weights = [gradient(torch.float32, False, seed)[:2] for seed in range(7)]
        factors = [None, factor("dense", IN, torch.float32)[0]]
        room = 3 * IN * IN
    monkeypatch.setattr(mkor_precondition, "_TOGETHER", room)
    with mock.patch.object(mkor_precondition, "_products", wraps=mkor_precondition._products) as made:
        precondition_(weights, [None] * 7, factors[:1] * 7, factors[1:] * 7)
    assert [len(call.args[0]) for call in made.call_args_list] == [3, 3, 1]


def test_operations_are_those_of_the_docstring():
    assert operations(8, 6, 2, None) == 4 * 8 * 6 * 2
    assert operations(8, 6, 0, 0) == 2 * 8 * 6 * (8 + 6)
    assert operations(8, 6, 2, 2) == 8 * 8 * 6 * 2


def test_operator_contract_of_the_rescaling():
    tensors = [gradient(torch.float32, False, seed) for seed in range(4)]
    torch.library.opcheck(
        torch.ops.ds_efficient.mkor_rescale_.default,
        (tensors[:2], tensors[2:], [1, 1], True, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"weights": [torch.ones(3, 4).T]}, r"weights\[0\]"),
        ({"weights": [torch.ones(4, 3, dtype=torch.float64)]}, "float64"),
        ({"biases": [torch.ones(3)]}, r"biases\[0\]"),
        ({"lefts": [torch.eye(3)]}, r"lefts\[0\] has shape \(3, 3\)"),
        ({"rights": [torch.ones(3, 2)]}, r"rights\[0\] has shape \(3, 2\)"),
        ({"rights": [LowRank(torch.ones(4, 2))]}, r"operand \(3, rank\)"),
        ({"biases": [torch.ones(4)], "rights": [torch.eye(3)]}, r"rights\[0\]"),
    ),
)
def test_bad_arguments_are_named(change, message):
    arguments = {"weights": [torch.ones(4, 3)], "biases": [None], "lefts": [None], "rights": [None], **change}
    with pytest.raises(UserError, match=message):
        precondition_(*arguments.values())


def test_no_layers_and_no_kernels_on_the_cpu():
    assert precondition_([], [], [], []).shape == (0, 3)
    with pytest.raises(OpBuildError, match="CUDA only"):
        precondition_([torch.ones(2, 2)], [None], [None], [None], backend="native")
