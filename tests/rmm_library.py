"""All functions of the CUDA library of the random sketches, with that for a generated S."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.native import DOUBLE, INT, INT64, POINTER, Signatures
from ds_efficient.ops.rmm_native import _DTYPES, Library
from ds_efficient.ops.rmm_partition import Segment


class CudaLibrary(Library):
    """See the base class."""

    SIGNATURES: ClassVar[Signatures] = {
        **Library.SIGNATURES,
        "product": (POINTER, INT64, INT64, POINTER, INT64, INT64, INT64, DOUBLE, POINTER, INT),
    }

    def product(self, x: Tensor, units: Tensor, sketch: str, segment: Segment, out: Tensor) -> Tensor:
        """Fill ``out`` with the projection by the generated ``units`` (rows, p) of x's dtype; returns it."""
        return self.call(
            "product", out, x.data_ptr(), x.stride(0), x.shape[1], units.data_ptr(), segment.block,
            segment.projected, segment.blocks, segment.scale(sketch), out.data_ptr(), _DTYPES[out.dtype],
        )  # fmt: skip

    def generated(
        self, x: Tensor, key: int, sketch: str, segment: Segment, chosen: Tensor | None, out: Tensor
    ) -> Tensor:
        """Generate S and project by it; returns ``out``."""
        units = torch.empty(x.shape[0], segment.projected, dtype=x.dtype, device=x.device)
        return self.product(x, self.matrix(key, sketch, segment, chosen, 0, units), sketch, segment, out)
