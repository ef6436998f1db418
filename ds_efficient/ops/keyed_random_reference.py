"""Keyed random numbers in plain torch: the readable definition, bit-identical to the C++ and CUDA code.

Integers are int64 tensors that hold 32-bit values. The quantile polynomial is written with a fused
multiply-add because the kernels use one; torch has none, so `_fma` gets the correctly rounded
single-precision result from double precision: the product of two floats is exact there, the sum is rounded to
odd, and the conversion to single precision then rounds once (Boldo and Melquiond, "Emulation of FMA and
correctly rounded sums: proved algorithms using rounding to odd", IEEE TC 2008).

Stream definition: ``csrc/common/keyed_random.h``. Source of Philox4x32-10: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STREAM_VERSION = 1

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 1 << 16  # elements at a time: the temporaries then stay in the cache

_MINUS_LOG2 = -float.fromhex("0x1.62e43p-1")
# Coefficients from the highest power down; see the header for what they approximate.
_LOG = tuple(
    float.fromhex(c)
    for c in (
        "0x1.3aafa2p-3 -0x1.5e6fdep-3 0x1.5048b6p-3 -0x1.956702p-3 0x1.0013fap-2 "
        "-0x1.55618ap-2 0x1.ffffd6p-2 -0x1.fffffap-1"
    ).split()
)
_CENTRAL = tuple(
    float.fromhex(c)
    for c in (
        "-0x1.ebbe4p-28 -0x1.a81c78p-27 0x1.4ab87p-21 -0x1.21205ap-19 -0x1.4b369cp-16 0x1.15adc8p-12 "
        "-0x1.12864ep-10 -0x1.17a24ep-7 0x1.5bc936p-2 0x1.2b57eep+1"
    ).split()
)
_TAIL = tuple(
    float.fromhex(c)
    for c in (
        "0x1.9a8402p-15 -0x1.12027ap-12 0x1.1985c4p-11 -0x1.85f974p-11 0x1.3eed2ep-10 -0x1.4ae904p-9 "
        "0x1.0ab856p-8 0x1.6cdcaep+0 0x1.344706p+2"
    ).split()
)


def philox(key: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 counter words in [0, 2^32) under a 64-bit key; four words of the same shape."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        # Products of two 32-bit numbers wrap modulo 2^64 in int64; the masks take the right halves all the
        # same.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(key: int, offset: int, count: int, device: torch.device) -> Tensor:
    """Words ``offset .. offset + count - 1`` of the stream, (count,) int64 in [0, 2^32)."""
    first, last = offset // 4, (offset + count + 3) // 4
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    zero = torch.zeros_like(block)
    word = torch.stack(philox(key, block & _MASK, block >> 32, zero, zero), dim=1).flatten()
    return word[offset - 4 * first :][:count]


def _in_chunks(
    key: int,
    offset: int,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    convert: Callable[[Tensor], Tensor],
) -> Tensor:
    out = torch.empty(count, dtype=dtype, device=device)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        out[start : start + size] = convert(words(key, offset + start, size, device))
    return out


def bits(key: int, offset: int, count: int, device: torch.device) -> Tensor:
    """Words as signed numbers, (count,) int32."""
    return _in_chunks(key, offset, count, torch.int32, device, _as_signed)


def uniform(key: int, offset: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uniform numbers on [0, 1), (count,) of ``dtype`` (float32, bfloat16, float16).

    Multiples of 2^-24, rounded to nearest in 16-bit types, where what would round to 1 becomes the largest
    number below 1.
    """

    def convert(word: Tensor) -> Tensor:
        value = ((word >> 8).to(torch.float32) * 2.0**-24).to(dtype)
        return value.clamp(max=1.0 - torch.finfo(dtype).eps / 2)

    return _in_chunks(key, offset, count, dtype, device, convert)


def normal(key: int, offset: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal numbers, (count,) of ``dtype``; the float32 numbers rounded to nearest."""
    return _in_chunks(key, offset, count, dtype, device, lambda word: normal_from_words(word).to(dtype))


def normal_from_words(word: Tensor) -> Tensor:
    """Standard normal quantile of each word, float32.

    Args:
        word: int64 in [0, 2^32). Read as the signed number s it stands for the probability (s + 1/2) / 2^32 +
            1/2.
    """
    signed = _as_signed(word).to(torch.int64)
    negative = signed < 0
    odd = 2 * torch.where(negative, ~signed, signed) + 1
    y = odd.to(torch.float32) * 2.0**-32  # probability within +-|z|
    tail = (2**32 - odd).to(torch.float32) * 2.0**-32  # 1 - y, from the exact integer
    w = _negative_log(_fma(tail, y, tail))  # -log((1 - y) (1 + y))
    central = _polynomial(_CENTRAL, w - 3.125)
    outer = _polynomial(_TAIL, _sqrt(w.clamp(min=6.25)) - 3.57)
    z = torch.where(w < 6.25, central, outer) * y
    return torch.where(negative, -z, z)


def choice(key: int, first_row: int, batch: int, n: int, k: int, device: torch.device) -> Tensor:
    """The choice of k of n for rows ``first_row .. first_row + batch - 1``, (batch, k) int64, ascending.

    Row r keeps the k elements with the smallest 64-bit rank words (equal words: the smaller index first).
    """
    out = torch.empty(batch, k, dtype=torch.int64, device=device)
    rows_at_once = max(1, (1 << 20) // max(1, n))
    for start in range(0, batch if k else 0, rows_at_once):
        stop = min(batch, start + rows_at_once)
        row = torch.arange(first_row + start, first_row + stop, dtype=torch.int64, device=device)[:, None]
        pair = torch.arange((n + 1) // 2, dtype=torch.int64, device=device)[None, :]
        row, pair = torch.broadcast_tensors(row, pair)
        w0, w1, w2, w3 = philox(key, pair, row & _MASK, row >> 32, torch.ones_like(pair))
        rank = torch.stack(((w0 << 32) | w1, (w2 << 32) | w3), dim=2).flatten(1)[:, :n]
        order = torch.argsort(rank ^ (-(2**63)), dim=1, stable=True)  # the flip makes signed order unsigned
        out[start:stop] = order[:, :k].sort(dim=1).values
    return out


def _as_signed(word: Tensor) -> Tensor:
    return torch.where(word < 2**31, word, word - 2**32).to(torch.int32)


def _fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """The float32 number nearest to a * b + c, rounded once."""
    product = a.to(torch.float64) * b.to(torch.float64)
    addend = c.to(torch.float64) if isinstance(c, Tensor) else torch.full_like(product, c)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)  # total + error is exact
    pattern = total.view(torch.int64)
    outwards = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (pattern & 1 == 0), pattern + outwards, pattern)
    return odd.view(torch.float64).to(torch.float32)


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded float32 square root.

    torch's own float32 root on the CPU is off by one unit for about a sixth of all inputs. A root of a 24-bit
    number is never closer than 2^-51 (relative) to the middle between two such numbers, so that rounding the
    double-precision root gives the right one.
    """
    return torch.sqrt(x.to(torch.float64)).to(torch.float32)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, coefficient)
    return value


def _negative_log(v: Tensor) -> Tensor:
    """-log(v) for float32 v in (2^-32, 1 + 2^-23]."""
    pattern = v.view(torch.int32)
    exponent = (pattern - 0x3F2AAAAB) >> 23  # v = 2^exponent (1 + f) with 1 + f in [2/3, 4/3)
    f = (pattern - exponent * 0x800000).view(torch.float32) - 1.0
    return _fma(f, _polynomial(_LOG, f), exponent.to(torch.float32) * _MINUS_LOG2)
