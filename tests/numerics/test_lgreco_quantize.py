"""Quantisation of gradients: C++, and CUDA kernels compiled for the host, have the bits of plain torch."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import cuda_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from ds_efficient.errors import UserError
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_quantize as quantize
from ds_efficient.ops import lgreco_quantize_reference as reference
from ds_efficient.ops.lgreco_quantize_native import Library

KEY = 0x9E3779B97F4A7C15
NONE = reference.Feedback()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Library:
    return cuda_host.on_host(Library, tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture(scope="module")
def compiled() -> Library:
    return Library("cpu")


@dataclass(frozen=True)
class Case:
    """What is quantised, where it lies, and how it is added up."""

    count: int
    bits: int
    bucket: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    offset: int
    content: str
    weight: float
    ranks: int = 1
    key: int = KEY

    def source(self) -> torch.Tensor:
        """Numbers at an address that is not aligned."""
        x = keyed_random.normal(5, (self.offset + self.count,)) * 10.0 ** (self.count % 7 - 3)
        x = x.to(self.dtype)[self.offset :]
        some = slice(self.count // 3, self.count // 3 + 2)
        if self.content == "zeros":
            x[some.start :] = 0
        elif self.content == "bad":
            x[some] = torch.tensor([math.nan, -math.inf][: len(x[some])])
        elif self.content == "overflow":
            x[some] = torch.tensor([3e38, -3e38][: len(x[some])]).to(self.dtype)
        elif self.content == "tiny":
            x *= 2.0**-110
        return x

    def feedback(self, error: torch.Tensor | None, new_error: torch.Tensor) -> reference.Feedback:
        """With a factor that rounds."""
        return reference.Feedback(error, new_error, 1 / 3)

    def check(self, library: Library) -> None:
        """Payload and sums have the bits of the reference, and nothing is written around them."""
        x = self.source()
        expected = reference.quantize(x, self.key, self.bits, self.bucket)
        size = quantize.payload_bytes(self.count, self.bits, self.bucket)
        assert expected.shape == (size,)
        payload = cuda_host.Guarded((1, size), torch.uint8, 0)
        assert payload.tensor.data_ptr() % 8 == 0
        library.quantize(x, NONE, self.key, self.bits, self.bucket, payload.tensor)
        assert payload.equals(expected[None])
        rows = torch.zeros(self.ranks, -(-size // 8) * 8, dtype=torch.uint8)[:, :size]
        for number, row in enumerate(rows):
            row.copy_(reference.quantize(x.flip(0) if number else x, number, self.bits, self.bucket))
        for accumulate in (False, True):
            made = cuda_host.Guarded((1, self.count), self.out_dtype, self.offset)
            start = keyed_random.normal(6, (1, self.count)).to(self.out_dtype)
            total = reference.dequantize(
                rows, start[0].clone(), self.bits, self.bucket, self.weight, accumulate
            )
            made.tensor.copy_(start)
            library.dequantize(rows, made.tensor, self.bits, self.bucket, self.weight, accumulate)
            assert made.intact()
            assert_same_bits(made.tensor[0], total)

    def check_feedback(self, library: Library, *, first: bool, in_place: bool) -> None:
        """What is sent and what is fed back have the bits of the reference, one after the other."""
        x = self.source()
        error = None if first else 0.01 * keyed_random.normal(7, (self.count,))
        wide = reference.corrected(x, reference.Feedback(error, None, 1 / 3))
        payload = reference.quantize(wide, self.key, self.bits, self.bucket)
        expected = wide - reference.values(payload, self.count, self.bits, self.bucket)
        made = cuda_host.Guarded((1, self.count), torch.float32, self.offset)
        if error is not None and in_place:
            error = made.tensor[0].copy_(error)
        found = torch.empty_like(payload)
        feedback = self.feedback(error, made.tensor[0])
        library.quantize(x, feedback, self.key, self.bits, self.bucket, found)
        assert torch.equal(found, payload) and made.intact()
        assert_same_bits(made.tensor[0], expected)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN, which has many patterns, in the same places, and elsewhere the same bits."""
    bad = torch.isnan(expected)
    assert torch.equal(bad, torch.isnan(found))
    view = cuda_host.INTEGER[expected.element_size()]
    assert torch.equal(found.view(view)[~bad], expected.view(view)[~bad])


