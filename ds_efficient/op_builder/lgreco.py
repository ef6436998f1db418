"""Builders of L-GreCo's planner and of its quantisation."""

from __future__ import annotations

from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.op_builder.builder import CPUOpBuilder, CUDAOpBuilder


class LgrecoPlannerCPUBuilder(CPUOpBuilder):
    """C++ code of L-GreCo's planner."""

    SPEC = find_op("lgreco_planner", "cpu")


class LgrecoQuantizeCPUBuilder(CPUOpBuilder):
    """C++ code of the quantisation."""

    SPEC = find_op("lgreco_quantize", "cpu")


class LgrecoQuantizeCUDABuilder(CUDAOpBuilder):
    """CUDA code of the quantisation."""

    SPEC = find_op("lgreco_quantize", "cuda")
