"""The compiled rank-1 updates; the functions are described in ``csrc/mkor``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.mkor_reference import VERSION
from ds_efficient.ops.native import DOUBLE, INT, INT64, POINTER, NativeLibrary, Signatures

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_STATE = (POINTER, POINTER, INT64, POINTER, POINTER, POINTER, DOUBLE, DOUBLE, DOUBLE)
TILE = 128  # rows of a tile of the CUDA kernels
GROUP = 96  # factors of one launch, which share the scratch memory with those of the next


class Library(NativeLibrary):
    """The built functions for one kind of device. Tensors are on that device and contiguous."""

    OP, PREFIX, VERSION = "mkor", "ds_efficient_mkor_", VERSION
    REFERENCE = "the same update, slower"
    SIGNATURES: ClassVar[Signatures] = {"update": (*_STATE, INT)}

    def update(
        self,
        matrices: Sequence[Tensor],
        vectors: Tensor,
        largest: Tensor,
        outcome: Tensor,
        rule: tuple[float, float, float],
    ) -> Tensor:
        """Update every factor and its element of ``largest``; returns ``outcome``, filled.

        Args:
            matrices: at least one (d, d), float32 or bfloat16 together.
            vectors, largest: float32.
            outcome: int32.
            rule: gamma, threshold, zeta.
        """
        count = len(matrices)
        sizes = [len(matrix) for matrix in matrices]
        addresses = (ctypes.c_void_p * count)(*(matrix.data_ptr() for matrix in matrices))
        numbers = (ctypes.c_int64 * count)(*sizes)
        scratch = self._scratch(sizes, largest.device)
        return self.call(
            "update", outcome, ctypes.addressof(addresses), ctypes.addressof(numbers), count,
            vectors.data_ptr(), largest.data_ptr(), outcome.data_ptr(), *rule,
            *(memory.data_ptr() for memory in scratch), _DTYPES[matrices[0].dtype],
        )  # fmt: skip

    def _scratch(self, sizes: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """Memory that the function writes before it reads it."""
        return ()


class CudaLibrary(Library):
    """With the memory between the kernels."""

    SIGNATURES: ClassVar[Signatures] = {"update": (*_STATE, POINTER, POINTER, POINTER, POINTER, INT)}

    def _scratch(self, sizes: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """Partial sums of the products, the products, parts of the quadratic forms, largest entries."""
        groups = [
            [-(-size // TILE) for size in sizes[first : first + GROUP]]
            for first in range(0, len(sizes), GROUP)
        ]
        partial = TILE * max(sum(blocks * blocks for blocks in group) for group in groups)
        rows = max(map(sum, groups))
        return (
            torch.empty(partial, device=device, dtype=torch.float32),
            torch.empty(rows * TILE, device=device, dtype=torch.float32),
            torch.empty(rows, device=device, dtype=torch.float64),
            torch.empty(len(sizes), device=device, dtype=torch.float32),
        )
