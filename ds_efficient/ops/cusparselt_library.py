"""Find, check and bind NVIDIA's cuSPARSELt: no compiler and no header needed at run time.

The functions are called through ctypes with raw addresses. Types and enumerators are those of
``cusparseLt.h`` (a test compares them with the header where it is installed) and have kept their values since
0.5.2; 0.5.1 and older number the compute types in another way, so they are refused.

The library's structures are opaque and differ in size from release to release (512 bytes in 0.8, 11,024
before), so each gets `OPAQUE_BYTES`, and is 64-byte aligned (16 is asked for).
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import toolchain

NAME = "libcusparseLt.so.0"
OLDEST, BEFORE = (0, 5, 2), (1, 0, 0)
OPAQUE_BYTES = 16384

R_16F, R_16BF = 2, 14  # cudaDataType
ORDER_COL, ORDER_ROW = 1, 2  # cusparseOrder_t
NON_TRANSPOSE, TRANSPOSE = 0, 1  # cusparseOperation_t
SPARSITY_50_PERCENT = 0  # cusparseLtSparsity_t
COMPUTE_32F = 2  # cusparseComputeType
ALG_DEFAULT = 0  # cusparseLtMatmulAlg_t
# cusparseLtMatmulAlgAttribute_t
ALG_CONFIG_ID, ALG_CONFIG_MAX_ID, SEARCH_ITERATIONS, SPLIT_K, SPLIT_K_MODE, SPLIT_K_BUFFERS = range(6)

DATA_TYPES = {torch.float16: R_16F, torch.bfloat16: R_16BF}

_STATUS = (
    "SUCCESS NOT_INITIALIZED ALLOC_FAILED INVALID_VALUE ARCH_MISMATCH MAPPING_ERROR EXECUTION_FAILED "
    "INTERNAL_ERROR MATRIX_TYPE_NOT_SUPPORTED ZERO_PIVOT NOT_SUPPORTED INSUFFICIENT_RESOURCES"
).split()

_INT, _INT32, _UINT32, _INT64 = ctypes.c_int, ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64
_SIZE, _PTR = ctypes.c_size_t, ctypes.c_void_p
_MATMUL = (*(_PTR,) * 10, _INT32)  # handle, plan, alpha, A, B, beta, C, D, workspace, streams, their number
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cusparseLtInit": (_PTR,),
    "cusparseLtGetProperty": (_INT, _PTR),
    # handle, descriptor, rows, columns, leading dimension, alignment, type, order (, sparsity)
    "cusparseLtDenseDescriptorInit": (_PTR, _PTR, _INT64, _INT64, _INT64, _UINT32, _INT, _INT),
    "cusparseLtStructuredDescriptorInit": (_PTR, _PTR, _INT64, _INT64, _INT64, _UINT32, _INT, _INT, _INT),
    "cusparseLtMatDescriptorDestroy": (_PTR,),
    # handle, product, op of A, op of B, A, B, C, D, compute type
    "cusparseLtMatmulDescriptorInit": (_PTR, _PTR, _INT, _INT, _PTR, _PTR, _PTR, _PTR, _INT),
    # handle, selection, product, algorithm
    "cusparseLtMatmulAlgSelectionInit": (_PTR, _PTR, _PTR, _INT),
    # handle, selection, attribute, data, size of the data
    "cusparseLtMatmulAlgSetAttribute": (_PTR, _PTR, _INT, _PTR, _SIZE),
    "cusparseLtMatmulAlgGetAttribute": (_PTR, _PTR, _INT, _PTR, _SIZE),
    "cusparseLtMatmulPlanInit": (_PTR, _PTR, _PTR, _PTR),
    "cusparseLtMatmulPlanDestroy": (_PTR,),
    "cusparseLtMatmulGetWorkspace": (_PTR, _PTR, _PTR),
    "cusparseLtMatmul": _MATMUL,
    "cusparseLtMatmulSearch": _MATMUL,
    # handle, descriptor of the sparse matrix, sizes of the compressed matrix and of the scratch buffer
    "cusparseLtSpMMACompressedSize2": (_PTR, _PTR, _PTR, _PTR),
    # handle, descriptor of the sparse matrix, whether it is A, op, dense, compressed, scratch buffer, stream
    "cusparseLtSpMMACompress2": (_PTR, _PTR, _INT, _INT, _PTR, _PTR, _PTR, _PTR),
}
OPTIONAL_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cusparseLtMatmulAlgSelectionDestroy": (_PTR,),  # since 0.8
}


class LtError(RuntimeError):
    """cuSPARSELt returned an error.

    Args:
        function: the function called.
        status: what it returned.
        about: what it was called for, for example a shape.
    """

    def __init__(self, function: str, status: int, about: str) -> None:
        self.function, self.status = function, status
        name = _STATUS[status] if 0 <= status < len(_STATUS) else f"status {status}"
        super().__init__(f"cuSPARSELt: {function} for {about}: {name}")


class Opaque:
    """Memory for one of the library's opaque structures; keep it as long as anything refers to it.

    Attributes:
        address: where it is, 64-byte aligned.
    """

    __slots__ = ("_memory", "address")

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(OPAQUE_BYTES + 63)
        self.address = (ctypes.addressof(self._memory) + 63) // 64 * 64


class Library:
    """The bound functions, each as an attribute under its C name; they take integers as addresses.

    Args:
        functions: a loaded `ctypes.CDLL`.
        path: where it came from, for messages.

    Raises:
        OpBuildError: a function is missing, or the version is not supported.

    Attributes:
        version: for example ``(0, 8, 1)``.
    """

    def __init__(self, functions: Any, path: str) -> None:
        self.path = path
        self._handles: dict[int, Opaque] = {}
        self._lock = threading.Lock()  # forward and backward run on different threads
        for name, arguments in SIGNATURES.items():
            function = getattr(functions, name, None)
            if function is None:
                raise OpBuildError(f"{path} has no function {name}; {remedy()}")
            function.argtypes, function.restype = arguments, _INT
            setattr(self, name, function)
        for name, arguments in OPTIONAL_SIGNATURES.items():
            function = getattr(functions, name, None)
            if function is not None:
                function.argtypes, function.restype = arguments, _INT
            setattr(self, name, function)
        self.version = tuple(self._property(part) for part in range(3))
        if not OLDEST <= self.version < BEFORE:
            raise OpBuildError(
                f"{path} is cuSPARSELt {self.version_text}; supported: {_dotted(OLDEST)} and newer, below "
                f"{_dotted(BEFORE)}; {remedy()}"
            )

    @property
    def version_text(self) -> str:
        """The version with dots."""
        return _dotted(self.version)

    def call(self, name: str, about: str, *arguments: object) -> None:
        """Call a function; raise LtError unless it succeeds."""
        status = getattr(self, name)(*arguments)
        if status:
            raise LtError(name, status, about)

    def handle(self, device: int) -> int:
        """Address of the library's handle for a device; made on first use, never destroyed.

        At interpreter exit the CUDA context may be gone before any destructor of ours runs.
        """
        with self._lock:
            if device not in self._handles:
                handle = Opaque()
                with device_guard(device):
                    self.call("cusparseLtInit", f"cuda:{device}", handle.address)
                self._handles[device] = handle
            return self._handles[device].address

    def _property(self, part: int) -> int:
        value = ctypes.c_int(-1)
        self.call("cusparseLtGetProperty", "its version", part, ctypes.addressof(value))
        return value.value


def device_guard(device: int) -> Any:
    """Context in which a CUDA device is the current one."""
    return torch.cuda.device(device)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def remedy() -> str:
    """What to do about a missing or unsuitable library."""
    major = (torch.version.cuda or "12").split(".")[0]
    return f'install it with `pip install nvidia-cusparselt-cu{major}`, or set "backend": "dense"'


def candidates() -> Iterator[tuple[str, int]]:
    """Names and dlopen modes, in the order in which they are tried.

    The copy that torch has loaded comes first (two copies in a process waste memory), then those of the
    nvidia-* pip packages and of torch's own folder, then the loader's search path.
    """
    yield NAME, os.RTLD_NOLOAD | os.RTLD_NOW
    for package in toolchain.nvidia_packages():
        for folder in (package / "cusparselt" / "lib", package / "cu13" / "lib", package / "cu12" / "lib"):
            yield from ((str(path), os.RTLD_NOW) for path in sorted(folder.glob("libcusparseLt*.so*")))
    own = Path(torch.__file__).parent / "lib"
    yield from ((str(path), os.RTLD_NOW) for path in sorted(own.glob("libcusparseLt*.so*")))
    yield NAME, os.RTLD_NOW


def find(open_library: Callable[[str, int], Any] = ctypes.CDLL) -> Library:
    """Load the first of `candidates` that loads.

    Args:
        open_library: called with a name and a mode; raises OSError where that does not load.

    Raises:
        OpBuildError: none loads, or the one found is not supported; says what to do.
    """
    failures: list[str] = []
    for name, mode in candidates():
        try:
            functions = open_library(name, mode)
        except OSError as error:
            if not mode & os.RTLD_NOLOAD:
                failures.append(f"{name}: {error}")
            continue
        return Library(functions, name)
    raise OpBuildError(f"cuSPARSELt is not found ({'; '.join(failures)}); {remedy()}")


@functools.cache
def _found() -> Library | OpBuildError:
    """The library, or why there is none: looked for once."""
    try:
        return find()
    except OpBuildError as error:
        return error


def load() -> Library:
    """The library, bound once a process.

    Raises:
        OpBuildError: it is missing or not supported; says what to do.
    """
    found = _found()
    if isinstance(found, Library):
        return found
    raise OpBuildError(str(found))
