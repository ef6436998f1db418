"""The compiled planner of L-GreCo; the function is described in ``csrc/lgreco/planner_cpu.cpp``."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ds_efficient.ops.lgreco_planner_reference import VERSION
from ds_efficient.ops.native import INT64, POINTER, NativeLibrary, Signatures


class Library(NativeLibrary):
    """The built function; there is one for the CPU only."""

    OP, PREFIX, VERSION = "lgreco_planner", "ds_efficient_lgreco_", VERSION
    REFERENCE = "the same plan, slower"
    SIGNATURES: ClassVar[Signatures] = {"plan": (INT64, POINTER, POINTER, POINTER, INT64, POINTER)}

    def plan(self, offsets: Tensor, cells: Tensor, costs: Tensor, capacity: int, out: Tensor) -> Tensor:
        """Fill ``out`` (layers,) with the choices; all tensors contiguous; returns it."""
        return self.call(
            "plan", out, out.numel(), offsets.data_ptr(), cells.data_ptr(), costs.data_ptr(), capacity,
            out.data_ptr(),
        )  # fmt: skip
