"""Builders of the rotary position embedding."""

from __future__ import annotations

from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.op_builder.builder import CPUOpBuilder, CUDAOpBuilder


class RotaryCPUBuilder(CPUOpBuilder):
    """C++ code of the rotary position embedding."""

    SPEC = find_op("rotary", "cpu")


class RotaryCUDABuilder(CUDAOpBuilder):
    """CUDA code of the rotary position embedding."""

    SPEC = find_op("rotary", "cuda")
