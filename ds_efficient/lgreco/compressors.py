"""Compressors of one gradient whose payload is gathered: raw, quantised, largest entries.

Each has ``compress(tensor, ...) -> payload``, ``decompress(payload, shape, ...) -> tensor`` and
``nbytes(shape)``. A payload is one flat uint8 tensor of exactly ``nbytes(shape, dtype)`` bytes, the same on
every device for the same input, so that payloads of several tensors share a buffer; ranks gather each
other's and add them up: ``decompress(rows, ..., weight=1 / ranks)`` with the payloads as rows (ranks, bytes)
adds in the order of the rows; one by one with ``out=total, accumulate=True``. Low rank, whose factors are
all-reduced instead, is in `ds_efficient.lgreco.powersgd`; what is lost is fed back by
`ds_efficient.lgreco.feedback`. Source: L-GreCo, arXiv 2210.17357; QSGD, arXiv 1610.02132.

Numbers that are not finite: raw sends them as they are; quantisation makes NaN of their whole bucket; of the
largest entries NaN and infinity are the first. So an overflow is seen after decompression as before it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.ops import lgreco_quantize as quantize
from ds_efficient.ops import lgreco_topk as topk
from ds_efficient.ops.lgreco_topk_reference import index_dtype, numbers

DTYPES = quantize.DTYPES
SMALLEST = 1024  # elements: fewer are sent raw


class Compressor(Protocol):
    """What all compressors of this module have; ``key`` counts only where rounding is random."""

    def compress(self, tensor: Tensor, key: Key | int = 0) -> Tensor:
        """Flat uint8 payload."""

    def decompress(
        self,
        payload: Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        weight: float = 1.0,
        accumulate: bool = False,
    ) -> Tensor:
        """``weight`` times what the payload stands for, written over ``out`` or added to it."""

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the payload."""


def sent_raw(shape: Sequence[int], *, smallest: int = SMALLEST) -> bool:
    """Whether a tensor is left uncompressed: vectors and scalars, and fewer than ``smallest`` elements."""
    return len(shape) <= 1 or math.prod(shape) < smallest


@dataclass(frozen=True)
class Raw:
    """No compression: the payload is the tensor's memory."""

    def compress(self, tensor: Tensor, key: Key | int = 0) -> Tensor:
        """Bytes of ``tensor`` in row-major order; float32, bfloat16 or float16.

        Raises:
            UserError: another dtype.
        """
        check_dtype(tensor.dtype)
        return _as_bytes(tensor.detach()).clone()

    def decompress(
        self,
        payload: Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        weight: float = 1.0,
        accumulate: bool = False,
        sent: torch.dtype | None = None,
    ) -> Tensor:
        """Result in ``dtype`` or in ``out``; ``sent`` is the dtype that was compressed, by default ``dtype``.

        Raises:
            UserError: payload, ``out`` and shape do not go together.
        """
        sent = dtype if sent is None else sent
        rows = _check_payload(payload, self.nbytes(shape, sent))
        out, accumulate = result_tensor(out, shape, dtype, payload.device, accumulate)
        values = [numbers(row, sent).view(out.shape).to(torch.float32) * weight for row in rows]
        return out.copy_(sum(values, out.to(torch.float32)) if accumulate else sum(values[1:], values[0]))

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Elements times their size."""
        return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class QSGD:
    """Quantisation with stochastic rounding: unbiased, so that no error feedback is needed.

    Args:
        bits: of a code, 2 to 8.
        bucket: elements that share a scale (smallest element and unit, float32); a multiple of 8 up to 1024.

    Raises:
        UserError: an argument is out of range.
    """

    bits: int
    bucket: int = 512

    def __post_init__(self) -> None:
        quantize.check_setting(self.bits, self.bucket)

    def compress(
        self,
        tensor: Tensor,
        key: Key | int = 0,
        *,
        error: Tensor | None = None,
        unscale: float = 1.0,
        new_error: Tensor | None = None,
        out: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Payload: 8 bytes a bucket, then the packed codes (``csrc/lgreco/quantize_common.h``).

        Args:
            tensor: float32, bfloat16 or float16, any strides.
            key: of the rounding; fold step, layer and rank into it, so that errors are independent.
            error, unscale, new_error: error feedback in the same pass; see
                `ds_efficient.ops.lgreco_quantize.quantize`.
            out: uint8 of the payload's size, to write it to.
            backend: see `ds_efficient.ops.lgreco_quantize`.

        Raises:
            UserError: an argument does not fit.
            OpBuildError: the compiled code cannot be built.
        """
        return quantize.quantize(
            tensor, key, self.bits, self.bucket, error=error, unscale=unscale, new_error=new_error, out=out,
            backend=backend,
        )  # fmt: skip

    def decompress(
        self,
        payload: Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        weight: float = 1.0,
        accumulate: bool = False,
        backend: str = "auto",
    ) -> Tensor:
        """Result in ``dtype`` or in ``out``; of a payload (ranks, bytes) the sum over its rows, in one pass.

        Raises:
            UserError: payload, ``out`` and shape do not go together.
            OpBuildError: the compiled code cannot be built.
        """
        out, accumulate = result_tensor(out, shape, dtype, payload.device, accumulate)
        return quantize.dequantize_(
            out, payload, self.bits, self.bucket, weight=weight, accumulate=accumulate, backend=backend
        )

    def compress_parts(self, parts: Sequence[Tensor], key: Key | int = 0) -> Tensor:
        """Payload of several tensors as one; see `ds_efficient.ops.lgreco_quantize.quantize_parts`."""
        return quantize.quantize_parts(parts, key, self.bits, self.bucket)

    def decompress_parts_(self, payload: Tensor, parts: Sequence[Tensor], *, weight: float = 1.0) -> None:
        """Write ``weight`` times the sum of payloads (ranks, bytes) over the tensors they stand for."""
        quantize.dequantize_parts_(parts, payload, self.bits, self.bucket, weight=weight)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """ceil(n * bits / 8) + 8 * ceil(n / bucket), whatever the dtype."""
        return quantize.payload_bytes(math.prod(shape), self.bits, self.bucket)


