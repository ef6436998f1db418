"""Compiled functions of an op: found or built once for each kind of device, called with raw pointers.

The functions are ``extern "C"``. After their own arguments a CPU function takes the number of threads and
returns 0, 1 for arguments that it has no code for, or 2 when memory runs out; a CUDA function takes the
device and torch's current stream and returns a ``cudaError_t``.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import compile as compiler
from ds_efficient.op_builder.all_ops import find_op

logger = logging.getLogger(__name__)

# Ten times as fast as torch.cuda's functions, where this torch has them.
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

UINT64, INT64, INT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int
UINT32, DOUBLE, POINTER = ctypes.c_uint32, ctypes.c_double, ctypes.c_void_p
_OUT_OF_MEMORY = 2

Signatures = dict[str, tuple[Any, ...]]
_Library = TypeVar("_Library", bound="NativeLibrary")


class NativeLibrary:
    """The built functions of one op for one kind of device; a subclass gives each a method.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Attributes:
        OP: name of the op in `ds_efficient.op_builder.all_ops`.
        PREFIX: what the names of its functions begin with.
        VERSION: what its version function must return.
        SIGNATURES: types of the own arguments of each function, by its name without the prefix.
        REFERENCE: how the plain torch code differs, for messages.

    Raises:
        OpBuildError: the library cannot be built or loaded.
    """

    OP: ClassVar[str]
    PREFIX: ClassVar[str]
    VERSION: ClassVar[int]
    SIGNATURES: ClassVar[Signatures]
    REFERENCE: ClassVar[str] = "the same bits, slower"

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._library = compiler.load(find_op(self.OP, device))
        version = getattr(self._library, f"ds_efficient_{self.OP}_version")()
        assert version == self.VERSION, f"{self.OP}: version {version} built, {self.VERSION} expected"
        where = (INT, POINTER) if self._cuda else (INT,)
        self._functions = {}
        for name, arguments in self.SIGNATURES.items():
            function = getattr(self._library, self.PREFIX + name)
            function.argtypes, function.restype = (*arguments, *where), INT
            self._functions[name] = function
        if self._cuda:
            self._library.ds_efficient_cuda_error.restype = ctypes.c_char_p

    def call(self, name: str, out: Tensor, *arguments: int | float | ctypes.Structure | None) -> Tensor:
        """Call a function on the device of ``out``, on torch's current stream or threads; returns ``out``.

        Raises:
            MemoryError: the host has not enough memory.
            RuntimeError: CUDA reports an error; names it.
        """
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
                raise RuntimeError(f"{self.OP}: {name} on {out.device}: CUDA error {status}: {reason}")
        else:
            status = function(*arguments, torch.get_num_threads())
            if status == _OUT_OF_MEMORY:
                raise MemoryError(f"{self.OP}: {name}: out of memory")
            assert status == 0, f"{self.OP}: {name}: no code for these arguments"
        return out

    @classmethod
    def for_device(cls: type[_Library], device: torch.device, backend: str) -> _Library | None:
        """The library for a device, or None for the plain torch reference.

        ``"auto"`` on the CPU takes the reference when the C++ code cannot be built, and says so once. On CUDA
        nothing stands in for the kernels unasked.

        Raises:
            OpBuildError: ``"native"``, or ``"auto"`` on CUDA, and the library cannot be built; names the
                remedy.
        """
        if backend == "reference":
            return None
        kind = device.type
        if kind not in ("cpu", "cuda"):
            raise OpBuildError(
                f'{cls.OP} has no native code for device {str(device)!r}; pass backend="reference"'
            )
        found = _found.get((cls, kind)) or _build(cls, kind)
        if isinstance(found, cls):
            return found
        if backend == "auto" and kind == "cpu":
            if cls not in _reported:
                _reported.add(cls)
                logger.warning(
                    "%s on the CPU runs the plain torch code (%s): %s", cls.OP, cls.REFERENCE, found
                )
            return None
        raise OpBuildError(
            f'{cls.OP}: {found}\n  Remedy without a compiler: backend="reference" ({cls.REFERENCE})'
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether nobody needs to see an operator, whose dispatch costs ten microseconds in each step."""
    return (
        type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def forget() -> None:
    """Look for every library anew, and report anew what stands in; for tests that change the environment."""
    _found.clear()
    _reported.clear()


_found: dict[tuple[type[NativeLibrary], str], NativeLibrary | OpBuildError] = {}
_reported: set[type[NativeLibrary]] = set()


def _build(cls: type[NativeLibrary], device: str) -> NativeLibrary | OpBuildError:
    """The library, or why there is none: a build that failed once is not tried again for every call."""
    try:
        _found[cls, device] = cls(device)
    except OpBuildError as error:
        _found[cls, device] = error
    return _found[cls, device]
