"""The compiled keyed random numbers, called through ctypes with raw pointers and torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import compile as compiler
from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.ops.keyed_random_reference import STREAM_VERSION

logger = logging.getLogger(__name__)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_UINT64, _INT64, _INT, _POINTER = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_SIGNATURES = {
    "bits": (_UINT64, _UINT64, _INT64, _POINTER),
    "uniform": (_UINT64, _UINT64, _INT64, _POINTER, _INT),
    "normal": (_UINT64, _UINT64, _INT64, _POINTER, _INT),
    "choice": (_UINT64, _UINT64, _INT64, _INT64, _INT64, _POINTER),
}


class Library:
    """The built functions for one kind of device.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        OpBuildError: the library cannot be built or loaded.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._library = compiler.load(find_op("keyed_random", device))
        version = self._library.ds_efficient_keyed_random_version()
        assert version == STREAM_VERSION, f"stream version {version} built, {STREAM_VERSION} expected"
        where = (_INT, _POINTER) if self._cuda else (_INT,)  # device and stream, or number of threads
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, f"ds_efficient_keyed_{name}")
            function.argtypes, function.restype = (*arguments, *where), _INT
        if self._cuda:
            self._library.ds_efficient_cuda_error.restype = ctypes.c_char_p

    def bits(self, key: int, offset: int, out: Tensor) -> Tensor:
        """Fill ``out`` (int32, contiguous) with words ``offset ..`` of the stream; returns it."""
        return self._call("bits", out, key, offset, out.numel(), out.data_ptr())

    def uniform(self, key: int, offset: int, out: Tensor) -> Tensor:
        """Fill ``out`` (float32, bfloat16 or float16, contiguous) with uniform numbers; returns it."""
        return self._call("uniform", out, key, offset, out.numel(), out.data_ptr(), _DTYPES[out.dtype])

    def normal(self, key: int, offset: int, out: Tensor) -> Tensor:
        """Fill ``out`` (float32, bfloat16 or float16, contiguous) with normal numbers; returns it."""
        return self._call("normal", out, key, offset, out.numel(), out.data_ptr(), _DTYPES[out.dtype])

    def choice(self, key: int, first_row: int, n: int, out: Tensor) -> Tensor:
        """Fill ``out`` (batch, k) int64 with choices of k of n; returns it."""
        batch, k = out.shape
        return self._call("choice", out, key, first_row, batch, n, k, out.data_ptr())

    def _call(self, name: str, out: Tensor, *arguments: int) -> Tensor:
        function = getattr(self._library, f"ds_efficient_keyed_{name}")
        if self._cuda:
            with torch.cuda.device(out.device):
                status = function(*arguments, out.device.index, torch.cuda.current_stream().cuda_stream)
            if status:
                reason = self._library.ds_efficient_cuda_error(status).decode()
                raise RuntimeError(f"keyed_random: {name} on {out.device}: CUDA error {status}: {reason}")
        elif function(*arguments, torch.get_num_threads()):
            raise MemoryError(f"keyed_random: {name}: out of memory")
        return out


@functools.cache
def _library(device: str) -> Library | OpBuildError:
    """The library, or why there is none: a build that failed once is not tried again for every draw."""
    try:
        return Library(device)
    except OpBuildError as error:
        return error


def select(device: torch.device, backend: str) -> Library | None:
    """The library for a device, or None for the plain torch reference.

    ``"auto"`` on the CPU takes the reference when the C++ code cannot be built: it gives the same bits, only
    slower, and says so once. On CUDA nothing stands in for the kernels unasked.

    Raises:
        OpBuildError: ``"native"``, or ``"auto"`` on CUDA, and the library cannot be built; names the remedy.
    """
    if backend == "reference":
        return None
    if device.type not in ("cpu", "cuda"):
        raise OpBuildError(
            f'keyed_random has no native code for device {str(device)!r}; pass backend="reference"'
        )
    found = _library(device.type)
    if isinstance(found, Library):
        return found
    if backend == "auto" and device.type == "cpu":
        _report_reference(str(found))
        return None
    raise OpBuildError(
        f'keyed_random: {found}\n  Remedy without a compiler: backend="reference" (the same bits, slower)'
    )


@functools.lru_cache(maxsize=1)
def _report_reference(reason: str) -> None:
    logger.warning("keyed_random on the CPU runs the plain torch code (the same bits, slower): %s", reason)
