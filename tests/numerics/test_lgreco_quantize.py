"""Quantisation of gradients: C++, and CUDA kernels compiled for the host, have the bits of plain torch."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import cuda_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_quantize as quantize
from ds_efficient.ops import lgreco_quantize_reference as reference
from ds_efficient.ops.lgreco_quantize_native import Library

KEY = 0x9E3779B97F4A7C15


class HostLibrary(Library):
    """The functions of the CUDA library with host tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._cuda = False
        self._functions = {}
        for name, arguments in self.SIGNATURES.items():
            function = getattr(library, f"{self.PREFIX}{name}")
            function.argtypes = (*arguments, ctypes.c_int, ctypes.c_void_p)
            self._functions[name] = self._without_threads(function)

    @staticmethod
    def _without_threads(function: Callable[..., int]) -> Callable[..., int]:
        return lambda *arguments: function(*arguments[:-1], 0, None)  # device and stream


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> HostLibrary:
    folder = tmp_path_factory.mktemp("cuda_on_host")
    return HostLibrary(cuda_host.build(find_op("lgreco_quantize", "cuda"), folder))


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

    def check(self, library: Library) -> None:
        """Payload and sums have the bits of the reference, and nothing is written around them."""
        x = self.source()
        expected = reference.quantize(x, self.key, self.bits, self.bucket)
        size = quantize.payload_bytes(self.count, self.bits, self.bucket)
        assert expected.shape == (size,)
        payload = cuda_host.Guarded((1, size), torch.uint8, 0)
        assert payload.tensor.data_ptr() % 8 == 0
        library.quantize(x, self.key, self.bits, self.bucket, payload.tensor)
        assert payload.equals(expected[None])
        for accumulate in (False, True):
            made = cuda_host.Guarded((1, self.count), self.out_dtype, self.offset)
            start = keyed_random.normal(6, (1, self.count)).to(self.out_dtype)
            total = reference.dequantize(
                expected, start[0].clone(), self.bits, self.bucket, self.weight, accumulate
            )
            made.tensor.copy_(start)
            given = payload.tensor[0]
            library.dequantize(given, made.tensor, self.bits, self.bucket, self.weight, accumulate)
            bad = torch.isnan(total)
            assert torch.equal(bad, torch.isnan(made.tensor[0]))  # NaN has many patterns
            made.tensor[0, bad], total[bad] = 0, 0
            assert made.equals(total[None])


@st.composite
def cases(draw) -> Case:
    sizes = st.one_of(st.sampled_from((1, 32, 33, 64, 65, 128)), st.integers(1, 128))
    bucket = 8 * draw(sizes)
    counts = st.one_of(st.integers(1, 40), st.integers(1, 3 * bucket), st.just(9 * bucket + 3))
    return Case(
        draw(counts), draw(st.integers(2, 8)), bucket, draw(st.sampled_from(quantize.DTYPES)),
        draw(st.sampled_from(quantize.DTYPES)), draw(st.sampled_from((0, 0, 1, 3, 8))),
        draw(st.sampled_from(("normal", "normal", "zeros", "bad", "overflow", "tiny"))),
        draw(st.sampled_from((1.0, 0.5, 1 / 3))), draw(st.integers(0, 2**64 - 1)),
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(cases())
def test_cuda_kernels_have_the_bits_of_plain_torch(kernels, case):
    case.check(kernels)


@settings(deadline=None, max_examples=80)
@given(cases())
def test_cpp_has_the_bits_of_plain_torch(compiled, case):
    case.check(compiled)


@pytest.mark.parametrize("dtype", quantize.DTYPES, ids=str)
@pytest.mark.parametrize("bits", (3, 4, 8))
def test_more_elements_than_a_thread_takes(compiled, bits, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        Case(200_003, bits, 512, dtype, torch.float32, 0, "normal", 0.25).check(compiled)
    finally:
        torch.set_num_threads(threads)


def test_arguments_without_code_are_refused_by_the_kernels(kernels):
    x, payload = torch.zeros(8), torch.zeros(64, dtype=torch.uint8)
    for bits, bucket in ((1, 8), (9, 8), (4, 4), (4, 12), (4, 1032)):
        with pytest.raises(AssertionError):
            kernels.quantize(x, KEY, bits, bucket, payload)
        with pytest.raises(AssertionError):
            kernels.dequantize(payload, x, bits, bucket, 1.0, False)


@pytest.mark.parametrize("backend", quantize.BACKENDS)
def test_operators_are_as_torch_wants_them(backend):
    x = keyed_random.normal(1, (5, 30))
    payload = quantize.quantize(x, KEY, 4, 16, backend=backend)
    ops = torch.ops.ds_efficient
    checks = ("test_schema", "test_faketensor")
    given = (x, payload, 4, 16, 0.5, True, backend)
    torch.library.opcheck(ops.lgreco_quantize.default, (x, 5, 4, 16, backend), test_utils=checks)
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
    assert payload[16:].tolist() == [59, 115, 226, 56]


def test_empty_tensors_have_empty_payloads():
    for backend in quantize.BACKENDS:
        payload = quantize.quantize(torch.empty(0, 3), KEY, 4, 16, backend=backend)
        assert payload.shape == (0,)
        assert quantize.dequantize_(torch.empty(0, 3), payload, 4, 16, backend=backend).shape == (0, 3)
