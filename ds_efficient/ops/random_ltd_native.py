"""The compiled token dropping; the functions are described in ``csrc/random_ltd/random_ltd_cuda.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ds_efficient.ops.native import INT64, POINTER, NativeLibrary, Signatures
from ds_efficient.ops.random_ltd_reference import VERSION

_KEPT = (POINTER, INT64, INT64, INT64, INT64)
_ROWS = (POINTER, INT64, INT64)


class Library(NativeLibrary):
    """The built functions for one kind of device.

    Tensors are on that device and not empty; ``index`` is contiguous, and so is what follows the first two
    dimensions of the others. Each returns its result, which may be several.
    """

    OP, PREFIX, VERSION = "random_ltd", "ds_efficient_ltd_", VERSION
    SIGNATURES: ClassVar[Signatures] = {
        "sample": (POINTER, INT64, INT64, INT64, INT64, POINTER),
        "gather": (*_KEPT, *_ROWS, *_ROWS),
        "put": (*_KEPT, *_ROWS, *_ROWS),
        "scatter": (*_KEPT, *_ROWS, *_ROWS, *_ROWS),
        "split": (*_KEPT, *_ROWS, *_ROWS, *_ROWS),
    }

    def sample(self, keys: Sequence[int], length: int, out: Tensor) -> Tensor:
        """Fill ``out`` (layers, batch, keep) int64 with sorted choices; returns it."""
        layers, batch, keep = out.shape
        numbers = (ctypes.c_uint64 * layers)(*keys)
        return self.call(
            "sample", out, ctypes.addressof(numbers), layers, batch, length, keep, out.data_ptr()
        )

    def gather(self, x: Tensor, index: Tensor, batch_first: bool, part: Tensor) -> Tensor:
        """Fill ``part`` with the rows of ``x`` at ``index``; returns it."""
        kept = _kept(x, index, batch_first)
        return self.call("gather", part, *kept, *_rows(x, batch_first), *_rows(part, batch_first))

    def put(self, x: Tensor, part: Tensor, index: Tensor, batch_first: bool) -> Tensor:
        """Write ``part`` over the rows of ``x`` at ``index``; returns ``x``."""
        kept = _kept(x, index, batch_first)
        return self.call("put", x, *kept, *_rows(x, batch_first), *_rows(part, batch_first))

    def scatter(
        self, rest: Tensor | None, part: Tensor | None, index: Tensor, batch_first: bool, out: Tensor
    ) -> Tensor:
        """Fill ``out`` with ``part`` at ``index`` and ``rest`` elsewhere, None: zeros; returns it."""
        kept, rows = _kept(out, index, batch_first), _rows(out, batch_first)
        return self.call("scatter", out, *kept, *_rows(rest, batch_first), *_rows(part, batch_first), *rows)

    def split(self, x: Tensor, index: Tensor, batch_first: bool, out: Tensor, part: Tensor) -> None:
        """Fill ``part`` with the rows of ``x`` at ``index`` and ``out`` with ``x``, zeros at ``index``."""
        kept, rows = _kept(x, index, batch_first), _rows(out, batch_first)
        self.call("split", out, *kept, *_rows(x, batch_first), *_rows(part, batch_first), *rows)


def _kept(x: Tensor, index: Tensor, batch_first: bool) -> tuple[int, int, int, int, int]:
    """Index, batch, length, keep, bytes of a row."""
    batch, keep = index.shape
    length = x.shape[1 if batch_first else 0]
    return index.data_ptr(), batch, length, keep, x.nbytes // (batch * length)


def _rows(x: Tensor | None, batch_first: bool) -> tuple[int | None, int, int]:
    """Address, bytes from sample to sample, bytes from position to position."""
    if x is None:
        return None, 0, 0
    size, (first, second) = x.element_size(), x.stride()[:2]
    if not batch_first:
        first, second = second, first
    return x.data_ptr(), size * first, size * second
