"""Random sketches in plain torch: the readable definition; S has the same bits as in C++ and CUDA.

S (B, total) is block-diagonal with blocks (b, p). The *unit elements* of a block, times `Segment.scale`, are
the elements of S; with them E[S S^T] = I, so that (S^T Y)^T (S^T X) is an unbiased estimate of Y^T X.

- gaussian: standard normal numbers (RMM, arXiv 2201.13195, eq. 5; the variance is 1 / p).
- rademacher: random signs.
- srht: random signs d_l, then p of the n columns of the Hadamard matrix (-1)^popcount(l & r), n the power of
  two that holds b; the columns are orthogonal over 0 .. n - 1 and l = 0 .. b - 1 are n's first rows.
- count: each row has one random sign in one random column.
- rows: p of the b rows, chosen without replacement.

The layout of the random words is defined in ``csrc/rmm/rmm_common.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_efficient.ops import keyed_random_reference as keyed
from ds_efficient.ops.rmm_partition import Partition, Segment

VERSION = 1
CHUNK = 2048  # rows of a block whose part of S exists at a time


def chosen(key: int, sketch: str, segment: Segment, device: torch.device) -> Tensor | None:
    """Numbers chosen in each block, (blocks, p) int64 ascending; None for sketches that choose none."""
    n = segment.choices(sketch)
    if not n:
        return None
    return keyed.choice(key, segment.number, segment.blocks, n, segment.projected, device)


def units(
    key: int,
    sketch: str,
    segment: Segment,
    chosen: Tensor | None,
    first: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Unit elements of S in rows ``first .. first + rows - 1`` of a segment, each row in its own block.

    Args:
        chosen: result of `chosen`.
        dtype: float32, bfloat16 or float16; float64 holds float32 numbers.

    Returns:
        (rows, p) of ``dtype``.
    """
    p, before = segment.projected, segment.before(sketch)
    if sketch == "gaussian":
        made = torch.float32 if dtype == torch.float64 else dtype
        return keyed.normal(key, before + first * p, rows * p, made, device).view(rows, p).to(dtype)
    if sketch == "rademacher":
        width = -(-p // 32)
        words = keyed.words(key, before + first * width, rows * width, device).view(rows, width, 1)
        negative = (words >> torch.arange(32, device=device)) & 1
        return (1 - 2 * negative).view(rows, 32 * width)[:, :p].to(dtype)
    row = torch.arange(first, first + rows, device=device)
    if sketch == "count":
        word = keyed.words(key, segment.base_row + first, rows, device)
        column, value = ((word >> 1) * p) >> 31, 1 - 2 * (word & 1)
        return torch.zeros(rows, p, dtype=dtype, device=device).scatter_(
            1, column[:, None], value[:, None].to(dtype)
        )
    assert chosen is not None
    local, numbers = (row % segment.block)[:, None], chosen[row // segment.block]
    if sketch == "rows":
        return (local == numbers).to(dtype)
    value = local & numbers
    for shift in (16, 8, 4, 2, 1):
        value = value ^ (value >> shift)
    value = (value ^ row_bits(key, segment.base_row + first, rows, device)[:, None]) & 1
    return (1 - 2 * value).to(dtype)


def row_bits(key: int, first: int, rows: int, device: torch.device) -> Tensor:
    """Bit i % 32 of word i / 32 for rows i = ``first`` .., (rows,) int64."""
    start = first // 32
    words = keyed.words(key, start, (first + rows + 31) // 32 - start, device)[:, None]
    return ((words >> torch.arange(32, device=device)) & 1).flatten()[first - 32 * start :][:rows]


def project(x: Tensor, key: int, sketch: str, parts: Partition) -> Tensor:
    """S^T x, (total, features) in the dtype of ``x``; sums in float32 (float64 for float64)."""
    out = x.new_empty(parts.total, x.shape[1])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for segment in parts.segments():
        numbers, p = chosen(key, sketch, segment, x.device), segment.projected
        for block in range(segment.blocks):
            total = torch.zeros(p, x.shape[1], dtype=wide, device=x.device)
            for start in range(0, segment.block, CHUNK):
                first, count = block * segment.block + start, min(CHUNK, segment.block - start)
                s = units(key, sketch, segment, numbers, first, count, x.dtype, x.device)
                total += s.to(wide).T @ x[segment.base_row + first :][:count].to(wide)
            out[segment.first_out + block * p :][:p] = (total * segment.scale(sketch)).to(x.dtype)
    return out


def matrix(key: int, sketch: str, parts: Partition, dtype: torch.dtype, device: torch.device) -> Tensor:
    """S itself, (rows, total) of ``dtype``."""
    made = [
        units(key, sketch, s, chosen(key, sketch, s, device), 0, s.blocks * s.block, dtype, device)
        for s in parts.segments()
    ]
    return assemble(made, sketch, parts, dtype, device)


def assemble(
    made: list[Tensor], sketch: str, parts: Partition, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """S from the unit elements of all rows of each segment."""
    out = torch.zeros(parts.rows, parts.total, dtype=dtype, device=device)
    for segment, unit in zip(parts.segments(), made, strict=True):
        scaled = (unit.to(torch.float64) * segment.scale(sketch)).to(dtype)
        for block in range(segment.blocks):
            first, column = (
                segment.base_row + block * segment.block,
                segment.first_out + block * segment.projected,
            )
            out[first : first + segment.block, column : column + segment.projected] = scaled[
                block * segment.block : (block + 1) * segment.block
            ]
    return out
