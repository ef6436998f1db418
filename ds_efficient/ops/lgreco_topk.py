"""The k largest entries by magnitude: selection into a payload, and their sum into a tensor.

The selection is exact: of equal magnitudes the lowest indices, NaN as infinity, on every device, compiled or
not. The payload is defined in ``csrc/lgreco/topk_common.h``; the readable form is
`ds_efficient.ops.lgreco_topk_reference`. On CUDA nothing waits for the device.

Each function is also an operator, ``torch.ops.ds_efficient.lgreco_select_`` and ``lgreco_scatter_``, with a
fake implementation. ``backend`` of each: ``"auto"`` (compiled code; on the CPU plain torch where no compiler
is found, which is logged once), ``"native"`` (compiled code or an error), ``"reference"`` (plain torch).
Tensors of 2^31 elements or more are always plain torch's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import lgreco_topk_reference as reference
from ds_efficient.ops.lgreco_quantize import (
    BACKENDS,
    DTYPES,
    check_feedback,
    check_tensor,
    payload_tensor,
)
from ds_efficient.ops.lgreco_quantize_reference import Feedback
from ds_efficient.ops.lgreco_topk_native import CudaLibrary, Library
from ds_efficient.ops.lgreco_topk_reference import INT32_LIMIT, index_dtype
from ds_efficient.ops.native import is_plain
from ds_efficient.ops.registration import define_operators

__all__ = ["BACKENDS", "DTYPES", "payload_bytes", "scatter_", "select"]

_ALIGNMENT = 4


def payload_bytes(count: int, k: int, dtype: torch.dtype) -> int:
    """Bytes of a payload of the k largest of ``count`` elements whose values are sent in ``dtype``."""
    return k * (index_dtype(count).itemsize + dtype.itemsize)


def select(
    x: Tensor,
    k: int,
    *,
    error: Tensor | None = None,
    unscale: float = 1.0,
    new_error: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Payload of the k largest entries of ``x``; with ``new_error``, of ``x`` with the error fed back.

    Args:
        x: float32, bfloat16 or float16, any shape and strides; elements count in row-major order.
        k: entries, from 0 to the number of elements.
        error: float32, contiguous, the shape of ``x``; what earlier steps have lost, by default nothing.
        unscale: factor of ``x``, for example 1 / loss scale; rounded to float32.
        new_error: float32, contiguous, the shape of ``x``, may be ``error``: the selection is from
            ``unscale * x + error`` (one rounding), values are float32, and what is not selected is written
            here, with zeros in place of what is. ``error`` and ``unscale`` need it.
        out: uint8, contiguous, of the payload's size, to write it to; fastest at a multiple of 4 bytes.
        backend: see the module.

    Returns:
        uint8: k indices ascending (int32; int64 from 2^31 elements on), then k values in the dtype of ``x``,
        or float32 with ``new_error``.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    check_tensor("x", x, backend)
    check_feedback(x, error, unscale, new_error)
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= x.numel():
        raise UserError(f"k={k} is out of range; allowed: integers from 0 to {x.numel()}, all elements")
    sent = x.dtype if new_error is None else torch.float32
    out = payload_tensor(out, payload_bytes(x.numel(), k, sent), x.device)
    x = x.detach()
    run = _select if is_plain(x) and not x.is_meta else torch.ops.ds_efficient.lgreco_select_
    run(x, error, out, new_error, k, unscale, backend)
    return out


def scatter_(
    out: Tensor,
    payload: Tensor,
    k: int,
    sent: torch.dtype,
    *,
    weight: float = 1.0,
    accumulate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Write ``weight`` times the values of a payload over their elements of ``out``, or add them.

    Args:
        out: contiguous float32, bfloat16 or float16; as many elements as were selected from. Elements that
            are not in the payload stay as they are.
        payload: result of `select`, any alignment.
        k, sent: entries and the dtype of the values.
        weight: factor, for example 1 / ranks; rounded to float32.
        accumulate: add to what is there, with one rounding in float32.
        backend: see the module.

    Returns:
        ``out``.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    check_tensor("out", out, backend)
    if sent not in DTYPES:
        raise UserError(f"sent={sent} is not known; allowed: {', '.join(map(str, DTYPES))}")
    size = payload_bytes(out.numel(), k, sent)
    if not out.is_contiguous():
        raise UserError(f"out has strides {out.stride()}; expected a contiguous tensor")
    if payload.dtype != torch.uint8 or payload.shape != (size,) or payload.device != out.device:
        raise UserError(
            f"payload is {payload.dtype} of shape {tuple(payload.shape)} on {payload.device}; expected "
            f"torch.uint8 of shape ({size},) on {out.device}: {k} of {out.numel()} elements in {sent}"
        )
    if not math.isfinite(weight):
        raise UserError(f"weight={weight} is not a finite number")
    target = out.detach()
    plain = is_plain(target) and not target.is_meta
    run = _scatter if plain else torch.ops.ds_efficient.lgreco_scatter_
    run(target, payload, k, sent, weight, accumulate, backend)
    return out


def _library(device: torch.device, count: int, backend: str) -> Library | None:
    kind = CudaLibrary if device.type == "cuda" else Library
    return kind.for_device(device, backend if count < INT32_LIMIT else "reference")


def _select(
    x: Tensor,
    error: Tensor | None,
    out: Tensor,
    new_error: Tensor | None,
    k: int,
    unscale: float,
    backend: str,
) -> None:
    library = _library(x.device, x.numel(), backend)
    flat, feedback = x.reshape(-1), Feedback(error, new_error, unscale)
    if not k:
        if new_error is not None and x.numel():
            new_error.view(-1).copy_(reference.corrected(flat, feedback))
        return
    if library is None:
        reference.select(flat, k, feedback, out)
        return
    payload = out if out.data_ptr() % _ALIGNMENT == 0 else torch.empty_like(out)
    library.select(flat.contiguous(), k, feedback, payload)
    if payload is not out:
        out.copy_(payload)


def _scatter(
    out: Tensor,
    payload: Tensor,
    k: int,
    sent: torch.dtype,
    weight: float,
    accumulate: bool,
    backend: str,
) -> None:
    library = _library(out.device, out.numel(), backend)
    if not k:
        return
    if library is None:
        reference.scatter(payload, out.view(-1), k, sent, weight, accumulate)
        return
    payload = payload.contiguous()
    if payload.data_ptr() % _ALIGNMENT:
        payload = payload.clone()
    library.scatter(payload, out, k, sent, weight, accumulate)


def _fake(*_: object) -> None:
    return None


OPERATORS = define_operators(
    (
        "lgreco_select_(Tensor x, Tensor? error, Tensor(a!) out, Tensor(b!)? new_error, int k, "
        "float unscale, str backend) -> ()",
        _select,
        _fake,
    ),
    (
        "lgreco_scatter_(Tensor(a!) out, Tensor payload, int k, ScalarType sent, float weight, "
        "bool accumulate, str backend) -> ()",
        _scatter,
        _fake,
    ),
)
