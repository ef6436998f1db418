"""Quantisation of gradients on a GPU: the bits of plain torch at every size, dtype and alignment.

``-k small`` selects a subset that is quick under compute-sanitizer and covers every kernel.
"""

from __future__ import annotations

import math

import pytest
import torch

from ds_efficient.core.keys import Key
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_quantize as quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KEY = Key(7).fold("lgreco")
every_dtype = pytest.mark.parametrize("dtype", quantize.DTYPES, ids=str)


def draw(count: int, dtype: torch.dtype, offset: int, *parts: int) -> torch.Tensor:
    """Numbers at an address that is ``offset`` elements off, some of them not finite or all zero."""
    x = keyed_random.normal(KEY.fold(*parts), (count + offset,)).to(dtype)[offset:]
    if count > 1000:
        x[300], x[301] = math.nan, math.inf
        x[600:650] = 0
    return x


def on_gpu(x: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy with the same alignment."""
    return torch.cat((x.new_zeros(offset), x)).cuda()[offset:]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN in the same places, the same numbers elsewhere."""
    found = found.cpu()
    assert torch.equal(torch.isnan(found), torch.isnan(expected))
    assert torch.equal(found.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def check(count: int, bucket: int, bits: int, dtype: torch.dtype, offset: int) -> None:
    """Payload, sums over ranks and fed-back errors have the bits of the CPU."""
    payloads = []
    for rank in range(3):
        x = draw(count, dtype, offset, rank)
        payload = quantize.quantize(on_gpu(x, offset), KEY, bits, bucket, backend="native")
        assert torch.equal(payload.cpu(), quantize.quantize(x, KEY, bits, bucket))
        payloads.append(payload)
    rows = torch.stack(payloads)
    for out_dtype in quantize.DTYPES:
        for accumulate, given in ((False, rows), (True, rows), (True, rows[0])):
            start = keyed_random.normal(KEY.fold("out"), (count,)).to(out_dtype)
            out, expected = on_gpu(start, offset), start.clone()
            for target, payload in ((out, given), (expected, given.cpu())):
                quantize.dequantize_(target, payload, bits, bucket, weight=1 / 3, accumulate=accumulate)
            assert_same(out, expected)
    x, error = draw(count, dtype, offset), draw(count, torch.float32, offset, 9) / 8
    for before in (None, error):
        expected, made = torch.empty(count), on_gpu(torch.zeros(count), offset)
        given = None if before is None else on_gpu(before, offset)
        on_cpu = quantize.quantize(x, KEY, bits, bucket, error=before, unscale=1 / 3, new_error=expected)
        payload = quantize.quantize(
            on_gpu(x, offset), KEY, bits, bucket, error=given, unscale=1 / 3, new_error=made
        )
        assert torch.equal(payload.cpu(), on_cpu)
        assert_same(made, expected)
        if given is not None:
            quantize.quantize(
                on_gpu(x, offset), KEY, bits, bucket, error=given, unscale=1 / 3, new_error=given
            )
            assert_same(given, expected)


@every_dtype
@pytest.mark.parametrize("bits", (3, 4))
@pytest.mark.parametrize(("count", "bucket"), ((1, 8), (2077, 512), (1999, 1024)))
def test_small_tensors_have_the_bits_of_the_cpu(count, bucket, bits, dtype):
    check(count, bucket, bits, dtype, count % 2)


@every_dtype
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("count", "bucket"), ((77, 16), (5003, 256), (70_001, 512), (1 << 20, 1024), (999, 520), (4096, 128))
)
def test_tensors_of_every_size_have_the_bits_of_the_cpu(count, bucket, bits, dtype):
    for offset in (0, 1):
        check(count, bucket, bits, dtype, offset)


def test_nothing_waits_for_the_device():
    x, error = torch.ones(70_000, device="cuda"), torch.zeros(70_000, device="cuda")
    payload = quantize.quantize(x, KEY, 4, 512)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantize.quantize(x, KEY, 4, 512, error=error, unscale=0.5, new_error=error, out=payload)
        quantize.dequantize_(x, torch.stack((payload, payload)), 4, 512, weight=0.5, accumulate=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
