"""The compiled random sketches; the functions are described in ``csrc/rmm/rmm_common.h``."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.native import DOUBLE, INT, INT64, POINTER, UINT64, NativeLibrary, Signatures
from ds_efficient.ops.rmm_partition import Segment
from ds_efficient.ops.rmm_reference import VERSION

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_SKETCHES = {"gaussian": 0, "rademacher": 1, "srht": 2, "count": 3, "rows": 4}
HADAMARD_LIMIT = 16384  # rows of the largest transform on CUDA
_X = (POINTER, INT64, INT64)
_OUT = (INT64, DOUBLE, POINTER, INT)


class Units(ctypes.Structure):
    """Which unit elements to make: some rows of a segment, in a dtype other than float64."""

    _fields_: ClassVar = [
        *((name, INT64) for name in ("sketch", "dtype", "base_row")),
        ("before", UINT64),
        *((name, INT64) for name in ("block", "projected", "first", "rows")),
    ]

    @classmethod
    def of(cls, sketch: str, segment: Segment, first: int, rows: int, dtype: torch.dtype) -> Units:
        """Rows ``first .. first + rows - 1`` of the segment."""
        return cls(
            _SKETCHES[sketch], _DTYPES[dtype], segment.base_row, segment.before(sketch), segment.block,
            segment.projected, first, rows,
        )  # fmt: skip


class Library(NativeLibrary):
    """The built functions for one kind of device. Tensors are on that device; rows of x are adjacent."""

    OP, PREFIX, VERSION = "rmm", "ds_efficient_rmm_", VERSION
    REFERENCE = "the same S, slower"
    SIGNATURES: ClassVar[Signatures] = {
        "matrix": (UINT64, ctypes.POINTER(Units), POINTER, POINTER),
        "rows": (*_X, INT64, INT64, POINTER, *_OUT),
        "hadamard": (*_X, UINT64, INT64, INT64, INT64, POINTER, *_OUT),
    }

    def matrix(self, key: int, units: Units, chosen: Tensor | None, out: Tensor) -> Tensor:
        """Fill ``out``, whose memory holds the (rows, p) of ``units`` row by row; returns it."""
        address = None if chosen is None else chosen.data_ptr()
        return self.call("matrix", out, key, units, address, out.data_ptr())

    def rows(self, x: Tensor, segment: Segment, chosen: Tensor, out: Tensor) -> Tensor:
        """Fill ``out`` with the projection of the segment's rows ``x`` for the sketch rows; returns it."""
        return self.call(
            "rows", out, x.data_ptr(), x.stride(0), x.shape[1], segment.block, segment.projected,
            chosen.data_ptr(), segment.blocks, segment.scale("rows"), out.data_ptr(), _DTYPES[out.dtype],
        )  # fmt: skip

    def hadamard(self, x: Tensor, key: int, segment: Segment, chosen: Tensor, out: Tensor) -> Tensor:
        """The same for the sketch srht by the fast transform; returns ``out``."""
        return self.call(
            "hadamard", out, x.data_ptr(), x.stride(0), x.shape[1], key, segment.base_row, segment.block,
            segment.projected, chosen.data_ptr(), segment.blocks, segment.scale("srht"), out.data_ptr(),
            _DTYPES[out.dtype],
        )  # fmt: skip


class CpuLibrary(Library):
    """With the C++ function that makes S as it is used."""

    SIGNATURES: ClassVar[Signatures] = {
        **Library.SIGNATURES,
        "apply": (*_X, UINT64, INT, INT64, UINT64, INT64, INT64, POINTER, *_OUT),
    }

    def apply(
        self, x: Tensor, key: int, sketch: str, segment: Segment, chosen: Tensor | None, out: Tensor
    ) -> Tensor:
        """Fill ``out`` with the projection for any sketch but rows; returns it."""
        return self.call(
            "apply", out, x.data_ptr(), x.stride(0), x.shape[1], key, _SKETCHES[sketch], segment.base_row,
            segment.before(sketch), segment.block, segment.projected,
            None if chosen is None else chosen.data_ptr(), segment.blocks, segment.scale(sketch),
            out.data_ptr(), _DTYPES[out.dtype],
        )  # fmt: skip