@dataclass(frozen=True)
class TopK:
    """The largest entries by magnitude and their indices; needs error feedback.

    Exact: kept are the k = ceil(density * n) largest; of equal magnitudes the lowest indices, on every
    device. From 65536 elements on, the k-th largest is first bounded from below by a sample, and only what is
    above the bound is searched. That costs time where the sample misleads, and never changes the result.

    Args:
        density: share of the entries, 0 < density <= 1, taken as the decimal number it is printed as.

    Raises:
        UserError: ``density`` is out of range.
    """

    density: float

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not 0 < self.density <= 1:
            raise UserError(f"density={self.density} is out of range; allowed: 0 < density <= 1")

    def kept(self, shape: Sequence[int]) -> int:
        """Entries that are sent, k."""
        return _share_of(self.density, math.prod(shape))

    def compress(
        self,
        tensor: Tensor,
        key: Key | int = 0,
        *,
        error: Tensor | None = None,
        unscale: float = 1.0,
        new_error: Tensor | None = None,
        out: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Payload: k indices ascending (int32; int64 from 2^31 elements on), then k values in the dtype.

        Args:
            tensor: float32, bfloat16 or float16, any strides.
            key: not used.
            error, unscale, new_error: error feedback in the same pass, and float32 values; see
                `ds_efficient.ops.lgreco_topk.select`.
            out: uint8 of the payload's size, to write it to.
            backend: see `ds_efficient.ops.lgreco_topk`.

        Raises:
            UserError: an argument does not fit.
            OpBuildError: the compiled code cannot be built.
        """
        check_dtype(tensor.dtype)
        return topk.select(
            tensor, self.kept(tensor.shape), error=error, unscale=unscale, new_error=new_error, out=out,
            backend=backend,
        )  # fmt: skip

    def decompress(
        self,
        payload: Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        weight: float = 1.0,
        accumulate: bool = False,
        sent: torch.dtype | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Result in ``dtype`` or in ``out``; ``sent`` is the dtype that was compressed, by default ``dtype``.

        Raises:
            UserError: payload, ``out`` and shape do not go together.
        """
        sent = dtype if sent is None else sent
        rows = _check_payload(payload, self.nbytes(shape, sent))
        out, accumulate = result_tensor(out, shape, dtype, payload.device, accumulate)
        if not accumulate:
            out.zero_()
        for row in rows:
            topk.scatter_(out, row, self.kept(shape), sent, weight=weight, accumulate=True, backend=backend)
        return out

    def values(self, payload: Tensor, shape: Sequence[int], sent: torch.dtype) -> Tensor:
        """The values in payloads (ranks, bytes) of tensors of a shape, compressed in the dtype ``sent``."""
        indices = self.kept(shape) * index_dtype(math.prod(shape)).itemsize
        return torch.cat([numbers(row[indices:], sent) for row in payload])

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """k * (size of an index + size of a value)."""
        return topk.payload_bytes(math.prod(shape), self.kept(shape), dtype)


@functools.lru_cache(maxsize=4096)
def _share_of(density: float, count: int) -> int:
    return math.ceil(Fraction(str(density)) * count)


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def check_dtype(dtype: torch.dtype) -> None:
    """UserError where gradients of a dtype are not compressed."""
    if dtype not in DTYPES:
        raise UserError(f"a gradient of {dtype} cannot be compressed; allowed: {', '.join(map(str, DTYPES))}")


def _check_payload(payload: Tensor, size: int) -> Tensor:
    """The payloads as rows."""
    rows = payload if payload.dim() == 2 else payload[None]
    if payload.dtype != torch.uint8 or rows.shape[1:] != (size,) or not len(rows):
        raise UserError(
            f"payload is {payload.dtype} of shape {tuple(payload.shape)}; "
            f"expected torch.uint8 of shape ({size},), or (ranks, {size})"
        )
    return rows


def result_tensor(
    out: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device, accumulate: bool
) -> tuple[Tensor, bool]:
    """The tensor to write, a new one where ``out`` is None, and whether there is something to add to.

    Raises:
        UserError: ``out`` does not fit, or there is none to add to.
    """
    if out is None:
        if accumulate:
            raise UserError("accumulate=True needs out, the tensor to add to")
        check_dtype(dtype)
        return torch.empty(tuple(shape), dtype=dtype, device=device), False
    if tuple(out.shape) != tuple(shape) or not out.is_contiguous():
        raise UserError(
            f"out has shape {tuple(out.shape)}, strides {out.stride()}; expected a contiguous {tuple(shape)}"
        )
    check_dtype(out.dtype)
    return out.detach(), accumulate
