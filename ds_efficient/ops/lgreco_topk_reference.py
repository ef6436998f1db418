"""The largest entries of a tensor in plain torch: the readable definition, with the bits of C++ and CUDA.

Every bit is defined in ``csrc/lgreco/topk_common.h``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_efficient.ops.lgreco_quantize_reference import Feedback, corrected, fma

VERSION = 1
INT32_LIMIT = 2**31  # elements from which indices have 8 bytes
_SAMPLED_FROM = 1 << 16  # elements from which a sample is worth its cost
_SAMPLES = 1 << 13


def index_dtype(count: int) -> torch.dtype:
    """Of the indices of ``count`` elements."""
    return torch.int32 if count <= INT32_LIMIT else torch.int64


def select(x: Tensor, k: int, feedback: Feedback, payload: Tensor) -> None:
    """Fill ``payload`` with the k >= 1 largest of the flat tensor ``x``, or of it with what is fed back."""
    source = x if feedback.new_error is None else corrected(x, feedback)
    index = largest(source, k)
    parts = (index.to(index_dtype(x.numel())), source[index])
    payload.copy_(torch.cat([part.view(torch.uint8) for part in parts]))
    if feedback.new_error is not None:
        feedback.new_error.view(-1).copy_(source.index_fill(0, index, 0.0))


def scatter(payload: Tensor, out: Tensor, k: int, sent: torch.dtype, weight: float, accumulate: bool) -> None:
    """Write ``weight`` times the values over their elements of the flat tensor ``out``, or add them."""
    split = k * index_dtype(out.numel()).itemsize
    index = numbers(payload[:split], index_dtype(out.numel())).to(torch.int64)
    value = numbers(payload[split:], sent).to(torch.float32)
    factor = torch.full_like(value, weight)
    value = fma(value, factor, out[index].to(torch.float32)) if accumulate else value * factor
    out[index] = value.to(out.dtype)


def numbers(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers, copied where the address does not suit them."""
    if payload.storage_offset() % dtype.itemsize or not payload.is_contiguous():
        payload = payload.clone()
    return payload.view(dtype)


def largest(x: Tensor, k: int) -> Tensor:
    """Ascending indices of the k largest magnitudes of a flat tensor; of equal ones the lowest indices."""
    magnitude = x.abs()
    magnitude = torch.where(torch.isnan(magnitude), torch.inf, magnitude)
    candidates = _candidates(magnitude, k)
    if candidates is not None:
        return candidates[_largest_of(magnitude[candidates], k)]
    return _largest_of(magnitude, k)


def _candidates(magnitude: Tensor, k: int) -> Tensor | None:
    """Ascending indices of a superset of the k largest, or None where a sample does not find a small one."""
    n = magnitude.numel()
    if n < _SAMPLED_FROM or 4 * k > n:
        return None
    sample = magnitude[:: n // _SAMPLES]
    expected = sample.numel() * k / n
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    bound = torch.topk(sample, min(rank, sample.numel())).values[-1]
    found = (magnitude >= bound).nonzero().view(-1)
    return found if found.numel() >= k else None


def _largest_of(magnitude: Tensor, k: int) -> Tensor:
    threshold = torch.topk(magnitude, k, sorted=False).values.amin()
    above = (magnitude > threshold).nonzero().view(-1)
    equal = (magnitude == threshold).nonzero().view(-1)[: k - above.numel()]
    return torch.cat((above, equal)).sort().values
