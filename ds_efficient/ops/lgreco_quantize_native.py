"""The compiled quantisation; the functions are described in ``csrc/lgreco/quantize_common.h``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.lgreco_quantize_reference import VERSION
from ds_efficient.ops.native import DOUBLE, INT, INT64, POINTER, UINT64, NativeLibrary, Signatures

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Library(NativeLibrary):
    """The built functions for one kind of device; tensors are on it, contiguous and not empty."""

    OP, PREFIX, VERSION = "lgreco_quantize", "ds_efficient_lgreco_", VERSION
    SIGNATURES: ClassVar[Signatures] = {
        "quantize": (POINTER, INT64, UINT64, INT, INT64, POINTER, INT),
        "dequantize": (POINTER, INT64, INT, INT64, DOUBLE, INT, POINTER, INT),
    }

    def quantize(self, x: Tensor, key: int, bits: int, bucket: int, payload: Tensor) -> Tensor:
        """Fill ``payload``, whose address is a multiple of 8, with what stands for ``x``; returns it."""
        return self.call(
            "quantize", payload, x.data_ptr(), x.numel(), key, bits, bucket, payload.data_ptr(),
            _DTYPES[x.dtype],
        )  # fmt: skip

    def dequantize(
        self, payload: Tensor, out: Tensor, bits: int, bucket: int, weight: float, accumulate: bool
    ) -> Tensor:
        """Write ``weight`` times the values of ``payload`` over ``out``, or add them to it; returns it."""
        return self.call(
            "dequantize", out, payload.data_ptr(), out.numel(), bits, bucket, weight, int(accumulate),
            out.data_ptr(), _DTYPES[out.dtype],
        )  # fmt: skip
