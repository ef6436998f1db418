"""MKOR's higher-rank statistics on a GPU: the signs and sums of the CPU, in all types."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_efficient.core.keys import Key
from ds_efficient.mkor.signs import RowSketch, random_signs

pytestmark = pytest.mark.gpu

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NAMED = (3, 1)


def sketch() -> RowSketch:
    return RowSketch(Key(5, ("fc",)), 40, lambda: 3)


@needs_gpu
def test_signs_are_those_of_the_cpu() -> None:
    found = [
        random_signs(9, 1000, 40, first=7, dtype=torch.float32, device=torch.device(place))
        for place in ("cpu", "cuda")
    ]
    assert torch.equal(found[0], found[1].cpu())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sums_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    x = torch.randn(3, 700, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = sketch().of_rows("left", NAMED, x.double())
    with torch.autocast("cuda", torch.bfloat16):
        found = sketch().of_rows("left", NAMED, x.cuda())
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.allclose(found.cpu().double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@needs_gpu
def test_sums_of_patches_are_those_of_the_cpu() -> None:
    conv = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=1, dilation=2)
    x = torch.randn(5, 3, 12, 11, generator=torch.Generator().manual_seed(0))
    exact, rows = sketch().of_patches(NAMED, conv, x.double())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found, same = sketch().of_patches(NAMED, conv, x.cuda())
    assert same == rows and torch.allclose(found.cpu().double(), exact, atol=1e-4)
