"""Bucketed stochastic quantisation of gradients: quantise + pack, and unpack + dequantise + accumulate.

Rounding is a pure function of a key and the element's index, so that a payload has the same bits on the CPU
and on CUDA, compiled or not. The format and its treatment of numbers that are not finite are defined in
``csrc/lgreco/quantize_common.h``; the readable form is `ds_efficient.ops.lgreco_quantize_reference`. Source:
QSGD, arXiv 1610.02132.

`quantize` and `dequantize_` are also operators, ``torch.ops.ds_efficient.lgreco_quantize_`` and
``lgreco_dequantize_``, with fake implementations. ``backend`` of each: ``"auto"`` (compiled code; on the CPU
plain torch where no compiler is found, which is logged once), ``"native"`` (compiled code or an error),
``"reference"`` (plain torch).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_quantize_reference as reference
from ds_efficient.ops.lgreco_quantize_native import CpuLibrary, Library
from ds_efficient.ops.lgreco_quantize_reference import GROUP, MOST_BUCKET, payload_bytes
from ds_efficient.ops.native import is_plain
from ds_efficient.ops.registration import define_operators

__all__ = [
    "BACKENDS",
    "DTYPES",
    "MAX_BITS",
    "MIN_BITS",
    "MOST_BUCKET",
    "check_setting",
    "dequantize_",
    "dequantize_parts_",
    "filled_up",
    "payload_bytes",
    "quantize",
    "quantize_parts",
    "whole_buckets",
]

BACKENDS = ("auto", "native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_BITS, MAX_BITS = 2, 8
_UNSIGNED = 2**64 - 1
_ALIGNMENT = 8


def check_setting(bits: int, bucket: int) -> None:
    """Refuse numbers of bits and bucket sizes that do not exist.

    Raises:
        UserError: ``bits`` is not 2 to 8, or ``bucket`` not a multiple of 8 from 8 to 1024.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise UserError(f"bits={bits} is out of range; allowed: integers from {MIN_BITS} to {MAX_BITS}")
    if not isinstance(bucket, int) or bucket % GROUP or not 0 < bucket <= MOST_BUCKET:
        raise UserError(
            f"bucket={bucket} is not supported; allowed: multiples of {GROUP} from {GROUP} to {MOST_BUCKET}"
        )


