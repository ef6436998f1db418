"""The products of a low-rank exchange with error feedback: as in float64, the same bits on every rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.errors import UserError
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_low_rank as low_rank

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 150), st.integers(1, low_rank.MOST_RANK + 3))


def draw(key, *shape):
    return keyed_random.normal(key, shape)


def threads_of(count, work):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def gradient(n, m, dtype, strided):
    x = draw(1, n, m).to(dtype)
    return x.T.contiguous().T if strided else x


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.sampled_from(DTYPES), st.sampled_from(("none", "apart", "same")), st.booleans())
def test_the_projection_is_that_of_the_gradient_and_its_error(shape, dtype, feedback, strided):
    n, m, r = shape
    x, q, p = gradient(n, m, dtype, strided), draw(2, r, m), torch.empty(n, r)
    error = None if feedback == "none" else draw(3, n, m)
    want = 0.5 * x.double() + (0 if error is None else error.double())
    corrected = error if feedback == "same" and error is not None else torch.empty(n, m)
    low_rank.project(x, error, q, corrected, p, unscale=0.5)
    torch.testing.assert_close(corrected, want.float(), rtol=1e-6, atol=1e-6)
    exact = corrected.double() @ q.double().T
    torch.testing.assert_close(p.double(), exact, rtol=1e-5, atol=1e-5 * (1 + float(exact.abs().max())))
    back = torch.empty(r, m)
    low_rank.project_back(corrected, p, back)
    exact = p.double().T @ corrected.double()
    torch.testing.assert_close(back.double(), exact, rtol=1e-5, atol=1e-5 * (1 + float(exact.abs().max())))


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.sampled_from(DTYPES), st.booleans(), st.sampled_from((1.0, 8.0)))
def test_the_mean_is_rebuilt_and_taken_from_the_error(shape, dtype, strided, scale):
    n, m, r = shape
    p, q, before = draw(4, n, r), draw(5, r, m), draw(6, n, m)
    out, error = gradient(n, m, dtype, strided), before.clone()
    low_rank.rebuild(out, error, p, q, scale=scale, scratch=torch.empty)
    mean = p.double() @ q.double()
    torch.testing.assert_close(error.double(), before.double() - mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, (scale * mean).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("rank", [3, 8, 16])
def test_bits_depend_neither_on_threads_nor_on_the_place_of_the_gradient(rank):
    n, m = 1003, 517
    x, q = draw(7, n, m), draw(8, rank, m)

    def run():
        p, corrected, back = torch.empty(n, rank), torch.empty(n, m), torch.empty(rank, m)
        low_rank.project(x, None, q, corrected, p)
        low_rank.project_back(corrected, p, back)
        out = torch.empty(n * m + 1)[1:].view(n, m) if torch.get_num_threads() > 1 else torch.empty(n, m)
        low_rank.rebuild(out, corrected, p, back, scale=1.0, scratch=torch.empty)
        return p, back, corrected, out

    one, three = threads_of(1, run), threads_of(3, run)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_shapes_that_do_not_go_together_are_refused():
    x, p, q = draw(1, 4, 5), draw(2, 4, 2), draw(3, 2, 6)
    calls = (
        lambda: low_rank.project(x, None, q, torch.empty(4, 5), p),
        lambda: low_rank.project_back(x, p, q),
        lambda: low_rank.rebuild(x, torch.empty(4, 5), p, q, scale=1.0, scratch=torch.empty),
    )
    for call in calls:
        with pytest.raises(UserError, match=r"p \(4, 2\) and q \(2, 6\) do not go together"):
            call()
    with pytest.raises(UserError, match=r"q is torch.float32 with strides"):
        low_rank.project_back(x, p, draw(4, 5, 2).T)
