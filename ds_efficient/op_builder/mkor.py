"""Builders of the rank-1 updates of inverse factors."""

from __future__ import annotations

from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.op_builder.builder import CPUOpBuilder, CUDAOpBuilder


class MkorCPUBuilder(CPUOpBuilder):
    """C++ code of the rank-1 updates."""

    SPEC = find_op("mkor", "cpu")


class MkorCUDABuilder(CUDAOpBuilder):
    """CUDA code of the rank-1 updates."""

    SPEC = find_op("mkor", "cuda")
