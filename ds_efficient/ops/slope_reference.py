"""N:M sparse matrices in plain torch: the readable definition, bit-identical to the C++ and CUDA code.

Formats: ``csrc/slope/slope_common.h``. Masks are packed unless said; n of every m consecutive columns of a
row are kept. Source of the column pass and of the formulas: SLoPe, arXiv 2405.16325, section 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FORMAT_VERSION = 1
WORD = 32  # columns of a mask word

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # elements whose order is found at a time: sorting needs 8 bytes for each


def expected_extra_zeros(n: int, m: int) -> float:
    """Share of all elements that the column pass takes from a large matrix with a random n:m mask.

    The kept values of a column group of m are binomial with probability n / m, and those beyond n go.
    Source: SLoPe, Eq. 8. The text's 3.39 % for 2:8 does not follow from the formula, which gives 5.84 %.
    """
    share = n / m
    return sum(math.comb(m, j) * share**j * (1 - share) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1))


def index_bits(n: int, m: int) -> int:
    """Bits that number the n-subsets of a group of m: ceil(log2 binomial(m, n)).

    Source: SLoPe, Eq. 7, with the binomial coefficient that its text uses ("3 bits" for 2:4).
    """
    return (math.comb(m, n) - 1).bit_length()


def mask_bytes(columns: int) -> int:
    """Bytes of a packed mask row: whole 32-bit words."""
    return 4 * -(-columns // WORD)


def pack_mask(mask: Tensor) -> Tensor:
    """(rows, columns) bool to (rows, 4 * ceil(columns / 32)) uint8; bit j of byte b is column 8 b + j."""
    rows, columns = mask.shape
    width = mask_bytes(columns)
    bits = torch.nn.functional.pad(mask.view(torch.uint8), (0, 8 * width - columns)).view(rows, width, 8)
    packed = bits[:, :, 0].clone()
    for j in range(1, 8):
        packed |= bits[:, :, j] << j
    return packed


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """(rows, 4 * ceil(columns / 32)) uint8 to (rows, columns) bool; the inverse of `pack_mask`."""
    bits = torch.stack([(packed >> j) & 1 for j in range(8)], dim=2)
    return bits.flatten(1)[:, :columns].contiguous().view(torch.bool)


def decompress(values: Tensor, forward_mask: Tensor, columns: int, backward_mask: Tensor | None) -> Tensor:
    """The dense (rows, columns) matrix of compact values; with a backward mask only what it keeps too."""
    bits = values.view(_INTEGER[values.element_size()])
    dense = torch.zeros(values.shape[0], columns, dtype=bits.dtype, device=bits.device)
    dense.masked_scatter_(unpack_mask(forward_mask, columns), bits)
    if backward_mask is not None:
        dense.masked_fill_(~unpack_mask(backward_mask, columns), 0)
    return dense.view(values.dtype)


def compress(dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """The elements of a dense matrix at the kept positions, (rows, columns * n / m)."""
    rows, columns = dense.shape
    bits = dense.view(_INTEGER[dense.element_size()])
    kept = bits.masked_select(unpack_mask(forward_mask, columns))
    return kept.view(rows, columns // m * n).view(dense.dtype)


def select_columns(values: Tensor, forward_mask: Tensor, columns: int, n: int, m: int) -> Tensor:
    """Packed mask of the n largest magnitudes in every group of m rows of each column of the sparse matrix.

    Magnitudes are the bits of |x| as integers, so that NaN is the largest; equal ones: the lower row first.
    """
    integer = _INTEGER[values.element_size()]
    packed = torch.empty_like(forward_mask)
    step = max(1, _CHUNK // max(1, columns * m)) * m
    for start in range(0, values.shape[0], step):
        part = slice(start, start + step)
        mask = unpack_mask(forward_mask[part], columns)
        dense = decompress(values[part], forward_mask[part], columns, None).view(integer)
        key = torch.where(mask, dense & torch.iinfo(integer).max, -1).view(mask.shape[0] // m, m, columns)
        order = key.sort(dim=1, descending=True, stable=True).indices[:, :n]
        chosen = torch.zeros_like(key, dtype=torch.bool).scatter_(1, order, True)
        packed[part] = pack_mask(chosen.view(mask.shape) & mask)
    return packed


def complete_slots(mask: Tensor) -> Tensor:
    """The two slots of every group of 4 in the last dimension, as a bool mask of the same shape.

    Kept positions (at most two a group), completed by the smallest other positions.
    """
    slots = mask.view(*mask.shape[:-1], mask.shape[-1] // 4, 4).clone()
    for position in range(4):
        slots[..., position] |= slots.sum(dim=-1) < 2
    return slots.view(mask.shape)


def operand(
    values: Tensor,
    forward_mask: Tensor,
    columns: int,
    backward_mask: Tensor | None,
    first_row: int,
    rows: int,
) -> Tensor:
    """Rows ``first_row ..`` of a 2:4 operand: of the matrix, or of its twice pruned transpose."""
    part = slice(first_row, first_row + rows)
    if backward_mask is None:
        dense = decompress(values[part], forward_mask[part], columns, None)
        mask = unpack_mask(forward_mask[part], columns)
    else:
        dense = decompress(values, forward_mask, columns, backward_mask)[:, part].t().contiguous()
        mask = unpack_mask(backward_mask, columns)[:, part].t().contiguous()
    bits = dense.view(_INTEGER[dense.element_size()])
    return bits.masked_select(complete_slots(mask)).view(rows, mask.shape[1] // 2).view(dense.dtype)


def operand_pattern(mask: Tensor, columns: int, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Ones at the slots of every group of 4 of a matrix with this mask, or of its transpose."""
    full = unpack_mask(mask, columns)
    return complete_slots(full.t().contiguous() if transposed else full).to(dtype)


def crowded(mask: Tensor, transposed: bool) -> bool:
    """Whether some group of 4 keeps more than two positions: in a row, or in a column where transposed."""
    if transposed:
        a, b, c, d = mask.view(mask.shape[0] // 4, 4, mask.shape[1]).unbind(1)
    else:
        a, b, c, d = (mask >> j & 0x11 for j in range(4))
    return bool(((a & b & (c | d)) | (c & d & (a | b))).any())
