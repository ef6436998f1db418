"""Bucketed stochastic quantisation in plain torch: the readable definition, with the bits of C++ and CUDA.

Every bit is defined in ``csrc/lgreco/quantize_common.h``. Source: QSGD, arXiv 1610.02132, in the form
with the smallest element and the range of each bucket.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_efficient.ops import keyed_random_reference as keyed

VERSION = 3
SCALE_BYTES = 8  # (lo, unit) of a bucket in float32
MOST_BUCKET = 1024
GROUP = 8  # codes of a group fill `bits` bytes
_FRACTION_BITS = 16
_OF_BLOCKS = 256  # elements that share 32 Philox blocks
_LEAST_UNIT = 2.0**-100


class Feedback(NamedTuple):
    """What is compressed in place of x where ``new_error`` is a tensor: unscale * x + error.

    All float32 with the shape of x: ``error`` (None: zeros), ``new_error``, which is written and may be it.
    """

    error: Tensor | None = None
    new_error: Tensor | None = None
    unscale: float = 1.0


def payload_bytes(count: int, bits: int, bucket: int) -> int:
    """Bytes of a payload of ``count`` elements."""
    return SCALE_BYTES * -(-count // bucket) + -(-count * bits // 8)


def quantize(x: Tensor, key: int, bits: int, bucket: int) -> Tensor:
    """Payload (payload_bytes,) uint8 of the flat tensor ``x``, not empty."""
    count, most = x.numel(), 2**bits - 1
    buckets = -(-count // bucket)
    wide = x.to(torch.float32)
    wide = torch.cat((wide, wide[-1:].expand(buckets * bucket - count))).view(buckets, bucket)
    lo, span = wide.amin(1), wide.amax(1) - wide.amin(1)
    good = torch.isfinite(wide).all(1) & torch.isfinite(span)
    unit = (span / most).clamp(min=_LEAST_UNIT)
    lo, unit = torch.where(good, lo + 0.0, torch.nan), torch.where(good, unit, torch.nan)
    factor = torch.where(good, 2.0**_FRACTION_BITS / unit, 0.0)
    difference = torch.where(good[:, None], wide - lo[:, None], 0.0)
    scaled = fma(difference, factor[:, None].expand_as(wide), torch.full_like(wide, 0.5))
    code = ((scaled.to(torch.int64) + _halves(key, buckets, bucket, x.device)) >> _FRACTION_BITS).clamp(
        max=most
    )
    code = torch.where(good[:, None], code, 0).flatten()[:count]
    scales = torch.stack((lo, unit), 1)
    return torch.cat((_bytes(scales), _packed(code, bits)))


def _halves(key: int, buckets: int, bucket: int, device: torch.device) -> Tensor:
    """The number below 2^16 that rounds each element, (buckets, bucket) int64."""
    groups = -(-bucket // _OF_BLOCKS)
    words = keyed.words(key, 0, buckets * groups * 128, device)
    halves = torch.stack((words & 0xFFFF, words >> 16), 1).view(buckets, groups, 32, 2, 4)
    return halves.transpose(2, 3).reshape(buckets, groups * _OF_BLOCKS)[:, :bucket]


def corrected(x: Tensor, feedback: Feedback) -> Tensor:
    """What is compressed, float32, flat; one rounding an element."""
    wide = x.reshape(-1).to(torch.float32)
    if feedback.error is None:
        return wide * torch.tensor(feedback.unscale, dtype=torch.float32, device=x.device)
    return fma(wide, torch.full_like(wide, feedback.unscale), feedback.error.reshape(-1))


def values(payload: Tensor, count: int, bits: int, bucket: int) -> Tensor:
    """What a payload stands for, (count,) float32."""
    buckets = -(-count // bucket)
    scales = payload[: SCALE_BYTES * buckets].clone().view(torch.float32).view(buckets, 2)
    code = _unpacked(payload[SCALE_BYTES * buckets :], bits, count)
    lo, unit = scales.repeat_interleave(bucket, 0)[:count].unbind(1)
    return fma(code.to(torch.float32), unit, lo)


def dequantize(
    payloads: Tensor, out: Tensor, bits: int, bucket: int, weight: float, accumulate: bool
) -> Tensor:
    """Write ``weight`` times the sum over the rows over the flat tensor ``out``, or add it; returns it."""
    total = out.to(torch.float32)
    factor = torch.full_like(total, weight)
    for number, payload in enumerate(payloads):
        value = values(payload, out.numel(), bits, bucket)
        total = fma(value, factor, total) if number or accumulate else value * factor
    return out.copy_(total)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c in float32, rounded once; not finite where plain arithmetic is not."""
    plain = a * b + c
    return torch.where(torch.isfinite(plain), keyed._fma(a, b, c), plain)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).flatten()


def _packed(code: Tensor, bits: int) -> Tensor:
    """The codes as one little-endian stream of bits, (ceil(count * bits / 8),) uint8."""
    size = -(-code.numel() * bits // 8)
    stream = ((code[:, None] >> torch.arange(bits, device=code.device)) & 1).flatten()
    stream = torch.cat((stream, stream.new_zeros(8 * size - stream.numel()))).view(size, 8)
    return (stream << torch.arange(8, device=code.device)).sum(1).to(torch.uint8)


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    stream = (packed[:, None].to(torch.int64) >> torch.arange(8, device=packed.device)) & 1
    stream = stream.flatten()[: count * bits].view(count, bits)
    return (stream << torch.arange(bits, device=packed.device)).sum(1)
