"""The compiled rank-1 updates; the functions are described in ``csrc/mkor``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.mkor_reference import VERSION
from ds_efficient.ops.native import DOUBLE, INT, INT64, POINTER, NativeLibrary, Signatures

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STATE = (POINTER, POINTER, INT64, POINTER, POINTER, POINTER, DOUBLE, DOUBLE, DOUBLE)
TILE = 128  # rows of a tile of the CUDA kernels
PART, PARTS = (
    16384,
    512,
)  # elements of a part of a tensor at least, parts at most, when gradients are rescaled
GROUP = 96  # factors of one launch, which share the scratch memory with those of the next


class Library(NativeLibrary):
    """The built functions for one kind of device. Tensors are on that device and contiguous."""

    OP, PREFIX, VERSION = "mkor", "ds_efficient_mkor_", VERSION
    REFERENCE = "the same update, slower"
    SIGNATURES: ClassVar[Signatures] = {"update": (*_STATE, INT)}
    LIMITS: ClassVar[tuple[int, ...]] = ()

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
            matrices: at least one (d, d), of one type of `ds_efficient.ops.mkor.DTYPES`.
            vectors, largest: float32.
            outcome: int32.
            rule: gamma, threshold, zeta.
        """
        count = len(matrices)
        sizes = [matrix.shape[0] for matrix in matrices]
        addresses = (ctypes.c_void_p * count)(*(matrix.data_ptr() for matrix in matrices))
        numbers = (ctypes.c_int64 * count)(*sizes)
        scratch = self._scratch(sizes, largest.device)
        return self.call(
            "update", outcome, ctypes.addressof(addresses), ctypes.addressof(numbers), count,
            vectors.data_ptr(), largest.data_ptr(), outcome.data_ptr(), *rule,
            *(memory.data_ptr() for memory in scratch), *self.LIMITS, _DTYPES[matrices[0].dtype],
        )  # fmt: skip

    def _scratch(self, sizes: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """Memory that the function writes before it reads it."""
        return ()


class CudaLibrary(Library):
    """With the memory between the kernels.

    Attributes:
        LIMITS: rows of tiles of a factor up to which two launches may do, in place of three.
    """

    SIGNATURES: ClassVar[Signatures] = {
        "update": (*_STATE, POINTER, POINTER, POINTER, POINTER, INT, INT),
        "rescale": (POINTER, POINTER, POINTER, POINTER, INT64, POINTER, POINTER, INT, INT),
    }
    LIMITS: ClassVar[tuple[int, ...]] = (32,)

    def _scratch(self, sizes: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """Parts of the products, the products, parts of the quadratic forms, largest entries."""
        groups = [
            [-(-size // TILE) for size in sizes[first : first + GROUP]]
            for first in range(0, len(sizes), GROUP)
        ]
        partial = TILE * max(sum(blocks * blocks for blocks in group) for group in groups)
        rows = max(map(sum, groups))
        tiles = max(sum(blocks * (blocks + 1) // 2 for blocks in group) for group in groups)
        return (
            torch.empty(partial, device=device, dtype=torch.float32),
            torch.empty(rows * TILE, device=device, dtype=torch.float32),
            torch.empty(2 * tiles, device=device, dtype=torch.float64),
            torch.empty(len(sizes), device=device, dtype=torch.float32),
        )

    def rescale(
        self, gradients: Sequence[Tensor], products: Sequence[Tensor], counts: Sequence[int], subtract: bool
    ) -> Tensor:
        """Overwrite gradients with products of the same norm; returns the sums, (layers, 3) float64.

        Args:
            gradients, products: the same shapes, of one type of `ds_efficient.ops.mkor.DTYPES`, contiguous.
            counts: tensors of each layer in turn, 1 to 80.
            subtract: the products are what is subtracted from the gradients to give them.
        """
        device, number = gradients[0].device, len(gradients)
        sizes = [gradient.numel() for gradient in gradients]
        parts = sum(max(1, min(PARTS, -(-size // PART))) for size in sizes)
        sums = torch.empty(len(counts), 3, device=device, dtype=torch.float64)
        partial = torch.empty(3 * parts, device=device, dtype=torch.float64)
        arrays = (
            (ctypes.c_void_p * number)(*[gradient.data_ptr() for gradient in gradients]),
            (ctypes.c_void_p * number)(*[product.data_ptr() for product in products]),
            (ctypes.c_int64 * number)(*sizes),
            (ctypes.c_int64 * len(counts))(*counts),
        )
        return self.call(
            "rescale", sums, *(ctypes.addressof(array) for array in arrays), len(counts),
            sums.data_ptr(), partial.data_ptr(), int(subtract), _DTYPES[gradients[0].dtype],
        )  # fmt: skip
