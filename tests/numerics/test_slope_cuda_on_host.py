"""The CUDA kernels of N:M sparse matrices, compiled for the host (tests/cuda_on_host), against plain torch.

What the kernels compute is checked where there is no GPU: indices, tiles, edges, alignment, barriers.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from cuda_host import Guarded, build
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.ops import slope, slope_native
from ds_efficient.ops import slope_reference as reference

PATTERNS = ((2, 4), (1, 2), (1, 4), (2, 8), (4, 8), (2, 16), (3, 32), (1, 32))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    return build(find_op("slope", "cuda"), tmp_path_factory.mktemp("cuda_on_host"))


@st.composite
def cases(draw):
    """Pattern, in, values at an odd address, mask, offset in elements."""
    n, m = draw(st.sampled_from(PATTERNS))
    rows = draw(st.one_of(st.integers(1, 70), st.integers(1, max(1, 300 // m)).map(lambda r: r * m)))
    columns = m * draw(st.integers(1, max(1, draw(st.sampled_from((100, 600))) // m)))
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float32, torch.float64)))
    offset = draw(st.sampled_from((0, 0, 8, 1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    order = rng.random((rows, columns // m, m)).argsort(axis=-1)
    mask = slope.pack_mask(torch.from_numpy((order < n).reshape(rows, columns)))
    plain = rng.standard_normal((rows, columns // m * n))
    values = Guarded(plain.shape, dtype, offset).tensor
    values.copy_(torch.from_numpy(plain.round() if draw(st.booleans()) else plain))  # rounded: ties
    return n, m, columns, values, mask, offset, draw(st.floats(0, 1)), draw(st.floats(0, 1))


@settings(deadline=None, max_examples=120)
@given(cases())
def test_kernels_compute_what_the_reference_computes(kernels, case):
    n, m, columns, values, mask, offset, start, share = case
    rows, dtype, size = values.shape[0], values.dtype, values.element_size()

    def run(name: str, out: Guarded, *arguments: torch.Tensor | int | None) -> Guarded:
        function = getattr(kernels, f"ds_efficient_slope_{name}")
        where = 0, None  # device, stream
        given = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in (*arguments, *where))
        function.argtypes = (*slope_native.Library.SIGNATURES[name], ctypes.c_int, ctypes.c_void_p)
        assert function(*given) == 0
        return out

    def check(name: str, expected: torch.Tensor, before: tuple, *after: int) -> torch.Tensor:
        out = Guarded(tuple(expected.shape), expected.dtype, 0 if expected.dtype == torch.uint8 else offset)
        assert run(name, out, *before, out.tensor, *after).equals(expected), name
        return out.tensor

    shape, tail = (rows, columns), (n, m, size)
    dense = reference.decompress(values, mask, columns, None)
    check("decompress", dense, (values, mask, None), *shape, *tail)
    other = Guarded(shape, dtype, offset).tensor.copy_(dense + 1)
    check("compress", reference.compress(other, mask, n, m), (other, mask), *shape, *tail)
    if rows % m:
        return
    selected = reference.select_columns(values, mask, columns, n, m)
    chosen = check("select", selected, (values, mask), *shape, *tail)
    twice = reference.decompress(values, mask, columns, chosen)
    check("decompress", twice, (values, mask, chosen), *shape, *tail)
    if not slope.fits_operand(n, m) or size == 8:
        return
    for name, kept, length, width in (("forward", None, rows, columns), ("backward", chosen, columns, rows)):
        if width % 4:
            continue
        first = int(start * (length - 1))
        count = 1 + int(share * (length - first - 1))
        expected = reference.operand(values, mask, columns, kept, first, count)
        before = (values, mask) if kept is None else (values, mask, kept)
        sizes = (columns,) if kept is None else shape
        check(f"{name}_operand", expected, before, *sizes, first, count, *tail)
        used, transposed = (mask, False) if kept is None else (kept, True)
        ones = reference.operand_pattern(used, columns, dtype, transposed)
        check("pattern", ones, (used,), *shape, int(transposed), slope_native._ONE[dtype], size)
