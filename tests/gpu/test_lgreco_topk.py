"""The largest entries on a GPU: the payload of the CPU at every size, dtype and content; sums; feedback.

``-k small`` selects a subset that is quick under compute-sanitizer and covers every kernel.
"""

from __future__ import annotations

import math

import pytest
import torch

from ds_efficient.core.keys import Key
from ds_efficient.lgreco import QSGD, ErrorFeedback, TopK
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_topk as topk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KEY = Key(7).fold("lgreco")
CONTENTS = ("normal", "zeros", "ties", "bad", "equal", "sorted", "rows")
every_dtype = pytest.mark.parametrize("dtype", topk.DTYPES, ids=str)


def draw(count: int, content: str, dtype: torch.dtype, offset: int) -> torch.Tensor:
    """Numbers on the GPU at an address that is ``offset`` elements off."""
    x = keyed_random.normal(KEY, (count,), device=torch.device("cuda"))
    place = torch.arange(count, device="cuda")
    if content == "zeros":
        x = torch.where(place % 50 == 3, x, 0.0)
    elif content == "ties":
        x = torch.round(4 * x)
    elif content == "bad":
        x[count // 3 :: 97] = torch.nan
        x[count // 2 :: 89] = -torch.inf
    elif content == "equal":
        x = torch.full_like(x, -2.5)
    elif content == "sorted":
        x = x.sort().values
    elif content == "rows":
        x = torch.where(place % 4096 < 8, 100.0 * x, x)
    return torch.cat((x.new_zeros(offset), x)).to(dtype)[offset:]


def check(x: torch.Tensor, k: int) -> None:
    """Payload, sums and fed-back errors have the bits of the CPU."""
    payload = topk.select(x, k, backend="native")
    assert torch.equal(payload.cpu(), topk.select(x.cpu(), k))
    for out_dtype in topk.DTYPES:
        for accumulate in (False, True):
            start = keyed_random.normal(KEY.fold("out"), (x.numel(),)).to(out_dtype)
            out, expected = start.cuda(), start.clone()
            for target, given in ((out, payload), (expected, payload.cpu())):
                topk.scatter_(target, given, k, x.dtype, weight=1 / 3, accumulate=accumulate)
            assert_same(out, expected)
    error = keyed_random.normal(KEY.fold("error"), (x.numel(),)) / 4
    for before in (None, error):
        expected, made = torch.empty(x.numel()), torch.empty(x.numel(), device="cuda")
        if before is not None:
            made.copy_(before)
        on_cpu = topk.select(x.cpu(), k, error=before, unscale=1 / 3, new_error=expected)
        given = None if before is None else made
        payload = topk.select(x, k, error=given, unscale=1 / 3, new_error=made)
        index = slice(0, 4 * k)
        assert torch.equal(payload[index].cpu(), on_cpu[index])
        values = (payload[4 * k :].clone().view(torch.float32), on_cpu[4 * k :].clone().view(torch.float32))
        assert_same(*values)
        assert_same(made, expected)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN in the same places, the same numbers elsewhere."""
    found = found.cpu()
    assert torch.equal(torch.isnan(found), torch.isnan(expected))
    options = {"nan": 0.0, "posinf": 1.0, "neginf": -1.0}
    assert torch.equal(found.nan_to_num(**options), expected.nan_to_num(**options))


@every_dtype
@pytest.mark.parametrize("count", (1, 40, 4097, 9000))
def test_small_tensors_have_the_payload_of_the_cpu(count, dtype):
    for share in (0.01, 0.5, 1.0):
        check(draw(count, "ties", dtype, count % 2), math.ceil(share * count))


@pytest.mark.parametrize("content", ("normal", "ties"))
def test_small_searches_are_narrowed_by_a_sample(content):
    check(draw(1 << 16, content, torch.float32, 0), 700)


@every_dtype
@pytest.mark.parametrize("content", CONTENTS)
def test_large_tensors_have_the_payload_of_the_cpu(content, dtype):
    for count, share in ((1 << 20, 0.01), ((1 << 21) + 77, 0.0001), (300_001, 0.3), (200_000, 0.1)):
        check(draw(count, content, dtype, count % 2), math.ceil(share * count))


def test_very_many_elements():
    x = keyed_random.normal(KEY, (1 << 27,), device=torch.device("cuda"))
    for k in (100, (1 << 27) // 100):
        index = topk.select(x, k)[: 4 * k].view(torch.int32).long()
        magnitude = x.abs()
        threshold = magnitude[index].min()
        assert int((magnitude > threshold).sum()) <= k - int((magnitude[index] == threshold).sum())
        assert bool((index.diff() > 0).all()) and index.numel() == k


def test_the_same_bits_every_time_and_in_a_captured_graph():
    x = draw(1 << 20, "normal", torch.float32, 0)
    expected = topk.select(x, 10_000)
    for _ in range(10):
        assert torch.equal(topk.select(x, 10_000), expected)
    payload, graph = torch.empty_like(expected), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        topk.select(x, 10_000, out=payload)
    for _ in range(2):
        payload.zero_()
        graph.replay()
        assert torch.equal(payload, expected)


def test_nothing_waits_for_the_device():
    x, error = draw(1 << 18, "normal", torch.float32, 0), torch.zeros(1 << 18, device="cuda")
    out = torch.zeros_like(x)
    topk.select(x, 1000)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in (1000, 200_000):
            payload = topk.select(x, k, error=error, unscale=0.5, new_error=error)
            topk.scatter_(out, payload, k, torch.float32, weight=0.5, accumulate=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_payloads_of_both_compressors_and_their_feedback_are_the_same_on_both_devices():
    for compressor in (QSGD(4), TopK(0.01), TopK(0.3)):
        here, there = ErrorFeedback(), ErrorFeedback()
        for step in range(3):
            x = keyed_random.normal(KEY.fold(step), (300, 1001))
            x[5, :40] = x[5, 0]  # equal magnitudes
            payload = there.compress("x", x.cuda(), compressor, KEY.fold(step), unscale=0.5)
            assert torch.equal(payload.cpu(), here.compress("x", x, compressor, KEY.fold(step), unscale=0.5))
            rows = torch.stack((payload, payload))
            back = compressor.decompress(rows, x.shape, weight=0.5)
            assert torch.equal(back.cpu(), compressor.decompress(rows.cpu(), x.shape, weight=0.5))
            here.commit()
            there.commit()
            assert torch.equal(there.error("x").cpu(), here.error("x"))
