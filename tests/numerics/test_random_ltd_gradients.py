"""Gradients of token dropping: autograd's of plain indexing, to any order, with any other consumers."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from random_ltd_plain import hidden, plain_gather, plain_scatter
from torch.utils.checkpoint import checkpoint

from ds_efficient.errors import UserError
from ds_efficient.ops import random_ltd as ltd

both = pytest.mark.parametrize("backend", ("native", "reference"))
layouts = pytest.mark.parametrize("batch_first", (True, False))


def gradients(x, index, batch_first, gather, scatter):
    """Gradients of x and of a weight, with x used before, beside and after the pair, and the part twice."""
    weight = torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype).requires_grad_()
    x = x.detach().requires_grad_()
    state = x * 2
    part = gather(state, index, batch_first)
    out = part + torch.tanh(part * weight)
    y = scatter(state, out, index, batch_first)
    loss = (y * y).sum() + (state**3).sum() + (part.sin() * weight).sum() + (x * y).sum()
    return (y.detach(), *torch.autograd.grad(loss, (x, weight)))


@both
@layouts
@pytest.mark.parametrize("keep", (0, 1, 13, 37))
def test_gradients_are_autograds_with_other_consumers_of_x(batch_first, backend, keep):
    x = hidden(3, 37, 5, batch_first=batch_first, dtype=torch.float64)
    index = ltd.sample_tokens(37, keep, 3, key=keep)
    expected = gradients(x, index, batch_first, plain_gather, plain_scatter)
    ours = gradients(
        x, index, batch_first,
        lambda x, i, b: ltd.gather_tokens(x, i, batch_first=b, backend=backend),
        lambda x, p, i, b: ltd.scatter_tokens(x, p, i, batch_first=b, backend=backend),
    )  # fmt: skip
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@both
@layouts
def test_each_function_alone_has_the_gradient_of_plain_indexing(batch_first, backend):
    options = {"batch_first": batch_first, "backend": backend}
    x = hidden(2, 20, 4, batch_first=batch_first).requires_grad_()
    part = hidden(2, 9, 4, batch_first=batch_first).requires_grad_()
    index = ltd.sample_tokens(20, 9, 2, key=1)
    up = hidden(2, 20, 4, batch_first=batch_first) + 1
    few = plain_gather(up, index, batch_first)
    (dx,) = torch.autograd.grad(ltd.gather_tokens(x, index, **options), x, few)
    assert torch.equal(dx, plain_scatter(torch.zeros_like(x), few, index, batch_first))
    erased = plain_scatter(up, torch.zeros_like(few), index, batch_first)
    for inputs, expected in (
        ((x, part), (erased, few)),
        ((x.detach(), part), (None, few)),
        ((x, part.detach()), (erased, None)),
    ):
        y = ltd.scatter_tokens(*inputs, index, **options)
        needed = [i for i in inputs if i.requires_grad]
        found = torch.autograd.grad(y, needed, up)
        for a, b in zip(found, [e for e in expected if e is not None], strict=True):
            assert torch.equal(a, b)


@layouts
def test_first_and_second_derivatives_are_finite_differences(batch_first):
    backend = "native"
    options = {"batch_first": batch_first, "backend": backend}
    x = hidden(2, 6, 2, batch_first=batch_first, dtype=torch.float64).requires_grad_()
    part = hidden(2, 3, 2, batch_first=batch_first, dtype=torch.float64).requires_grad_()
    index = ltd.sample_tokens(6, 3, 2, key=4)

    def layer(x, w):
        return ltd.apply_to_kept(lambda p: p * p * w, x, index, **options) * x

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: ltd.gather_tokens(x, index, **options) ** 2, (x,))
        assert check(lambda x, p: ltd.scatter_tokens(x, p, index, **options) ** 2, (x, part))
        assert check(layer, (x, part))
        for split in torch.ops.ds_efficient.ltd_split(x, index, batch_first, backend):
            assert split.requires_grad
        assert check(lambda x: torch.ops.ds_efficient.ltd_split(x * x, index, batch_first, backend), (x,))
        assert check(lambda x: torch.ops.ds_efficient.ltd_erase(x * x, index, batch_first, backend), (x,))
        assert check(
            lambda p: torch.ops.ds_efficient.ltd_spread(p**2, index, 6, batch_first, backend), (part,)
        )


@both
@layouts
@pytest.mark.parametrize("keep", (0, 5, 12))
def test_a_layer_on_the_kept_tokens_equals_gather_and_scatter(batch_first, backend, keep):
    options = {"batch_first": batch_first, "backend": backend}
    index = ltd.sample_tokens(12, keep, 3, key=2)
    base = hidden(3, 12, 4, batch_first=batch_first, dtype=torch.float64)

    def run(through):
        x = base.clone().requires_grad_()
        y = x * 1.5
        for _ in range(3):
            y = through(lambda p: p + torch.sin(p), y) + 0.1 * y
        return (y.detach(), *torch.autograd.grad((y**3).sum(), x))

    ours = run(lambda f, x: ltd.apply_to_kept(f, x, index, **options))
    apart = run(
        lambda f, x: ltd.scatter_tokens(x, f(ltd.gather_tokens(x, index, **options)), index, **options)
    )
    assert torch.equal(ours[0], apart[0])
    torch.testing.assert_close(ours[1], apart[1], rtol=1e-14, atol=1e-14)
    y = ltd.apply_to_kept(lambda p: p, base, index, **options)
    assert torch.equal(y, base)  # an identity layer is the identity


def test_a_layer_that_uses_its_input_twice_not_at_all_or_is_frozen():
    index, one = ltd.sample_tokens(8, 3, 2, key=2), torch.ones(2, 8, 4)
    kept = torch.zeros(2, 8, 1).scatter_(1, index[..., None], 1.0).expand(2, 8, 4)
    x = hidden(2, 8, 4, batch_first=True).requires_grad_()

    def gradient(layer, x=x):
        return torch.autograd.grad(ltd.apply_to_kept(layer, x, index, batch_first=True), x, one)[0]

    weight = torch.full((4,), 3.0, requires_grad=True)
    assert torch.equal(gradient(lambda p: p + p), 1 + kept)
    assert torch.equal(gradient(lambda p: torch.zeros_like(p)), 1 - kept)
    assert torch.equal(gradient(lambda p: torch.ones_like(p) * weight), 1 - kept)
    assert torch.equal(gradient(lambda p: p + x.sum(1, keepdim=True)), 1 + torch.full_like(x, 3.0))
    y = ltd.apply_to_kept(lambda p: p * weight, x.detach(), index, batch_first=True)
    assert torch.autograd.grad(y.sum(), weight)[0].shape == (4,)
    found = []
    ltd.apply_to_kept(lambda p: found.append(p.sum()) or p.detach(), x, index, batch_first=True)
    assert torch.equal(torch.autograd.grad(found[0], x)[0], kept)  # the layer's output is not used


class Pair(NamedTuple):
    state: torch.Tensor
    context: str


@pytest.mark.parametrize("made", (lambda p: (p, "c"), lambda p: [p, "c"], lambda p: Pair(p, "c")))
def test_a_layer_may_return_more_than_its_new_rows(made):
    x, index = torch.ones(1, 4, 2), torch.tensor([[0, 2]])
    result = ltd.apply_to_kept(lambda p: made(p * 2), x, index, batch_first=True)
    assert type(result) is type(made(x)) and result[1] == "c"
    assert result[0][0, :, 0].tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize("reentrant", (True, False))
def test_recomputation_gives_the_same_gradients(reentrant):
    x, index = hidden(2, 16, 4, batch_first=True).requires_grad_(), ltd.sample_tokens(16, 5, 2, key=2)

    def block(x):
        return ltd.apply_to_kept(lambda p: p * p.exp(), x * 2, index, batch_first=True)

    expected = torch.autograd.grad(block(x).square().sum(), x)
    y = checkpoint(block, x, use_reentrant=reentrant).square().sum()
    y.backward()
    assert torch.equal(x.grad, expected[0])


@both
@layouts
def test_scatter_in_place_has_the_same_gradients_and_autograd_stops_where_they_would_be_wrong(
    batch_first, backend
):
    options = {"batch_first": batch_first, "backend": backend}
    x = hidden(2, 10, 3, batch_first=batch_first).requires_grad_()
    part = hidden(2, 4, 3, batch_first=batch_first).requires_grad_()
    index = ltd.sample_tokens(10, 4, 2, key=6)
    found = []
    for in_place in (True, False):
        state = x * 2
        y = ltd.scatter_tokens(state, part, index, in_place=in_place, **options)
        assert (y is state) == in_place
        found.append(torch.autograd.grad((y**2).sum(), (x, part)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    state = x * 2
    saved = state.square().sum()  # keeps the state for its backward pass
    ltd.scatter_tokens(state, part, index, in_place=True, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    before = x.detach().clone()
    with pytest.raises(UserError, match="leaf"):
        ltd.scatter_tokens(x, part, index, in_place=True, **options)
    assert torch.equal(before, x)
    with torch.no_grad():
        ltd.scatter_tokens(x, part, index, in_place=True, **options)
    assert torch.equal(x, plain_scatter(before, part, index, batch_first))