@st.composite
def cases(draw) -> Case:
    sizes = st.one_of(st.sampled_from((1, 32, 33, 64, 65, 128)), st.integers(1, 128))
    bucket = 8 * draw(sizes)
    counts = st.one_of(st.integers(1, 40), st.integers(1, 3 * bucket), st.just(9 * bucket + 3))
    return Case(
        draw(counts), draw(st.integers(2, 8)), bucket, draw(st.sampled_from(quantize.DTYPES)),
        draw(st.sampled_from(quantize.DTYPES)), draw(st.sampled_from((0, 0, 1, 3, 8))),
        draw(st.sampled_from(("normal", "normal", "zeros", "bad", "overflow", "tiny"))),
        draw(st.sampled_from((1.0, 0.5, 1 / 3))), draw(st.sampled_from((1, 1, 2, 3))),
        draw(st.integers(0, 2**64 - 1)),
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(cases())
def test_cuda_kernels_have_the_bits_of_plain_torch(kernels, case):
    case.check(kernels)


@settings(deadline=None, max_examples=40)
@given(cases(), st.booleans(), st.booleans())
def test_cuda_kernels_feed_back_the_bits_of_plain_torch(kernels, case, first, in_place):
    case.check_feedback(kernels, first=first, in_place=in_place)


@settings(deadline=None, max_examples=80)
@given(cases())
def test_cpp_has_the_bits_of_plain_torch(compiled, case):
    case.check(compiled)


@settings(deadline=None, max_examples=40)
@given(cases(), st.booleans(), st.booleans())
def test_cpp_feeds_back_the_bits_of_plain_torch(compiled, case, first, in_place):
    case.check_feedback(compiled, first=first, in_place=in_place)


@pytest.mark.parametrize("dtype", quantize.DTYPES, ids=str)
@pytest.mark.parametrize("bits", (3, 4, 8))
def test_more_elements_than_a_thread_takes(compiled, bits, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        Case(200_003, bits, 512, dtype, torch.float32, 0, "normal", 0.25, 2).check(compiled)
    finally:
        torch.set_num_threads(threads)


def test_arguments_without_code_are_refused_by_the_kernels(kernels):
    x, payload = torch.zeros(8), torch.zeros(64, dtype=torch.uint8)
    for bits, bucket in ((1, 8), (9, 8), (4, 4), (4, 12), (4, 1032)):
        with pytest.raises(AssertionError):
            kernels.quantize(x, NONE, KEY, bits, bucket, payload)
        with pytest.raises(AssertionError):
            kernels.dequantize(payload[None], x, bits, bucket, 1.0, False)


@pytest.mark.parametrize("backend", quantize.BACKENDS)
def test_operators_are_as_torch_wants_them(backend):
    x = keyed_random.normal(1, (5, 30))
    payload = quantize.quantize(x, KEY, 4, 16, backend=backend)
    ops = torch.ops.ds_efficient
    checks = ("test_schema", "test_faketensor")
    errors = torch.ones_like(x), torch.empty_like(x)
    torch.library.opcheck(
        ops.lgreco_quantize_.default,
        (x, errors[0], payload, errors[1], 5, 4, 16, 0.5, backend),
        test_utils=checks,
    )
    given = (x, payload[None], 4, 16, 0.5, True, backend)
    torch.library.opcheck(ops.lgreco_dequantize_.default, given, test_utils=checks)
    with FakeTensorMode():
        fake = quantize.quantize(torch.empty(5, 30), KEY, 4, 16, backend=backend)
        assert fake.shape == payload.shape and fake.dtype == torch.uint8
        assert quantize.dequantize_(torch.empty(5, 30), fake, 4, 16, backend=backend).shape == (5, 30)


def test_bits_of_the_stream_do_not_change_between_versions():
    x = torch.tensor([0.0, 1.0, 0.25, -0.5, 0.75, 0.1, -1.0, 0.9, 0.3, 0.6])
    payload = quantize.quantize(x, KEY, 3, 8, backend="reference")
    scales = struct.pack("<4f", -1.0, 2 / 7, 0.3, 0.3 / 7)
    assert bytes(payload[:16].tolist()) == scales
    assert payload[16:].tolist() == [59, 117, 226, 56]


def test_empty_tensors_have_empty_payloads():
    for backend in quantize.BACKENDS:
        payload = quantize.quantize(torch.empty(0, 3), KEY, 4, 16, backend=backend)
        assert payload.shape == (0,)
        assert quantize.dequantize_(torch.empty(0, 3), payload, 4, 16, backend=backend).shape == (0, 3)


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_rows_of_any_alignment_are_summed_and_payloads_written_to_any_place(backend):
    x = keyed_random.normal(1, (3, 101))
    size = quantize.payload_bytes(101, 5, 16)
    buffer = torch.zeros(3 * size + 3, dtype=torch.uint8)
    rows = buffer[3:].view(3, size)
    for number in range(3):
        quantize.quantize(x[number], number, 5, 16, out=rows[number], backend=backend)
        assert torch.equal(rows[number], quantize.quantize(x[number], number, 5, 16, backend="reference"))
    assert not buffer[:3].any()
    found = quantize.dequantize_(torch.empty(101), rows, 5, 16, weight=1 / 3, backend=backend)
    expected = torch.empty(101)
    for number in range(3):
        quantize.dequantize_(expected, rows[number], 5, 16, weight=1 / 3, accumulate=number > 0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": torch.zeros(4)}, "need new_error"),
        ({"unscale": 0.5}, "need new_error"),
        ({"new_error": torch.zeros(5)}, "new_error is .* shape \\(5,\\)"),
        (
            {"new_error": torch.zeros(4), "error": torch.zeros(4, dtype=torch.float16)},
            "error is torch.float16",
        ),
        ({"new_error": torch.zeros(4), "unscale": math.inf}, "unscale=inf"),
        ({"out": torch.zeros(3, dtype=torch.uint8)}, "out is .* shape \\(3,\\)"),
    ],
)
def test_feedback_that_does_not_fit_is_named(change, message):
    with pytest.raises(UserError, match=message):
        quantize.quantize(torch.zeros(4), KEY, 4, 16, **change)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=4),
    st.integers(2, 8),
    st.sampled_from((8, 264, 512)),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    st.booleans(),
)
def test_several_tensors_as_one_have_the_bits_of_their_copy(counts, bits, bucket, dtype, strided):
    drawn = [keyed_random.normal(seed, (count, 2)).to(dtype) for seed, count in enumerate(counts)]
    parts = [part[:, 0] if strided else part.view(-1) for part in drawn]
    joined = torch.cat([torch.cat((part, part[-1:].expand(-len(part) % bucket))) for part in parts])
    payload = quantize.quantize_parts(parts, KEY, bits, bucket, backend="native")
    assert torch.equal(payload, quantize.quantize(joined, KEY, bits, bucket, backend="reference"))
    assert torch.equal(payload, quantize.quantize_parts(parts, KEY, bits, bucket, backend="reference"))
    rows = torch.stack((payload, payload))
    mean = quantize.dequantize_(torch.empty(len(joined)), rows, bits, bucket, weight=0.5)
    lengths = [-(-len(part) // bucket) * bucket for part in parts]
    want = [row[: len(part)].to(dtype) for row, part in zip(mean.split(lengths), parts, strict=True)]
    for backend in ("native", "reference"):
        quantize.dequantize_parts_(parts, rows, bits, bucket, weight=0.5, backend=backend)
        assert all(torch.equal(part, one) for part, one in zip(parts, want, strict=True))
        for part in parts:
            part.zero_()


def test_parts_that_do_not_go_together_are_named():
    with pytest.raises(UserError, match=r"parts is empty"):
        quantize.quantize_parts([], KEY, 4, 512)
    with pytest.raises(UserError, match=r"parts\[1\] is torch.float16"):
        quantize.quantize_parts([torch.zeros(8), torch.zeros(8, dtype=torch.float16)], KEY, 4, 512)
    with pytest.raises(UserError, match=r"expected torch.uint8 of shape \(ranks, 264\)"):
        quantize.dequantize_parts_([torch.zeros(8)], torch.zeros(2, 263, dtype=torch.uint8), 4, 512)