def quantize(
    x: Tensor,
    key: Key | int,
    bits: int,
    bucket: int,
    *,
    error: Tensor | None = None,
    unscale: float = 1.0,
    new_error: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Payload that stands for ``x``; with ``new_error``, for ``x`` with the error that is fed back.

    Args:
        x: float32, bfloat16 or float16, any shape and strides; elements count in row-major order.
        key: `Key` or 64-bit integer; ranks fold their number into it, so that their errors are independent.
        bits: of a code, 2 to 8.
        bucket: elements that share a scale, a multiple of 8 up to 1024.
        error: float32, contiguous, the shape of ``x``; what earlier steps have lost, by default nothing.
        unscale: factor of ``x``, for example 1 / loss scale; rounded to float32.
        new_error: float32, contiguous, the shape of ``x``, may be ``error``: ``unscale * x + error`` (one
            rounding) is quantised, and what is lost is written here. ``error`` and ``unscale`` need it.
        out: uint8, contiguous, of the payload's size, to write it to; fastest at a multiple of 8 bytes.
        backend: see the module.

    Returns:
        (payload_bytes(x.numel(), bits, bucket),) uint8 on the device of ``x``; empty for an empty ``x``.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    check_setting(bits, bucket)
    check_tensor("x", x, backend)
    check_feedback(x, error, unscale, new_error)
    number = keyed_random.signed_key(key)
    out = payload_tensor(out, payload_bytes(x.numel(), bits, bucket), x.device)
    x = x.detach()
    run = _quantize if is_plain(x) and not x.is_meta else torch.ops.ds_efficient.lgreco_quantize_
    run(x, error, out, new_error, number, bits, bucket, unscale, backend)
    return out


def dequantize_(
    out: Tensor,
    payload: Tensor,
    bits: int,
    bucket: int,
    *,
    weight: float = 1.0,
    accumulate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Write ``weight`` times the values of payloads over ``out``, or add them to it; one rounding each.

    Args:
        out: contiguous float32, bfloat16 or float16; as many elements as were quantised.
        payload: result of `quantize` with the same ``bits`` and ``bucket``, any alignment; or (ranks, bytes),
            a row a rank: their values are added in the order of the rows in one pass, in float32.
        bits, bucket, backend: as in `quantize`.
        weight: factor, for example 1 / ranks; rounded to float32.
        accumulate: add to what is there.

    Returns:
        ``out``.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    check_setting(bits, bucket)
    check_tensor("out", out, backend)
    size = payload_bytes(out.numel(), bits, bucket)
    if not out.is_contiguous():
        raise UserError(f"out has strides {out.stride()}; expected a contiguous tensor")
    rows = payload if payload.dim() == 2 else payload[None]
    expected = f"({size},) or (ranks, {size}) on {out.device} for {out.numel()} elements"
    _check_rows(payload, rows.shape, size, out.device, f"{expected}, bits={bits}, bucket={bucket}", weight)
    target = out.detach()
    plain = is_plain(target) and not target.is_meta
    run = _dequantize if plain else torch.ops.ds_efficient.lgreco_dequantize_
    run(target, rows, bits, bucket, weight, accumulate, backend)
    return out


def quantize_parts(
    parts: Sequence[Tensor], key: Key | int, bits: int, bucket: int, *, backend: str = "auto"
) -> Tensor:
    """Payload of several tensors as one, each filled up to whole buckets by its last element.

    The compiled code of the CPU reads them where they are; elsewhere they are copied together.

    Args:
        parts: one or more, of one dtype on one device, each with an element or more.
        key, bits, bucket, backend: as in `quantize`.

    Returns:
        uint8, as `quantize` of the filled tensors joined together; the sum of their buckets in all.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    library = _parts_library(parts, bits, bucket, backend)
    if library is None:
        filled = [piece for part in parts for piece in filled_up(part.detach().reshape(-1), bucket)]
        return quantize(torch.cat(filled), key, bits, bucket, backend=backend)
    count = sum(whole_buckets(part.numel(), bucket) for part in parts)
    payload = payload_tensor(None, payload_bytes(count, bits, bucket), parts[0].device)
    number = keyed_random.signed_key(key) & _UNSIGNED
    return library.quantize_parts([part.contiguous() for part in parts], number, bits, bucket, payload)


def dequantize_parts_(
    parts: Sequence[Tensor],
    payload: Tensor,
    bits: int,
    bucket: int,
    *,
    weight: float = 1.0,
    backend: str = "auto",
) -> None:
    """Write ``weight`` times the sum of payloads of `quantize_parts` over the tensors they stand for.

    Args:
        parts: the shapes, dtype and order that were quantised; contiguous or not.
        payload: (ranks, bytes), a row a rank, as in `dequantize_`, summed in float32.
        bits, bucket, weight, backend: as in `dequantize_`.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    library = _parts_library(parts, bits, bucket, backend)
    lengths, device = [whole_buckets(part.numel(), bucket) for part in parts], parts[0].device
    size = payload_bytes(sum(lengths), bits, bucket)
    expected = f"(ranks, {size}) on {device} for {sum(lengths)} elements, bits={bits}, bucket={bucket}"
    _check_rows(payload, payload.shape, size, device, expected, weight)
    if library is None:
        mean = torch.empty(sum(lengths), dtype=torch.float32, device=device)
        dequantize_(mean, payload, bits, bucket, weight=weight, backend=backend)
        for part, piece in zip(parts, mean.split(lengths), strict=True):
            part.detach().copy_(piece[: part.numel()].view(part.shape))
        return
    written = [part.detach().contiguous() for part in parts]
    library.dequantize_parts(_aligned_rows(payload), written, bits, bucket, weight)
    for part, own in zip(parts, written, strict=True):
        if own.data_ptr() != part.data_ptr():
            part.detach().copy_(own)


def filled_up(flat: Tensor, bucket: int) -> list[Tensor]:
    """A flat tensor, and what fills it up to whole buckets: its last element."""
    missing = whole_buckets(flat.numel(), bucket) - flat.numel()
    return [flat, flat[-1:].expand(missing)] if missing else [flat]


def whole_buckets(count: int, bucket: int) -> int:
    """Elements of so many, filled up to whole buckets."""
    return -(-count // bucket) * bucket


def _check_rows(
    payload: Tensor, rows: torch.Size, size: int, device: torch.device, expected: str, weight: float
) -> None:
    """UserError where a payload does not fit, or the weight is no finite number."""
    if payload.dtype != torch.uint8 or rows[1:] != (size,) or payload.device != device:
        raise UserError(
            f"payload is {payload.dtype} of shape {tuple(payload.shape)} on {payload.device}; expected "
            f"torch.uint8 of shape {expected}"
        )
    if not rows[0]:
        raise UserError("payload has no rows; expected one or more")
    if not math.isfinite(weight):
        raise UserError(f"weight={weight} is not a finite number")


def _parts_library(parts: Sequence[Tensor], bits: int, bucket: int, backend: str) -> CpuLibrary | None:
    """The library that takes tensors where they are, None where there is none; checks the arguments."""
    check_setting(bits, bucket)
    if not parts or not all(part.numel() for part in parts):
        raise UserError("parts is empty, or one of its tensors is; expected tensors with elements")
    for index, part in enumerate(parts):
        check_tensor(f"parts[{index}]", part, backend)
        if part.dtype != parts[0].dtype or part.device != parts[0].device:
            raise UserError(
                f"parts[{index}] is {part.dtype} on {part.device}; expected that of parts[0], "
                f"{parts[0].dtype} on {parts[0].device}"
            )

    plain = parts[0].device.type == "cpu" and all(is_plain(part) and not part.is_meta for part in parts)
    return CpuLibrary.for_device(parts[0].device, backend) if plain else None


def check_tensor(name: str, x: Tensor, backend: str) -> None:
    """UserError where a gradient or a backend is none that there is code for."""
    if x.dtype not in DTYPES:
        raise UserError(f"{name} is {x.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")


def check_feedback(x: Tensor, error: Tensor | None, unscale: float, new_error: Tensor | None) -> None:
    """UserError where the tensors of the error feedback do not fit ``x``."""
    if new_error is None and (error is not None or unscale != 1.0):
        raise UserError("error and unscale need new_error, the tensor for what is lost")
    if not math.isfinite(unscale):
        raise UserError(f"unscale={unscale} is not a finite number")
    for name, tensor in (("error", error), ("new_error", new_error)):
        if tensor is not None and (
            tensor.dtype != torch.float32
            or tensor.shape != x.shape
            or tensor.device != x.device
            or not tensor.is_contiguous()
        ):
            raise UserError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on "
                f"{tensor.device}; expected contiguous torch.float32 of shape {tuple(x.shape)} on {x.device}"
            )


def payload_tensor(out: Tensor | None, size: int, device: torch.device) -> Tensor:
    """``out`` if it fits a payload of ``size`` bytes, or a new tensor.

    Raises:
        UserError: ``out`` does not fit.
    """
    if out is None:
        return torch.empty(size, dtype=torch.uint8, device=device)
    if out.dtype != torch.uint8 or out.shape != (size,) or out.device != device or not out.is_contiguous():
        raise UserError(
            f"out is {out.dtype} of shape {tuple(out.shape)}, strides {out.stride()}, on {out.device}; "
            f"expected contiguous torch.uint8 of shape ({size},) on {device}"
        )
    return out


def _library(device: torch.device, backend: str) -> Library | None:
    return (Library if device.type == "cuda" else CpuLibrary).for_device(device, backend)


def _quantize(
    x: Tensor,
    error: Tensor | None,
    out: Tensor,
    new_error: Tensor | None,
    key: int,
    bits: int,
    bucket: int,
    unscale: float,
    backend: str,
) -> None:
    library = _library(x.device, backend)
    flat = x.reshape(-1)
    if not flat.numel():
        return
    feedback = reference.Feedback(error, new_error, unscale)
    if library is None:
        wide = flat if new_error is None else reference.corrected(flat, feedback)
        out.copy_(reference.quantize(wide, key & _UNSIGNED, bits, bucket))
        if new_error is not None:
            new_error.view(-1).copy_(wide - reference.values(out, flat.numel(), bits, bucket))
        return
    payload = out if out.data_ptr() % _ALIGNMENT == 0 else torch.empty_like(out)
    library.quantize(flat.contiguous(), feedback, key & _UNSIGNED, bits, bucket, payload)
    if payload is not out:
        out.copy_(payload)


def _dequantize(
    out: Tensor, payloads: Tensor, bits: int, bucket: int, weight: float, accumulate: bool, backend: str
) -> None:
    library = _library(out.device, backend)
    if not out.numel():
        return
    if library is None:
        reference.dequantize(payloads, out.view(-1), bits, bucket, weight, accumulate)
        return
    library.dequantize(_aligned_rows(payloads), out, bits, bucket, weight, accumulate)


def _aligned_rows(payloads: Tensor) -> Tensor:
    """The rows, each adjacent and at a multiple of 8 bytes; copied where they are not."""
    alone = len(payloads) == 1
    if payloads.stride(1) == 1 and payloads.data_ptr() % _ALIGNMENT == 0:
        if alone or payloads.stride(0) % _ALIGNMENT == 0:
            return payloads if not alone else payloads.as_strided(payloads.shape, (_ALIGNMENT, 1))
    rows, size = payloads.shape
    made = payloads.new_empty(rows, -(-size // _ALIGNMENT) * _ALIGNMENT)[:, :size]
    return made.copy_(payloads)


def _fake(*_: object) -> None:
    return None


OPERATORS = define_operators(
    (
        "lgreco_quantize_(Tensor x, Tensor? error, Tensor(a!) out, Tensor(b!)? new_error, int key, "
        "int bits, int bucket, float unscale, str backend) -> ()",
        _quantize,
        _fake,
    ),
    (
        "lgreco_dequantize_(Tensor(a!) out, Tensor payloads, int bits, int bucket, float weight, "
        "bool accumulate, str backend) -> ()",
        _dequantize,
        _fake,
    ),
)
