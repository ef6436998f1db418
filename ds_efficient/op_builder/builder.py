"""Builders with DeepSpeed's interface (name, sources, is_compatible, load) over `.compile`.

They derive from DeepSpeed's, so that its tools can list and load them, and override what does not hold here:
the sources are absolute paths, no ``-std`` is set, ``9.0a`` is an architecture, the environment is not
changed, and the build neither hangs on a lock nor needs ninja. Importing this module imports DeepSpeed;
nothing else of the package does so for the sake of a kernel.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, ClassVar

from deepspeed.ops.op_builder.builder import CUDAOpBuilder as _DeepSpeedCUDA
from deepspeed.ops.op_builder.builder import OpBuilder as _DeepSpeedOpBuilder
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder as _DeepSpeedCPU

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import compile as compiler
from ds_efficient.op_builder.all_ops import OpSpec
from ds_efficient.op_builder.arch import gencode_flags


class _NativeOp(_DeepSpeedOpBuilder):
    """What the builders for both devices share."""

    SPEC: ClassVar[OpSpec]
    BUILD_VAR: ClassVar[str]
    NAME: ClassVar[str]

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name=name or self.NAME)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "SPEC" in cls.__dict__:
            cls.NAME = cls.SPEC.full_name
            cls.BUILD_VAR = "DS_BUILD_" + cls.NAME.upper()

    def absolute_name(self) -> str:
        """Dotted name of the op."""
        return f"ds_efficient.ops.{self.NAME}"

    def sources(self) -> list[str]:
        """Absolute paths of the sources."""
        return [str(path) for path in self.SPEC.source_paths()]

    def include_paths(self) -> list[str]:
        """Absolute paths of the folders with headers."""
        return [str(path) for path in self.SPEC.include_dirs()]

    def libraries_args(self) -> list[str]:
        """Libraries to link."""
        return list(self.SPEC.libraries)

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether the op can be built here; if not, ``error_log`` says why, and a warning if ``verbose``."""
        self.error_log = compiler.why_not(self.SPEC)
        if self.error_log and verbose:
            self.warning(self.error_log)
        return self.error_log is None

    def load(self, verbose: bool = False) -> ctypes.CDLL:
        """Build the library if needed and load it; see `ds_efficient.op_builder.compile.load`."""
        return self.jit_load(verbose)

    def jit_load(self, verbose: bool = True) -> ctypes.CDLL:
        """The same as `load`; there is no other way of building these ops.

        Raises:
            OpBuildError: it cannot be built or loaded; says why and what to do.
        """
        return compiler.load(self.SPEC)

    def builder(self) -> Any:
        """Refuse DeepSpeed's ahead-of-time build, whose extension modules these libraries are not.

        Raises:
            OpBuildError: always; names the command that builds ahead.
        """
        raise OpBuildError(
            f"{self.NAME} is no Python extension; build it with `ds_efficient prebuild {self.SPEC.name}`"
        )


class CPUOpBuilder(_NativeOp, _DeepSpeedCPU):
    """Base of the builders for C++ ops."""

    def cxx_args(self) -> list[str]:
        """Flags of the C++ compiler."""
        return [*compiler.CXX_FLAGS, *self.SPEC.cxx_flags]


class CUDAOpBuilder(_NativeOp, _DeepSpeedCUDA):
    """Base of the builders for CUDA ops."""

    def cxx_args(self) -> list[str]:
        """No host-only sources, so no flags."""
        return []

    def nvcc_args(self) -> list[str]:
        """Flags of nvcc, the architectures included."""
        return [*compiler.NVCC_FLAGS, *self.SPEC.nvcc_flags, *self.compute_capability_args()]

    def compute_capability_args(self, cross_compile_archs: str | None = None) -> list[str]:
        """``-gencode`` flags for TORCH_CUDA_ARCH_LIST, else for the visible GPUs; no variable is set."""
        return gencode_flags(compiler.target_archs())


def create_builder(spec: OpSpec) -> _NativeOp:
    """An instance of the builder of a row of `ALL_OPS`."""
    module, _, name = spec.builder.partition(":")
    return getattr(importlib.import_module(module), name)()
