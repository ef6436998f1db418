"""Quantisation of gradients on a GPU: the bits of plain torch at every size, dtype and alignment."""

from __future__ import annotations

import math

import pytest
import torch

from ds_efficient.core.keys import Key
from ds_efficient.lgreco import QSGD, TopK
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_quantize as quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KEY = Key(7).fold("lgreco")


@pytest.mark.parametrize("dtype", quantize.DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("count", "bucket"), ((1, 8), (77, 16), (5003, 256), (70_001, 512), (1 << 20, 1024), (999, 520))
)
def test_payload_and_sums_have_the_bits_of_the_cpu(count, bucket, bits, dtype):
    for offset in (0, 1):
        x = keyed_random.normal(KEY, (count + offset,)).to(dtype)[offset:]
        if count > 1000:
            x[300], x[301] = math.nan, math.inf
            x[600:650] = 0
        payload = quantize.quantize(x.cuda(), KEY, bits, bucket, backend="native")
        assert torch.equal(payload.cpu(), quantize.quantize(x, KEY, bits, bucket))
        for out_dtype in quantize.DTYPES:
            for accumulate in (False, True):
                start = keyed_random.normal(KEY.fold(1), (count + offset,)).to(out_dtype)
                on_gpu, on_cpu = start.cuda()[offset:], start.clone()[offset:]
                for out, given in ((on_gpu, payload), (on_cpu, payload.cpu())):
                    quantize.dequantize_(out, given, bits, bucket, weight=1 / 3, accumulate=accumulate)
                back = on_gpu.cpu()
                assert torch.equal(torch.isnan(back), torch.isnan(on_cpu))
                assert torch.equal(back.nan_to_num(nan=0.0), on_cpu.nan_to_num(nan=0.0))


def test_payloads_of_both_compressors_are_the_same_on_both_devices():
    x = keyed_random.normal(KEY, (300, 1001))
    x[5, :40] = x[5, 0]  # equal magnitudes
    for compressor in (QSGD(4), TopK(0.01), TopK(0.3)):
        payload = compressor.compress(x.cuda(), KEY)
        assert torch.equal(payload.cpu(), compressor.compress(x, KEY))
        back = compressor.decompress(payload, x.shape)
        assert torch.equal(back.cpu(), compressor.decompress(payload.cpu(), x.shape))
