"""The compiled random sketches; the functions are described in ``csrc/rmm/rmm_common.h``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.native import DOUBLE, INT, INT64, POINTER, UINT64, NativeLibrary, Signatures
from ds_efficient.ops.rmm_partition import Segment
from ds_efficient.ops.rmm_reference import VERSION

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_SKETCHES = {"gaussian": 0, "rademacher": 1, "srht": 2, "count": 3, "rows": 4}
HADAMARD_LIMIT = 16384  # rows of the largest transform on CUDA
_X = (POINTER, INT64, INT64, UINT64)
_OUT = (INT64, DOUBLE, POINTER, INT)


class Library(NativeLibrary):
    """The built functions for one kind of device. Tensors are on that device; rows of x are adjacent."""

    OP, PREFIX, VERSION = "rmm", "ds_efficient_rmm_", VERSION
    REFERENCE = "the same S, slower"
    SIGNATURES: ClassVar[Signatures] = {
        "matrix": (UINT64, INT, INT64, UINT64, INT64, INT64, POINTER, INT64, INT64, POINTER, INT),
        "apply": (*_X, INT, INT64, UINT64, INT64, INT64, POINTER, *_OUT),
        "product": (POINTER, INT64, INT64, POINTER, INT64, INT64, *_OUT),
        "hadamard": (*_X, INT64, INT64, INT64, POINTER, *_OUT),
    }

    def matrix(
        self, key: int, sketch: str, segment: Segment, chosen: Tensor | None, first: int, out: Tensor
    ) -> Tensor:
        """Fill ``out`` (rows, p), contiguous, with unit elements of rows ``first ..``; returns it."""
        return self.call(
            "matrix", out, key, _SKETCHES[sketch], segment.base_row, segment.before(sketch), segment.block,
            segment.projected, _address(chosen), first, out.shape[0], out.data_ptr(), _DTYPES[out.dtype],
        )  # fmt: skip

    def apply(
        self, x: Tensor, key: int, sketch: str, segment: Segment, chosen: Tensor | None, out: Tensor
    ) -> Tensor:
        """Fill ``out`` with the projection of the segment's rows ``x``; returns it."""
        return self.call(
            "apply", out, x.data_ptr(), x.stride(0), x.shape[1], key, _SKETCHES[sketch], segment.base_row,
            segment.before(sketch), segment.block, segment.projected, _address(chosen), segment.blocks,
            segment.scale(sketch), out.data_ptr(), _DTYPES[out.dtype],
        )  # fmt: skip

    def product(self, x: Tensor, units: Tensor, sketch: str, segment: Segment, out: Tensor) -> Tensor:
        """The same with the unit elements of all rows given, (rows, p) of the dtype of ``x``."""
        return self.call(
            "product", out, x.data_ptr(), x.stride(0), x.shape[1], units.data_ptr(), segment.block,
            segment.projected, segment.blocks, segment.scale(sketch), out.data_ptr(), _DTYPES[out.dtype],
        )  # fmt: skip

    def hadamard(self, x: Tensor, key: int, segment: Segment, chosen: Tensor | None, out: Tensor) -> Tensor:
        """The same for the sketch srht by the fast transform; returns ``out``."""
        return self.call(
            "hadamard", out, x.data_ptr(), x.stride(0), x.shape[1], key, segment.base_row, segment.block,
            segment.projected, _address(chosen), segment.blocks, segment.scale("srht"), out.data_ptr(),
            _DTYPES[out.dtype],
        )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
