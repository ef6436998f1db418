"""The compiled selection of the largest entries; the functions are in ``csrc/lgreco/topk_common.h``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ds_efficient.ops.lgreco_quantize_native import DTYPES, address
from ds_efficient.ops.lgreco_quantize_reference import Feedback
from ds_efficient.ops.lgreco_topk_reference import VERSION
from ds_efficient.ops.native import DOUBLE, INT, INT64, POINTER, NativeLibrary, Signatures

TILE = 4096
_COUNTERS = 4096 + 3 * 2048 + 16
_SAMPLED_FROM = 1 << 16  # elements from which a sample is worth its cost
_SELECT = (POINTER, POINTER, POINTER, DOUBLE, INT64, INT64, POINTER)
_SCATTER = (POINTER, INT64, INT64, INT, DOUBLE, INT, POINTER, INT)


class Library(NativeLibrary):
    """The built functions for one kind of device; tensors are on it, contiguous, 1 <= k <= n < 2^31."""

    OP, PREFIX, VERSION = "lgreco_topk", "ds_efficient_lgreco_", VERSION
    SIGNATURES: ClassVar[Signatures] = {"select": (*_SELECT, INT), "scatter": _SCATTER}

    def select(self, x: Tensor, k: int, feedback: Feedback, payload: Tensor) -> Tensor:
        """Fill ``payload``, whose address is a multiple of 4, with the k largest; returns it."""
        error, new_error, unscale = feedback
        scratch = self._scratch(x, k)
        return self.call(
            "select", payload, x.data_ptr(), address(error), address(new_error), unscale, x.numel(), k,
            payload.data_ptr(), *(part if isinstance(part, int) else part.data_ptr() for part in scratch),
            DTYPES[x.dtype],
        )  # fmt: skip

    def _scratch(self, x: Tensor, k: int) -> tuple[Tensor | int, ...]:
        """Arguments for memory between the kernels."""
        return ()

    def scatter(
        self, payload: Tensor, out: Tensor, k: int, sent: torch.dtype, weight: float, accumulate: bool
    ) -> Tensor:
        """Write ``weight`` times the values over their elements of ``out``, or add them; returns it."""
        return self.call(
            "scatter", out, payload.data_ptr(), k, out.numel(), DTYPES[sent], weight, int(accumulate),
            out.data_ptr(), DTYPES[out.dtype],
        )  # fmt: skip


class CudaLibrary(Library):
    """With the memory between the kernels."""

    SIGNATURES: ClassVar[Signatures] = {
        "select": (*_SELECT, POINTER, POINTER, POINTER, INT64, INT),
        "scatter": _SCATTER,
    }

    def _scratch(self, x: Tensor, k: int) -> tuple[Tensor | int, ...]:
        """Counters, candidates, numbers of the tiles, and the candidates that there is room for.

        Room for twice what is kept and a 32nd of the elements: a sample that finds more has not narrowed
        the search.
        """
        n = x.numel()
        sampled = n >= _SAMPLED_FROM and 4 * k <= n
        capacity = min(n, 2 * k + n // 32 + TILE) if sampled else 0
        return (
            torch.zeros(_COUNTERS, device=x.device, dtype=torch.int32),
            torch.empty(2 * capacity, device=x.device, dtype=torch.int32),
            torch.empty(4 * -(-n // TILE), device=x.device, dtype=torch.int32),
            capacity,
        )
