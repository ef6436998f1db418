"""The compiled orthonormalisation; the function is described in ``csrc/lgreco/orthonormal_common.h``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.lgreco_orthonormal_reference import VERSION
from ds_efficient.ops.native import INT64, POINTER, NativeLibrary, Signatures

_PIECE_ROWS = 2048
SPLIT_ROWS = 2 * _PIECE_ROWS  # matrices of more rows are shared by blocks of threads
_PART = 64 * 65


class Library(NativeLibrary):
    """The built function for one kind of device; tensors are on it and contiguous."""

    OP, PREFIX, VERSION = "lgreco_orthonormal", "ds_efficient_lgreco_", VERSION
    REFERENCE = "the same columns up to rounding, slower"
    SIGNATURES: ClassVar[Signatures] = {"orthonormalize": (POINTER, POINTER, POINTER, INT64)}

    def orthonormalize(self, matrices: Sequence[Tensor]) -> None:
        """Make the columns of at least one matrix (n, r) float32, r <= n, orthonormal in place."""
        count = len(matrices)
        addresses = (ctypes.c_void_p * count)(*(matrix.data_ptr() for matrix in matrices))
        rows = (ctypes.c_int64 * count)(*(matrix.shape[0] for matrix in matrices))
        columns = (ctypes.c_int64 * count)(*(matrix.shape[1] for matrix in matrices))
        scratch = self._scratch(matrices)  # held until the call is made
        self.call(
            "orthonormalize", matrices[0], ctypes.addressof(addresses), ctypes.addressof(rows),
            ctypes.addressof(columns), count, *(memory.data_ptr() for memory in scratch),
        )  # fmt: skip

    def _scratch(self, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Memory that the function writes before it reads it."""
        return ()


class CudaLibrary(Library):
    """With the memory between the kernels for matrices of many rows."""

    SIGNATURES: ClassVar[Signatures] = {"orthonormalize": (POINTER, POINTER, POINTER, INT64, POINTER)}

    def _scratch(self, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Products of each piece, inverse and mark of each matrix."""
        rows = [len(matrix) for matrix in matrices if len(matrix) > SPLIT_ROWS]
        numbers = sum(_PART * (-(-count // _PIECE_ROWS) + 1) + 1 for count in rows)
        return (torch.empty(numbers, dtype=torch.float64, device=matrices[0].device),)
