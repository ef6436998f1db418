"""Builders of the keyed random numbers."""

from __future__ import annotations

from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.op_builder.builder import CPUOpBuilder, CUDAOpBuilder


class KeyedRandomCPUBuilder(CPUOpBuilder):
    """C++ code of the keyed random numbers."""

    SPEC = find_op("keyed_random", "cpu")


class KeyedRandomCUDABuilder(CUDAOpBuilder):
    """CUDA code of the keyed random numbers."""

    SPEC = find_op("keyed_random", "cuda")
