"""The compiled N:M sparse matrices."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.native import INT, INT64, POINTER, UINT32, NativeLibrary, Signatures
from ds_efficient.ops.slope_reference import FORMAT_VERSION

_ONE = {torch.float16: 0x3C00, torch.bfloat16: 0x3F80, torch.float32: 0x3F800000}


class Library(NativeLibrary):
    """The built functions for one kind of device. Tensors are contiguous and on that device."""

    OP, PREFIX, VERSION = "slope", "ds_efficient_slope_", FORMAT_VERSION
    SIGNATURES: ClassVar[Signatures] = {
        "decompress": (POINTER, POINTER, POINTER, POINTER, INT64, INT64, INT, INT, INT),
        "compress": (POINTER, POINTER, POINTER, INT64, INT64, INT, INT, INT),
        "select": (POINTER, POINTER, POINTER, INT64, INT64, INT, INT, INT),
        "forward_operand": (POINTER, POINTER, POINTER, INT64, INT64, INT64, INT, INT, INT),
        "backward_operand": (POINTER, POINTER, POINTER, POINTER, INT64, INT64, INT64, INT64, INT, INT, INT),
        "pattern": (POINTER, POINTER, INT64, INT64, INT, UINT32, INT),
    }

    def decompress(
        self, values: Tensor, forward_mask: Tensor, backward_mask: Tensor | None, out: Tensor, n: int, m: int
    ) -> Tensor:
        """Fill ``out`` (rows, columns) with the dense matrix; returns it."""
        forward = _words(forward_mask)
        backward = None if backward_mask is None else _words(backward_mask)
        masks = forward.data_ptr(), 0 if backward is None else backward.data_ptr()
        pointers = values.data_ptr(), *masks, out.data_ptr()
        return self.call("decompress", out, *pointers, *out.shape, n, m, out.element_size())

    def compress(self, dense: Tensor, forward_mask: Tensor, out: Tensor, n: int, m: int) -> Tensor:
        """Fill ``out`` with the kept elements of ``dense``; returns it."""
        mask = _words(forward_mask)
        pointers = dense.data_ptr(), mask.data_ptr(), out.data_ptr()
        return self.call("compress", out, *pointers, *dense.shape, n, m, dense.element_size())

    def select(
        self, values: Tensor, forward_mask: Tensor, out: Tensor, columns: int, n: int, m: int
    ) -> Tensor:
        """Fill ``out``, shaped as ``forward_mask``, with the mask of the column pass; returns it."""
        mask = _words(forward_mask)
        pointers = values.data_ptr(), mask.data_ptr(), out.data_ptr()
        return self.call("select", out, *pointers, out.shape[0], columns, n, m, values.element_size())

    def operand(
        self,
        values: Tensor,
        forward_mask: Tensor,
        backward_mask: Tensor | None,
        out: Tensor,
        columns: int,
        n: int,
        m: int,
        first_row: int,
    ) -> Tensor:
        """Fill ``out`` with rows ``first_row ..`` of the forward or the backward operand; returns it."""
        mask, size, tail = _words(forward_mask), values.element_size(), (first_row, out.shape[0], n, m)
        sources = values.data_ptr(), mask.data_ptr()
        if backward_mask is None:
            return self.call("forward_operand", out, *sources, out.data_ptr(), columns, *tail, size)
        backward, shape = _words(backward_mask), (values.shape[0], columns)
        pointers = *sources, backward.data_ptr(), out.data_ptr()
        return self.call("backward_operand", out, *pointers, *shape, *tail, size)

    def pattern(self, mask: Tensor, out: Tensor, columns: int, transposed: bool) -> Tensor:
        """Fill ``out`` (rows, columns), or its transpose, with ones at the slots; returns it."""
        words = _words(mask)
        shape = mask.shape[0], columns
        return self.call(
            "pattern", out, words.data_ptr(), out.data_ptr(), *shape, int(transposed), _ONE[out.dtype],
            out.element_size(),
        )  # fmt: skip


def _words(mask: Tensor) -> Tensor:
    """A mask where 32-bit words can be read: itself, or a copy of one that was cut from a byte buffer."""
    return mask if mask.data_ptr() % 4 == 0 else mask.clone()
