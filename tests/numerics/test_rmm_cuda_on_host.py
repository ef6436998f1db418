"""The CUDA kernels of the random sketches, compiled for the host (tests/cuda_on_host), against plain torch.

What the kernels compute is checked where there is no GPU: edges, alignment, barriers, shared memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cuda_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.ops import keyed_random
from ds_efficient.ops import rmm_reference as reference
from ds_efficient.ops.rmm_native import Library, Units
from ds_efficient.ops.rmm_partition import Segment

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KEY = 0x9E3779B97F4A7C15


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Library:
    return cuda_host.on_host(Library, tmp_path_factory.mktemp("cuda_on_host"))


@dataclass(frozen=True)
class Case:
    """A segment and the layout of its X: features, elements between rows, elements to the first one."""

    sketch: str
    dtype: torch.dtype
    segment: Segment
    features: int
    gap: int
    offset: int

    def x(self) -> torch.Tensor:
        """Rows of the segment; what lies between and behind them is NaN."""
        rows, stride = self.segment.blocks * self.segment.block, self.features + self.gap
        buffer = torch.full((self.offset + (rows + 40) * stride,), math.nan, dtype=self.dtype)
        x = torch.as_strided(buffer, (rows, self.features), (stride, 1), self.offset)
        x.copy_(keyed_random.normal(KEY ^ 1, x.shape, backend="reference"))
        return x

    def chosen(self) -> torch.Tensor | None:
        return reference.chosen(KEY, self.sketch, self.segment, torch.device("cpu"))

    def units(self, first: int, rows: int) -> torch.Tensor:
        device = torch.device("cpu")
        return reference.units(KEY, self.sketch, self.segment, self.chosen(), first, rows, self.dtype, device)

    def check(self, made: cuda_host.Guarded, x: torch.Tensor) -> None:
        """Equal to the product in double precision up to float32 sums and one rounding."""
        segment, scale = self.segment, self.segment.scale(self.sketch)
        s = (
            self.units(0, x.shape[0])
            .to(torch.float64)
            .view(segment.blocks, segment.block, -1)
            .transpose(1, 2)
        )
        blocks = x.to(torch.float64).view(segment.blocks, segment.block, -1)
        expected = (scale * (s @ blocks)).flatten(0, 1)
        most = (scale * (s.abs() @ blocks.abs())).flatten(0, 1)
        bound = (segment.block + 4) * 2.0**-24 * most + torch.finfo(self.dtype).eps / 2 * expected.abs()
        bound += torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        assert made.intact()
        assert bool(((made.tensor.to(torch.float64) - expected).abs() <= bound).all())

    def target(self) -> cuda_host.Guarded:
        """Aligned to 16 bytes, as torch allocates."""
        shape = (self.segment.blocks * self.segment.projected, self.features)
        made = cuda_host.Guarded(shape, self.dtype, 0)
        assert made.tensor.data_ptr() % 16 == 0
        return made


def segment_of(block: int, projected: int, blocks: int, before: int) -> Segment:
    """A segment behind ``before`` blocks of 37 rows and 24 columns."""
    return Segment(37 * before, blocks, block, projected, before, 24 * before, 37 * before, 24)


@st.composite
def cases(draw, *sketches: str) -> Case:
    block = draw(st.one_of(st.integers(1, 70), st.sampled_from((128, 160))))
    projected = draw(st.one_of(st.integers(1, block), st.sampled_from((8, 32, 40, 72))))
    segment = segment_of(block, min(block, projected), draw(st.integers(1, 3)), draw(st.integers(0, 2)))
    features = draw(st.one_of(st.integers(1, 40), st.sampled_from((128, 264))))
    gap, offset = draw(st.sampled_from(((0, 0), (0, 0), (8, 8), (1, 0), (0, 1), (3, 2))))
    dtype, sketch = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(sketches))
    return Case(sketch, dtype, segment, features, gap, offset)


@settings(deadline=None, max_examples=40)
@given(cases("rows"))
def test_chosen_rows_are_those_of_the_reference(kernels, case):
    x, made = case.x(), case.target()
    kernels.rows(x, case.segment, case.chosen(), made.tensor)
    case.check(made, x)


@settings(deadline=None, max_examples=25)
@given(cases("srht"))
def test_fast_transforms_are_those_of_the_reference(kernels, case):
    x, made = case.x(), case.target()
    kernels.hadamard(x, KEY, case.segment, case.chosen(), made.tensor)
    case.check(made, x)


@pytest.mark.parametrize("block", (1, 2, 8, 31, 512, 2000, 4096, 16384))
def test_fast_transforms_of_every_length(kernels, block):
    case = Case("srht", torch.float32, segment_of(block, min(block, 8), 1, 1), 9, 1, 0)
    x, made = case.x(), case.target()
    kernels.hadamard(x, KEY, case.segment, case.chosen(), made.tensor)
    case.check(made, x)


def test_longer_transforms_are_refused(kernels):
    case = Case("srht", torch.float32, segment_of(16385, 8, 1, 0), 1, 0, 0)
    with pytest.raises(AssertionError, match="no code"):
        kernels.hadamard(case.x(), KEY, case.segment, case.chosen(), case.target().tensor)


@settings(deadline=None, max_examples=60)
@given(cases("gaussian", "rademacher", "srht", "count"), st.floats(0, 1), st.floats(0, 1))
def test_generated_sketches_have_the_bits_of_the_reference(kernels, case, start, share):
    total = case.segment.blocks * case.segment.block
    first = int(start * (total - 1))
    rows = 1 + int(share * (total - first - 1))
    made = cuda_host.Guarded((rows, case.segment.projected), case.dtype, 0)
    wanted = Units.of(case.sketch, case.segment, first, rows, case.dtype)
    kernels.matrix(KEY, wanted, case.chosen(), made.tensor)
    assert made.equals(case.units(first, rows))
