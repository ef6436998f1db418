"""The compiled quantisation; the functions are described in ``csrc/lgreco/quantize_common.h``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.lgreco_quantize_reference import VERSION, Feedback
from ds_efficient.ops.native import DOUBLE, INT, INT64, POINTER, UINT64, NativeLibrary, Signatures

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Library(NativeLibrary):
    """The built functions for one kind of device; tensors are on it, contiguous and not empty."""

    OP, PREFIX, VERSION = "lgreco_quantize", "ds_efficient_lgreco_", VERSION
    SIGNATURES: ClassVar[Signatures] = {
        "quantize": (POINTER, POINTER, POINTER, DOUBLE, INT64, UINT64, INT, INT64, POINTER, INT),
        "dequantize": (POINTER, INT64, INT64, INT64, INT, INT64, DOUBLE, INT, POINTER, INT),
    }

    def quantize(
        self, x: Tensor, feedback: Feedback, key: int, bits: int, bucket: int, payload: Tensor
    ) -> Tensor:
        """Fill ``payload``, whose address is a multiple of 8, with what stands for ``x``; returns it."""
        error, new_error, unscale = feedback
        return self.call(
            "quantize", payload, x.data_ptr(), address(error), address(new_error), unscale, x.numel(), key,
            bits, bucket, payload.data_ptr(), DTYPES[x.dtype],
        )  # fmt: skip

    def dequantize(
        self, payloads: Tensor, out: Tensor, bits: int, bucket: int, weight: float, accumulate: bool
    ) -> Tensor:
        """Write ``weight`` times the sum of the rows of ``payloads`` over ``out``, or add it; returns it.

        Rows begin at multiples of 8.
        """
        return self.call(
            "dequantize", out, payloads.data_ptr(), len(payloads), payloads.stride(0), out.numel(), bits,
            bucket, weight, int(accumulate), out.data_ptr(), DTYPES[out.dtype],
        )  # fmt: skip


class CpuLibrary(Library):
    """With the functions for several tensors as one, which only the host has."""

    SIGNATURES: ClassVar[Signatures] = {
        **Library.SIGNATURES,
        "quantize_parts": (POINTER, POINTER, INT64, UINT64, INT, INT64, POINTER, INT),
        "dequantize_parts": (POINTER, INT64, INT64, POINTER, POINTER, INT64, INT, INT64, DOUBLE, INT),
    }

    def quantize_parts(
        self, parts: Sequence[Tensor], key: int, bits: int, bucket: int, payload: Tensor
    ) -> Tensor:
        """Fill ``payload``, whose address is a multiple of 8, with what stands for all parts; returns it."""
        addresses, counts = _addresses(parts)
        return self.call(
            "quantize_parts", payload, ctypes.addressof(addresses), ctypes.addressof(counts), len(parts), key,
            bits, bucket, payload.data_ptr(), DTYPES[parts[0].dtype],
        )  # fmt: skip

    def dequantize_parts(
        self, payloads: Tensor, parts: Sequence[Tensor], bits: int, bucket: int, weight: float
    ) -> None:
        """Write ``weight`` times the sum of the rows of ``payloads``, at multiples of 8, over the parts."""
        addresses, counts = _addresses(parts)
        self.call(
            "dequantize_parts", parts[0], payloads.data_ptr(), len(payloads), payloads.stride(0),
            ctypes.addressof(addresses), ctypes.addressof(counts), len(parts), bits, bucket, weight,
            DTYPES[parts[0].dtype],
        )  # fmt: skip


def _addresses(parts: Sequence[Tensor]) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int64]]:
    """Where the parts are, and how many elements they have."""
    count = len(parts)
    addresses = (ctypes.c_void_p * count)(*(part.data_ptr() for part in parts))
    return addresses, (ctypes.c_int64 * count)(*(part.numel() for part in parts))


def address(tensor: Tensor | None) -> int | None:
    """Of the memory, None where there is no tensor."""
    return None if tensor is None else tensor.data_ptr()
