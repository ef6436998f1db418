"""Builders of the kernels of token dropping."""

from __future__ import annotations

from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.op_builder.builder import CPUOpBuilder, CUDAOpBuilder


class RandomLtdCPUBuilder(CPUOpBuilder):
    """C++ code of token dropping."""

    SPEC = find_op("random_ltd", "cpu")


class RandomLtdCUDABuilder(CUDAOpBuilder):
    """CUDA code of token dropping."""

    SPEC = find_op("random_ltd", "cuda")
