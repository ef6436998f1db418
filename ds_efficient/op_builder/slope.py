"""Builders of the kernels of N:M sparse matrices."""

from __future__ import annotations

from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.op_builder.builder import CPUOpBuilder, CUDAOpBuilder


class SlopeCPUBuilder(CPUOpBuilder):
    """C++ code of the N:M sparse matrices."""

    SPEC = find_op("slope", "cpu")


class SlopeCUDABuilder(CUDAOpBuilder):
    """CUDA code of the N:M sparse matrices."""

    SPEC = find_op("slope", "cuda")
