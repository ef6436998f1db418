"""How the rows of a matrix are cut into blocks and how many rows each block is projected to."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

from ds_efficient.errors import UserError

SKETCHES = ("gaussian", "rademacher", "srht", "count", "rows")
ROUNDING = 8  # projected rows are a multiple of this where the block has as many: 16 bytes of 2-byte elements


@dataclass(frozen=True)
class Segment:
    """A run of equal blocks: all full ones, or the ragged last one. See ``csrc/rmm/rmm_common.h``.

    Attributes:
        base_row: first row.
        blocks: number of blocks.
        block: rows of each.
        projected: rows of the projection of each, p.
        number: number of the first block.
        first_out: row of the whole projection where this segment's begins.
        rows_before: rows of the segments before.
        projected_before: rows of the projection of each of their blocks.
    """

    base_row: int
    blocks: int
    block: int
    projected: int
    number: int
    first_out: int
    rows_before: int
    projected_before: int

    def before(self, sketch: str) -> int:
        """Normals or words of signs that the segments before take in the stream."""
        if sketch == "gaussian":
            return self.rows_before * self.projected_before
        return self.rows_before * -(-self.projected_before // 32) if sketch == "rademacher" else 0

    def scale(self, sketch: str) -> float:
        """Factor of the unit elements that makes E[S S^T] = I."""
        if sketch == "count":
            return 1.0
        return math.sqrt(self.block / self.projected) if sketch == "rows" else 1.0 / math.sqrt(self.projected)

    def choices(self, sketch: str) -> int:
        """Of how many the p numbers of each block are chosen without replacement; 0 where none are."""
        if sketch == "rows":
            return self.block
        return 1 << (self.block - 1).bit_length() if sketch == "srht" else 0


@dataclass(frozen=True)
class Partition:
    """How the rows of a matrix are cut into blocks and projected; the same on every device and rank.

    Attributes:
        rows: rows of the matrix, B.
        block: rows of a full block.
        projected: rows of the projection of a full block, p.
        last_rows: rows of the ragged last block, 0 where there is none.
        last_projected: rows of its projection.
    """

    rows: int
    block: int
    projected: int
    last_rows: int
    last_projected: int

    @property
    def full_blocks(self) -> int:
        """Number of full blocks."""
        return self.rows // self.block if self.block else 0

    @property
    def total(self) -> int:
        """Rows of the whole projection."""
        return self.full_blocks * self.projected + self.last_projected

    @property
    def exact(self) -> bool:
        """Whether nothing is saved, so that the matrix itself is kept: S = I."""
        return self.projected >= self.block and self.last_projected >= self.last_rows

    def segments(self) -> tuple[Segment, ...]:
        """The runs of equal blocks in the order of their rows; none for an empty matrix."""
        return _segments(self)


@functools.lru_cache(maxsize=1024)
def _segments(parts: Partition) -> tuple[Segment, ...]:
    full, found = parts.full_blocks, []
    if full:
        found.append(Segment(0, full, parts.block, parts.projected, 0, 0, rows_before=0, projected_before=0))
    if parts.last_rows:
        rows = full * parts.block
        found.append(
            Segment(
                rows,
                1,
                parts.last_rows,
                parts.last_projected,
                number=full,
                first_out=full * parts.projected,
                rows_before=rows,
                projected_before=parts.projected,
            )
        )
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def partition(rows: int, ratio: float, *, block_size: int = 512, min_rows: int = 1) -> Partition:
    """Cut ``rows`` into blocks and say how many rows each is projected to.

    A block of b rows is projected to ceil(b * max(ratio, min_rows / rows)) rows, rounded up to a multiple of
    8, at most b. The product is computed exactly with the decimal number that ``ratio`` is printed as, so
    that 0.1 of 80 is 8 and not 9. Where full blocks keep all their rows, all blocks do.

    Args:
        rows: rows of the matrix, >= 0.
        ratio: share of the rows, 0 < ratio <= 1.
        block_size: rows of a full block; 0, or at least ``rows``, for one block of all rows.
        min_rows: fewest rows of the whole projection, >= 0.

    Raises:
        UserError: an argument is out of range.
    """
    for name, value in (("rows", rows), ("block_size", block_size), ("min_rows", min_rows)):
        if value < 0:
            raise UserError(f"{name}={value} is out of range; allowed: 0 and more")
    if not 0 < ratio <= 1:
        raise UserError(f"ratio={ratio} is out of range; allowed: 0 < ratio <= 1")
    if rows == 0:
        return Partition(0, 0, 0, 0, 0)
    share = max(Fraction(str(ratio)), Fraction(min_rows, rows))
    block = min(block_size, rows) or rows
    projected, last_rows = _projected(block, share), rows % block
    last_projected = last_rows if projected == block else _projected(last_rows, share)
    return Partition(rows, block, projected, last_rows, last_projected)


def _projected(rows: int, share: Fraction) -> int:
    return min(rows, -(-math.ceil(share * rows) // ROUNDING) * ROUNDING)
