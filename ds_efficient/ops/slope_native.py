"""The compiled N:M sparse matrices, called through ctypes with raw pointers and torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import compile as compiler
from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.ops.slope_reference import FORMAT_VERSION

logger = logging.getLogger(__name__)

# Ten times as fast as torch.cuda's functions, where this torch has them.
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

_ONE = {torch.float16: 0x3C00, torch.bfloat16: 0x3F80, torch.float32: 0x3F800000}
_INT64, _INT, _UINT32, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p
_SIGNATURES = {
    "decompress": (_POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT, _INT, _INT),
    "compress": (_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT, _INT, _INT),
    "select": (_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT, _INT, _INT),
    "forward_operand": (_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _INT, _INT, _INT),
    "backward_operand": (
        _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _INT64, _INT, _INT, _INT,
    ),
    "pattern": (_POINTER, _POINTER, _INT64, _INT64, _INT, _UINT32, _INT),
}  # fmt: skip


class Library:
    """The built functions for one kind of device. Tensors are contiguous and on that device.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        OpBuildError: the library cannot be built or loaded.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._library = compiler.load(find_op("slope", device))
        version = self._library.ds_efficient_slope_version()
        assert version == FORMAT_VERSION, f"format version {version} built, {FORMAT_VERSION} expected"
        where = (_INT, _POINTER) if self._cuda else (_INT,)  # device and stream, or number of threads
        self._functions = {}
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, f"ds_efficient_slope_{name}")
            function.argtypes, function.restype = (*arguments, *where), _INT
            self._functions[name] = function
        if self._cuda:
            self._library.ds_efficient_cuda_error.restype = ctypes.c_char_p

    def decompress(
        self, values: Tensor, forward_mask: Tensor, backward_mask: Tensor | None, out: Tensor, n: int, m: int
    ) -> Tensor:
        """Fill ``out`` (rows, columns) with the dense matrix; returns it."""
        forward = _words(forward_mask)
        backward = None if backward_mask is None else _words(backward_mask)
        masks = forward.data_ptr(), 0 if backward is None else backward.data_ptr()
        pointers = values.data_ptr(), *masks, out.data_ptr()
        return self._call("decompress", out, *pointers, *out.shape, n, m, out.element_size())

    def compress(self, dense: Tensor, forward_mask: Tensor, out: Tensor, n: int, m: int) -> Tensor:
        """Fill ``out`` with the kept elements of ``dense``; returns it."""
        mask = _words(forward_mask)
        pointers = dense.data_ptr(), mask.data_ptr(), out.data_ptr()
        return self._call("compress", out, *pointers, *dense.shape, n, m, dense.element_size())

    def select(
        self, values: Tensor, forward_mask: Tensor, out: Tensor, columns: int, n: int, m: int
    ) -> Tensor:
        """Fill ``out``, shaped as ``forward_mask``, with the mask of the column pass; returns it."""
        mask = _words(forward_mask)
        pointers = values.data_ptr(), mask.data_ptr(), out.data_ptr()
        return self._call("select", out, *pointers, out.shape[0], columns, n, m, values.element_size())

    def operand(
        self,
        values: Tensor,
        forward_mask: Tensor,
        backward_mask: Tensor | None,
        out: Tensor,
        columns: int,
        n: int,
        m: int,
        first_row: int,
    ) -> Tensor:
        """Fill ``out`` with rows ``first_row ..`` of the forward or the backward operand; returns it."""
        mask, size, tail = _words(forward_mask), values.element_size(), (first_row, out.shape[0], n, m)
        sources = values.data_ptr(), mask.data_ptr()
        if backward_mask is None:
            return self._call("forward_operand", out, *sources, out.data_ptr(), columns, *tail, size)
        backward, shape = _words(backward_mask), (values.shape[0], columns)
        pointers = *sources, backward.data_ptr(), out.data_ptr()
        return self._call("backward_operand", out, *pointers, *shape, *tail, size)

    def pattern(self, mask: Tensor, out: Tensor, columns: int, transposed: bool) -> Tensor:
        """Fill ``out`` (rows, columns), or its transpose, with ones at the slots; returns it."""
        words = _words(mask)
        shape = mask.shape[0], columns
        return self._call(
            "pattern", out, words.data_ptr(), out.data_ptr(), *shape, int(transposed), _ONE[out.dtype],
            out.element_size(),
        )  # fmt: skip

    def _call(self, name: str, out: Tensor, *arguments: int) -> Tensor:
        function = self._functions[name]
        if self._cuda:
            index = out.get_device()
            if _current_device is not None and _raw_stream is not None and _current_device() == index:
                status = function(*arguments, index, _raw_stream(index))
            else:
                with torch.cuda.device(index):
                    status = function(*arguments, index, torch.cuda.current_stream().cuda_stream)
            if status:
                reason = self._library.ds_efficient_cuda_error(status).decode()
                raise RuntimeError(f"slope: {name} on {out.device}: CUDA error {status}: {reason}")
        else:
            status = function(*arguments, torch.get_num_threads())
            assert status == 0, f"slope: {name}: no code for this size of an element"
        return out


def _words(mask: Tensor) -> Tensor:
    """A mask where 32-bit words can be read: itself, or a copy of one that was cut from a byte buffer."""
    return mask if mask.data_ptr() % 4 == 0 else mask.clone()


@functools.cache
def _library(device: str) -> Library | OpBuildError:
    """The library, or why there is none: a build that failed once is not tried again for every call."""
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
        raise OpBuildError(f'slope has no native code for device {str(device)!r}; pass backend="reference"')
    found = _library(device.type)
    if isinstance(found, Library):
        return found
    if backend == "auto" and device.type == "cpu":
        _report_reference(str(found))
        return None
    raise OpBuildError(
        f'slope: {found}\n  Remedy without a compiler: backend="reference" (the same bits, slower)'
    )


@functools.lru_cache(maxsize=1)
def _report_reference(reason: str) -> None:
    logger.warning("slope on the CPU runs the plain torch code (the same bits, slower): %s", reason)
