"""Builders of L-GreCo's planner and compressors."""

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


class LgrecoTopkCPUBuilder(CPUOpBuilder):
    """C++ code of the selection of the largest entries."""

    SPEC = find_op("lgreco_topk", "cpu")


class LgrecoTopkCUDABuilder(CUDAOpBuilder):
    """CUDA code of the selection of the largest entries."""

    SPEC = find_op("lgreco_topk", "cuda")


class LgrecoOrthonormalCPUBuilder(CPUOpBuilder):
    """C++ code of the orthonormal columns."""

    SPEC = find_op("lgreco_orthonormal", "cpu")


class LgrecoOrthonormalCUDABuilder(CUDAOpBuilder):
    """CUDA code of the orthonormal columns."""

    SPEC = find_op("lgreco_orthonormal", "cuda")
