"""Keyed random numbers: draws that are a pure function of a key and an index.

Element i depends only on (key, i), never on the shape, the device, the number of ranks or what was drawn
before. So a sub-range is generated alone with ``offset``, recomputation finds the same numbers, and the
global random state is neither read nor written. CPU and CUDA, compiled and plain torch code give the same
bits. Keys come from `ds_efficient.core.keys`.

One key serves one draw: `random_bits`, `uniform` and `normal` of one key are functions of the same words.

Each draw is also an operator, ``torch.ops.ds_efficient.keyed_bits`` (``_uniform``, ``_normal``, ``_choice``),
with a fake implementation, so that FakeTensor and ``torch.compile`` see it. The stream is defined in
``csrc/common/keyed_random.h``, the readable form is `ds_efficient.ops.keyed_random_reference`.

``backend`` of every function: ``"auto"`` (the CUDA kernels; on the CPU the C++ code, or the plain torch code
where no compiler is found, which is logged once), ``"native"`` (compiled code or an error), ``"reference"``
(plain torch code).
"""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.ops import keyed_random_reference as reference
from ds_efficient.ops.keyed_random_native import Library
from ds_efficient.ops.registration import define_operators

BACKENDS = ("auto", "native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHOICES = 2**31 - 1
_MAX_INDEX = 2**63 - 1


def random_bits(
    key: Key | int,
    shape: int | Sequence[int],
    *,
    offset: int = 0,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """32 random bits an element.

    Args:
        key: `Key` or 64-bit integer, 0 <= key < 2^64.
        shape: shape of the result.
        offset: index of the first element, >= 0; elements follow in row-major order.
        device: where the result is made.
        backend: see the module.

    Returns:
        int32 of the given shape; every bit pattern is equally likely. ``x.to(torch.int64) & 0xFFFFFFFF`` is
        the unsigned number.

    Raises:
        UserError: an argument is out of range.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    key, shape, device = _checked(key, shape, offset, device, backend)
    return torch.ops.ds_efficient.keyed_bits(key, shape, offset, device, backend)


def uniform(
    key: Key | int,
    shape: int | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Uniform numbers on [0, 1): multiples of 2^-24.

    bfloat16 and float16 are the float32 numbers rounded to nearest; what would round to 1 becomes the largest
    number below 1. Arguments and errors as in `random_bits`.

    Args:
        dtype: float32, bfloat16 or float16.
    """
    key, shape, device = _checked(key, shape, offset, device, backend)
    return torch.ops.ds_efficient.keyed_uniform(key, shape, offset, _checked_dtype(dtype), device, backend)


def normal(
    key: Key | int,
    shape: int | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Standard normal numbers: the normal quantile of a 32-bit uniform number, relative error below 3e-7.

    The largest magnitude is 6.34 (probability 2.3e-10), the distribution is exactly symmetric, and 0 does not
    occur in float32.
    bfloat16 and float16 are the float32 numbers rounded to nearest. Arguments and errors as in `random_bits`.

    Args:
        dtype: float32, bfloat16 or float16.
    """
    key, shape, device = _checked(key, shape, offset, device, backend)
    return torch.ops.ds_efficient.keyed_normal(key, shape, offset, _checked_dtype(dtype), device, backend)


def sample_k_of_n(
    key: Key | int,
    n: int,
    k: int,
    *,
    batch: int = 1,
    offset: int = 0,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Choose k of n without replacement, for each row independently, without forming a permutation.

    Every element of a row gets a 64-bit rank word, and the k smallest are chosen: all k-subsets are equally
    likely by symmetry, up to the event that two words of a row are equal (probability below n^2 / 2^65; then
    the smaller index counts as smaller). The k-th smallest word is found by selection in O(n), and reading
    the row in order then yields ascending indices. A keyed bijection of {0 .. n-1} (Feistel network with
    cycle walking) would need only O(k) words, but its first k images are no uniform subset; and k is a
    sizeable share of n here, so it would save little.

    Args:
        key: `Key` or 64-bit integer, 0 <= key < 2^64.
        n: number of elements, 0 <= n < 2^31.
        k: how many are chosen, 0 <= k <= n.
        batch: rows, >= 0.
        offset: number of the first row, >= 0: row r depends only on (key, n, k, offset + r), and the
            choices of a smaller k are among those of a larger.
        device: where the result is made.
        backend: see the module.

    Returns:
        (batch, k) int64, each row ascending and distinct.

    Raises:
        UserError: an argument is out of range.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    key, (batch,), device = _checked(key, batch, offset, device, backend)
    if not 0 <= n <= MAX_CHOICES:
        raise UserError(f"n={n} is out of range; allowed: 0 <= n <= {MAX_CHOICES}")
    if not 0 <= k <= n:
        raise UserError(f"k={k} is out of range; allowed: 0 <= k <= n={n}")
    return torch.ops.ds_efficient.keyed_choice(key, n, k, batch, offset, device, backend)


def signed_key(key: Key | int) -> int:
    """The key as the signed 64-bit number that operators take.

    Raises:
        UserError: it is no 64-bit key.
    """
    value = key.value if isinstance(key, Key) else operator.index(key)
    if not 0 <= value < 2**64:
        raise UserError(
            f"key={value} is out of range; allowed: 0 <= key < 2^64, for example from derive_key(...)"
        )
    return value - 2**64 if value >= 2**63 else value


def _checked(
    key: Key | int, shape: int | Sequence[int], offset: int, device: torch.device | str, backend: str
) -> tuple[int, list[int], torch.device]:
    """Validate; return the key as the signed number that an operator takes, sizes, device with index."""
    number = signed_key(key)
    sizes = [shape] if isinstance(shape, int) else list(shape)
    if any(size < 0 for size in sizes):
        raise UserError(f"shape={tuple(sizes)} has a negative size")
    if offset < 0 or offset > _MAX_INDEX - math.prod(sizes):
        raise UserError(f"offset={offset} is out of range; allowed: 0 <= offset and offset + elements < 2^63")
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return number, sizes, place


def _checked_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is not supported; allowed: {', '.join(map(str, DTYPES))}")
    return dtype


_UNSIGNED = 2**64 - 1


def _bits_op(key: int, shape: Sequence[int], offset: int, device: torch.device, backend: str) -> Tensor:
    if device.type == "meta":
        return _bits_fake(key, shape, offset, device, backend)
    library = Library.for_device(device, backend)
    if library is None:
        return reference.bits(key & _UNSIGNED, offset, math.prod(shape), device).view(shape)
    return library.bits(key & _UNSIGNED, offset, torch.empty(shape, dtype=torch.int32, device=device))


def _bits_fake(key: int, shape: Sequence[int], offset: int, device: torch.device, backend: str) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


def _uniform_op(
    key: int, shape: Sequence[int], offset: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Tensor:
    if device.type == "meta":
        return _float_fake(key, shape, offset, dtype, device, backend)
    library = Library.for_device(device, backend)
    if library is None:
        return reference.uniform(key & _UNSIGNED, offset, math.prod(shape), dtype, device).view(shape)
    return library.uniform(key & _UNSIGNED, offset, torch.empty(shape, dtype=dtype, device=device))


def _normal_op(
    key: int, shape: Sequence[int], offset: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Tensor:
    if device.type == "meta":
        return _float_fake(key, shape, offset, dtype, device, backend)
    library = Library.for_device(device, backend)
    if library is None:
        return reference.normal(key & _UNSIGNED, offset, math.prod(shape), dtype, device).view(shape)
    return library.normal(key & _UNSIGNED, offset, torch.empty(shape, dtype=dtype, device=device))


def _float_fake(
    key: int, shape: Sequence[int], offset: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _choice_op(
    key: int, n: int, k: int, batch: int, offset: int, device: torch.device, backend: str
) -> Tensor:
    if device.type == "meta":
        return _choice_fake(key, n, k, batch, offset, device, backend)
    library = Library.for_device(device, backend)
    if library is None:
        return reference.choice(key & _UNSIGNED, offset, batch, n, k, device)
    return library.choice(key & _UNSIGNED, offset, n, torch.empty(batch, k, dtype=torch.int64, device=device))


def _choice_fake(
    key: int, n: int, k: int, batch: int, offset: int, device: torch.device, backend: str
) -> Tensor:
    return torch.empty(batch, k, dtype=torch.int64, device=device)


_FLOATS = "int key, SymInt[] shape, SymInt offset, ScalarType dtype, Device device, str backend"
_LIBRARY = define_operators(
    (
        "keyed_bits(int key, SymInt[] shape, SymInt offset, Device device, str backend) -> Tensor",
        _bits_op,
        _bits_fake,
    ),
    (f"keyed_uniform({_FLOATS}) -> Tensor", _uniform_op, _float_fake),
    (f"keyed_normal({_FLOATS}) -> Tensor", _normal_op, _float_fake),
    (
        "keyed_choice(int key, SymInt n, SymInt k, SymInt batch, SymInt offset, Device device, str backend)"
        " -> Tensor",
        _choice_op,
        _choice_fake,
    ),
)
