"""The compiled keyed random numbers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.keyed_random_reference import STREAM_VERSION
from ds_efficient.ops.native import INT, INT64, POINTER, UINT64, NativeLibrary, Signatures

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Library(NativeLibrary):
    """The built functions for one kind of device. Tensors are contiguous and on that device."""

    OP, PREFIX, VERSION = "keyed_random", "ds_efficient_keyed_", STREAM_VERSION
    SIGNATURES: ClassVar[Signatures] = {
        "bits": (UINT64, UINT64, INT64, POINTER),
        "uniform": (UINT64, UINT64, INT64, POINTER, INT),
        "normal": (UINT64, UINT64, INT64, POINTER, INT),
        "choice": (UINT64, UINT64, INT64, INT64, INT64, POINTER),
    }

    def bits(self, key: int, offset: int, out: Tensor) -> Tensor:
        """Fill ``out`` (int32, contiguous) with words ``offset ..`` of the stream; returns it."""
        return self.call("bits", out, key, offset, out.numel(), out.data_ptr())

    def uniform(self, key: int, offset: int, out: Tensor) -> Tensor:
        """Fill ``out`` (float32, bfloat16 or float16, contiguous) with uniform numbers; returns it."""
        return self.call("uniform", out, key, offset, out.numel(), out.data_ptr(), _DTYPES[out.dtype])

    def normal(self, key: int, offset: int, out: Tensor) -> Tensor:
        """Fill ``out`` (float32, bfloat16 or float16, contiguous) with normal numbers; returns it."""
        return self.call("normal", out, key, offset, out.numel(), out.data_ptr(), _DTYPES[out.dtype])

    def choice(self, key: int, first_row: int, n: int, out: Tensor) -> Tensor:
        """Fill ``out`` (batch, k) int64 with choices of k of n; returns it."""
        batch, k = out.shape
        return self.call("choice", out, key, first_row, batch, n, k, out.data_ptr())
