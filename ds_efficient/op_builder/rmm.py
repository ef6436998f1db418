"""Builders of the random sketches."""

from __future__ import annotations

from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.op_builder.builder import CPUOpBuilder, CUDAOpBuilder


class RmmCPUBuilder(CPUOpBuilder):
    """C++ code of the random sketches."""

    SPEC = find_op("rmm", "cpu")


class RmmCUDABuilder(CUDAOpBuilder):
    """CUDA code of the random sketches."""

    SPEC = find_op("rmm", "cuda")
