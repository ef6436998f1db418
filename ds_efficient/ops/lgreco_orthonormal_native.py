"""The compiled orthonormalisation; the function is described in ``csrc/lgreco/orthonormal_common.h``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.lgreco_orthonormal_reference import VERSION
from ds_efficient.ops.lgreco_quantize_native import DTYPES, address
from ds_efficient.ops.native import DOUBLE, INT, INT64, POINTER, NativeLibrary, Signatures

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


class CpuLibrary(Library):
    """With the products of low rank in one pass, which only the host has (``csrc/lgreco/low_rank_cpu.h``)."""

    SIGNATURES: ClassVar[Signatures] = {
        **Library.SIGNATURES,
        "project": (POINTER, POINTER, DOUBLE, POINTER, INT64, INT64, INT64, POINTER, POINTER, INT),
        "project_back": (POINTER, POINTER, INT64, INT64, INT64, POINTER),
        "rebuild": (POINTER, POINTER, INT64, INT64, INT64, POINTER, DOUBLE, POINTER, INT),
    }

    def project(
        self, x: Tensor, error: Tensor | None, unscale: float, q: Tensor, corrected: Tensor, p: Tensor
    ) -> None:
        """Write ``unscale`` * x + error over ``corrected`` (n, ...), and its product with q^T over ``p``."""
        self.call(
            "project", p, x.data_ptr(), address(error), unscale, q.data_ptr(), p.shape[0], q.shape[1],
            q.shape[0], corrected.data_ptr(), p.data_ptr(), DTYPES[x.dtype],
        )  # fmt: skip

    def project_back(self, x: Tensor, p: Tensor, q: Tensor) -> None:
        """Write p^T x over ``q``."""
        self.call(
            "project_back", q, x.data_ptr(), p.data_ptr(), p.shape[0], q.shape[1], q.shape[0], q.data_ptr()
        )

    def rebuild(self, p: Tensor, q: Tensor, error: Tensor, scale: float, out: Tensor) -> None:
        """Take p q from ``error`` (n, ...), and write ``scale`` times it over ``out``."""
        self.call(
            "rebuild", out, p.data_ptr(), q.data_ptr(), p.shape[0], q.shape[1], q.shape[0], error.data_ptr(),
            scale, out.data_ptr(), DTYPES[out.dtype],
        )  # fmt: skip


class CudaLibrary(Library):
    """With the memory between the kernels for matrices of many rows."""

    SIGNATURES: ClassVar[Signatures] = {"orthonormalize": (POINTER, POINTER, POINTER, INT64, POINTER)}

    def _scratch(self, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Products of each piece, inverse and mark of each matrix."""
        rows = [len(matrix) for matrix in matrices if len(matrix) > SPLIT_ROWS]
        numbers = sum(_PART * (-(-count // _PIECE_ROWS) + 1) + 1 for count in rows)
        return (torch.empty(numbers, dtype=torch.float64, device=matrices[0].device),)
