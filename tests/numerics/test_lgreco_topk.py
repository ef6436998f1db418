"""Largest entries: C++, and CUDA kernels compiled for the host, select what the readable definition does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cuda_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from ds_efficient.errors import UserError
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_topk as topk
from ds_efficient.ops import lgreco_topk_reference as reference
from ds_efficient.ops.lgreco_quantize_reference import Feedback, corrected
from ds_efficient.ops.lgreco_topk_native import TILE, CudaLibrary, Library

NONE = Feedback()
CONTENTS = ("normal", "zeros", "ties", "bad", "tiny", "sorted", "equal", "rows")


class HostLibrary(CudaLibrary):
    """The functions of the CUDA library with host tensors; ``capacity`` replaces its own."""

    capacity: int | None = None

    def found(self) -> int:
        """Candidates of the last call."""
        return int(self.counters[4096 + 3 * 2048])

    def _scratch(self, x: torch.Tensor, k: int) -> tuple[torch.Tensor | int, ...]:
        counters, candidates, tiles, capacity = super()._scratch(x, k)
        if self.capacity is not None:
            capacity = min(self.capacity, x.numel())
            candidates = torch.full((2 * capacity,), -1, dtype=torch.int32)
        self.counters = counters
        return counters, candidates, tiles, capacity


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> HostLibrary:
    return cuda_host.on_host(HostLibrary, tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture(scope="module")
def compiled() -> Library:
    return Library("cpu")


@dataclass(frozen=True)
class Case:
    """What is selected from, where it lies, how much of it, and what is fed back."""

    count: int
    share: float
    dtype: torch.dtype
    out_dtype: torch.dtype
    offset: int
    content: str
    error: str  # "none", "first", "apart" or "in place"

    @property
    def k(self) -> int:
        return max(1, math.ceil(self.share * self.count))

    def source(self) -> torch.Tensor:
        """Numbers at an address that need not be aligned."""
        x = keyed_random.normal(5, (self.offset + self.count,))[self.offset :].clone()
        place = torch.arange(self.count)
        if self.content == "zeros":
            x[place % 50 != 3] = 0
        elif self.content == "ties":
            x = torch.round(x) * torch.where(place % 2 == 0, 1.0, -1.0)
        elif self.content == "bad":
            x[self.count // 3 :: 7] = torch.nan
            x[self.count // 2 :: 11] = -torch.inf
        elif self.content == "tiny":
            x *= 2.0**-130
        elif self.content == "sorted":
            x = x.sort().values
        elif self.content == "equal":
            x.fill_(-2.5)
        elif self.content == "rows":
            x *= torch.where(place % 16 == 0, 100.0, 1.0)
        buffer = torch.zeros(self.offset + self.count, dtype=self.dtype)
        buffer[self.offset :] = x.to(self.dtype)
        return buffer[self.offset :]

    def check(self, library: Library) -> None:
        """Indices, values and errors have the bits of the definition; nothing is written around them."""
        x, made = self.source(), cuda_host.Guarded((1, self.count), torch.float32, self.offset)
        feedback, sent = NONE, self.dtype
        if self.error != "none":
            error = None if self.error == "first" else keyed_random.normal(6, (self.count,)) / 4
            if self.error == "in place":
                error = made.tensor[0].copy_(error)
            feedback, sent = Feedback(error, made.tensor[0], 1 / 3), torch.float32
        whole = x if self.error == "none" else corrected(x, feedback)
        expected = expected_index(whole, self.k)
        size = topk.payload_bytes(self.count, self.k, sent)
        payload = cuda_host.Guarded((1, size), torch.uint8, 0)
        library.select(x, self.k, feedback, payload.tensor)
        assert payload.intact() and made.intact()
        index = payload.tensor[0, : 4 * self.k].view(torch.int32).long()
        assert torch.equal(index, expected)
        view = cuda_host.INTEGER[sent.itemsize]
        values = payload.tensor[0, 4 * self.k :].clone().view(sent)
        assert_same_bits(values, whole[expected], view, exact=self.error == "none")
        if self.error != "none":
            left = whole.index_fill(0, expected, 0.0)
            assert_same_bits(made.tensor[0], left, view, exact=False)
        self.check_sum(library, payload.tensor[0], sent)

    def check_sum(self, library: Library, payload: torch.Tensor, sent: torch.dtype) -> None:
        """Adding up has the bits of the definition."""
        for accumulate in (False, True):
            made = cuda_host.Guarded((1, self.count), self.out_dtype, self.offset)
            start = keyed_random.normal(7, (self.count,)).to(self.out_dtype)
            expected = start.clone()
            reference.scatter(payload, expected, self.k, sent, 1 / 3, accumulate)
            made.tensor[0].copy_(start)
            library.scatter(payload, made.tensor, self.k, sent, 1 / 3, accumulate)
            assert made.intact()
            view = cuda_host.INTEGER[self.out_dtype.itemsize]
            assert_same_bits(made.tensor[0], expected, view, exact=False)


def expected_index(x: torch.Tensor, k: int) -> torch.Tensor:
    """By sorting: the k largest, of equal ones the first."""
    size = x.float().abs()
    size = torch.where(torch.isnan(size), torch.inf, size)
    return torch.sort(-size, stable=True).indices[:k].sort().values


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, view: torch.dtype, *, exact: bool) -> None:
    """The same bits; where not ``exact``, NaN, which has many patterns, in the same places."""
    bad = torch.isnan(expected) & (not exact)
    assert exact or torch.equal(bad, torch.isnan(found))
    assert torch.equal(found.view(view)[~bad], expected.view(view)[~bad])


@st.composite
def cases(draw) -> Case:
    counts = st.one_of(st.integers(1, 40), st.integers(1, 900), st.sampled_from((TILE - 1, TILE, TILE + 1)))
    return Case(
        draw(st.one_of(counts, counts, st.integers(2 * TILE, 3 * TILE))),
        draw(st.sampled_from((0.0, 0.01, 0.1, 0.5, 1.0))), draw(st.sampled_from(topk.DTYPES)),
        draw(st.sampled_from(topk.DTYPES)), draw(st.sampled_from((0, 0, 1, 3))),
        draw(st.sampled_from(CONTENTS)),
        draw(st.sampled_from(("none", "none", "first", "apart", "in place"))),
    )  # fmt: skip


@settings(deadline=None, max_examples=16)
@given(cases())
def test_cuda_kernels_select_the_largest(kernels, case):
    case.check(kernels)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_cpp_selects_the_largest(compiled, case):
    case.check(compiled)


@pytest.mark.parametrize(("content", "error"), (("normal", "apart"), ("zeros", "none"), ("ties", "none")))
def test_cuda_kernels_narrow_the_search_and_need_not(kernels, content, error, monkeypatch):
    case = Case(1 << 16, 0.01, torch.float32, torch.float32, 1, content, error)
    case.check(kernels)
    found = kernels.found()
    if content == "normal":
        assert case.k <= found < 2 * case.k
    elif content == "ties":
        assert found > 10 * case.k  # more than there is room for
    monkeypatch.setattr(HostLibrary, "capacity", found - 1)
    case.check(kernels)


@pytest.mark.parametrize("content", CONTENTS)
def test_cpp_narrows_the_search_with_several_threads(compiled, content):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for share, dtype in zip((0.001, 0.2, 0.6), topk.DTYPES, strict=True):
            Case((1 << 17) + 77, share, dtype, torch.float32, 1, content, "apart").check(compiled)
    finally:
        torch.set_num_threads(threads)


def test_arguments_without_code_are_refused_by_the_kernels(kernels):
    x, payload = torch.zeros(8), torch.zeros(64, dtype=torch.uint8)
    for k in (0, 9):
        with pytest.raises(AssertionError):
            kernels.select(x, k, NONE, payload)
        with pytest.raises(AssertionError):
            kernels.scatter(payload, x, k, torch.float32, 1.0, False)


@pytest.mark.parametrize("backend", topk.BACKENDS)
def test_operators_are_as_torch_wants_them(backend):
    x = keyed_random.normal(1, (5, 30))
    payload = topk.select(x, 7, backend=backend)
    ops, checks = torch.ops.ds_efficient, ("test_schema", "test_faketensor")
    errors = torch.ones_like(x), torch.empty_like(x)
    given = (x, errors[0], payload, errors[1], 7, 0.5, backend)
    torch.library.opcheck(ops.lgreco_select_.default, given, test_utils=checks)
    given = (x, payload, 7, torch.float32, 0.5, True, backend)
    torch.library.opcheck(ops.lgreco_scatter_.default, given, test_utils=checks)
    with FakeTensorMode():
        fake = topk.select(torch.empty(5, 30), 7, backend=backend)
        assert fake.shape == payload.shape and fake.dtype == torch.uint8


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_payloads_at_any_place_and_none_at_all(backend):
    x, buffer = keyed_random.normal(1, (40, 3)).T, torch.zeros(83, dtype=torch.uint8)
    topk.select(x, 10, out=buffer[3:], backend=backend)
    assert torch.equal(buffer[3:], topk.select(x.contiguous(), 10, backend="reference"))
    back = topk.scatter_(torch.zeros(3, 40), buffer[3:], 10, torch.float32, backend=backend)
    assert torch.equal(back.flatten().nonzero().view(-1), expected_index(x.flatten(), 10))
    left = torch.empty(4)
    assert topk.select(torch.ones(4), 0, new_error=left, unscale=0.5, backend=backend).shape == (0,)
    assert torch.equal(left, torch.full((4,), 0.5))
    assert topk.select(torch.ones(0, 3), 0, backend=backend).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk.select(torch.zeros(4), 5), "k=5 "),
        (lambda: topk.select(torch.zeros(4).double(), 1), "float64"),
        (lambda: topk.select(torch.zeros(4), 1, error=torch.zeros(4)), "need new_error"),
        (lambda: topk.select(torch.zeros(4), 1, out=torch.zeros(7).byte()), "out is .* shape \\(7,\\)"),
        (
            lambda: topk.scatter_(torch.zeros(4), torch.zeros(9).byte(), 1, torch.float32),
            "expected .*\\(8,\\)",
        ),
        (lambda: topk.scatter_(torch.zeros(4), torch.zeros(8).byte(), 1, torch.int32), "sent=torch.int32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
