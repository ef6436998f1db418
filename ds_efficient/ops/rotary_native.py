"""The compiled rotary position embedding; see ``csrc/rotary/rotary_common.h``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.native import DOUBLE, INT, INT64, POINTER, NativeLibrary, Signatures
from ds_efficient.ops.rotary_reference import VERSION

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
MOST_ANGLES = 2048  # of a token: they lie in the shared memory of a block


class Library(NativeLibrary):
    """The built function for one kind of device. Tensors are on that device and not empty."""

    OP, PREFIX, VERSION = "rotary", "ds_efficient_rotary_", VERSION
    REFERENCE = "the same up to rounding in float32, slower"
    SIGNATURES: ClassVar[Signatures] = {
        "turn": (
            *(POINTER, INT64, INT64, INT64, POINTER),  # t, out
            *(POINTER, INT64, INT64, POINTER, INT64),  # angles, index
            *(INT64, INT64, INT64, INT64, INT64, DOUBLE, INT, INT),
        )
    }

    def turn(
        self, t: Tensor, angles: Tensor, index: Tensor | None, mscale: float, transposed: bool, out: Tensor
    ) -> Tensor:
        """Fill ``out``, contiguous, as `ds_efficient.ops.rotary_reference.turn` describes; returns it.

        The last dimension of ``t`` and ``angles`` and all of ``index`` are contiguous.
        """
        positions, samples, heads, width = t.shape
        t_position, t_sample, t_head, _ = t.stride()
        sizes, strides = angles.shape, angles.stride()
        per_sample = strides[1] if len(sizes) == 4 and sizes[1] != 1 else 0
        return self.call(
            "turn", out, t.data_ptr(), t_position, t_sample, t_head, out.data_ptr(),
            angles.data_ptr(), strides[0], per_sample, None if index is None else index.data_ptr(), sizes[0],
            positions, samples, heads, width, sizes[-1], mscale, transposed, DTYPES[t.dtype],
        )  # fmt: skip
