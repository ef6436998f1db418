"""Bucketed stochastic quantisation of gradients: quantise + pack, and unpack + dequantise + accumulate.

Rounding is a pure function of a key and the element's index, so that a payload has the same bits on the CPU
and on CUDA, compiled or not. The format and its treatment of numbers that are not finite are defined in
``csrc/lgreco/quantize_common.h``; the readable form is `ds_efficient.ops.lgreco_quantize_reference`. Source:
QSGD, arXiv 1610.02132.

Each function is also an operator, ``torch.ops.ds_efficient.lgreco_quantize`` and ``lgreco_dequantize_``, with
a fake implementation. ``backend`` of each: ``"auto"`` (compiled code; on the CPU plain torch where no
compiler is found, which is logged once), ``"native"`` (compiled code or an error), ``"reference"`` (plain
torch).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_quantize_reference as reference
from ds_efficient.ops.lgreco_quantize_native import Library
from ds_efficient.ops.lgreco_quantize_reference import GROUP, MOST_BUCKET, payload_bytes
from ds_efficient.ops.native import is_plain

__all__ = [
    "BACKENDS",
    "DTYPES",
    "MAX_BITS",
    "MIN_BITS",
    "MOST_BUCKET",
    "check_setting",
    "dequantize_",
    "payload_bytes",
    "quantize",
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


def quantize(x: Tensor, key: Key | int, bits: int, bucket: int, *, backend: str = "auto") -> Tensor:
    """Payload that stands for ``x``.

    Args:
        x: float32, bfloat16 or float16, any shape and strides; elements count in row-major order.
        key: `Key` or 64-bit integer; ranks fold their number into it, so that their errors are independent.
        bits: of a code, 2 to 8.
        bucket: elements that share a scale, a multiple of 8 up to 1024.
        backend: see the module.

    Returns:
        (payload_bytes(x.numel(), bits, bucket),) uint8 on the device of ``x``; empty for an empty ``x``.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    check_setting(bits, bucket)
    _check_tensor("x", x, backend)
    number = keyed_random.signed_key(key)
    x = x.detach()
    run = _quantize if is_plain(x) and not x.is_meta else torch.ops.ds_efficient.lgreco_quantize
    return run(x, number, bits, bucket, backend)


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
    """Write ``weight`` times the values of a payload over ``out``, or add them to it; one rounding each.

    Args:
        out: contiguous float32, bfloat16 or float16; as many elements as were quantised.
        payload: result of `quantize` with the same ``bits`` and ``bucket``, any alignment.
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
    _check_tensor("out", out, backend)
    size = payload_bytes(out.numel(), bits, bucket)
    if not out.is_contiguous():
        raise UserError(f"out has strides {out.stride()}; expected a contiguous tensor")
    if payload.dtype != torch.uint8 or payload.shape != (size,) or payload.device != out.device:
        raise UserError(
            f"payload is {payload.dtype} of shape {tuple(payload.shape)} on {payload.device}; expected "
            f"torch.uint8 of shape ({size},) on {out.device} for {out.numel()} elements, bits={bits}, "
            f"bucket={bucket}"
        )
    if not math.isfinite(weight):
        raise UserError(f"weight={weight} is not a finite number")
    target = out.detach()
    plain = is_plain(target) and not target.is_meta
    run = _dequantize if plain else torch.ops.ds_efficient.lgreco_dequantize_
    run(target, payload, bits, bucket, weight, accumulate, backend)
    return out


def _check_tensor(name: str, x: Tensor, backend: str) -> None:
    if x.dtype not in DTYPES:
        raise UserError(f"{name} is {x.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")


def _quantize(x: Tensor, key: int, bits: int, bucket: int, backend: str) -> Tensor:
    library = Library.for_device(x.device, backend)
    flat = x.reshape(-1)
    if not flat.numel():
        return _quantize_fake(x, key, bits, bucket, backend)
    if library is None:
        return reference.quantize(flat, key & _UNSIGNED, bits, bucket)
    out = _quantize_fake(x, key, bits, bucket, backend)
    return library.quantize(flat.contiguous(), key & _UNSIGNED, bits, bucket, out)


def _quantize_fake(x: Tensor, key: int, bits: int, bucket: int, backend: str) -> Tensor:
    return x.new_empty(payload_bytes(x.numel(), bits, bucket), dtype=torch.uint8)


def _dequantize(
    out: Tensor, payload: Tensor, bits: int, bucket: int, weight: float, accumulate: bool, backend: str
) -> None:
    library = Library.for_device(out.device, backend)
    if not out.numel():
        return
    payload = payload.contiguous()
    if library is None:
        reference.dequantize(payload, out.view(-1), bits, bucket, weight, accumulate)
        return
    if payload.data_ptr() % _ALIGNMENT:
        payload = payload.clone()
    library.dequantize(payload, out, bits, bucket, weight, accumulate)


def _dequantize_fake(
    out: Tensor, payload: Tensor, bits: int, bucket: int, weight: float, accumulate: bool, backend: str
) -> None:
    return None


def _register() -> torch.library.Library:
    library = torch.library.Library("ds_efficient", "FRAGMENT")
    end = "int bits, int bucket"
    for name, schema, run, fake in (
        ("quantize", f"(Tensor x, int key, {end}, str backend) -> Tensor", _quantize, _quantize_fake),
        (
            "dequantize_",
            f"(Tensor(a!) out, Tensor payload, {end}, float weight, bool accumulate, str backend) -> ()",
            _dequantize,
            _dequantize_fake,
        ),
    ):
        library.define(f"lgreco_{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(f"lgreco_{name}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ds_efficient::lgreco_{name}", fake, lib=library)
    return library


OPERATORS = _register()  # the operators exist as long as this object
