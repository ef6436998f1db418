"""Keys of the counter-based random streams.

Every random draw of the package is a pure function of a 64-bit key and an element index
(`ds_efficient.ops.keyed_random`). A key names *what* is drawn (run seed, step, micro-batch, layer, rank,
purpose), so recomputation, pipelines, resuming and another world size all find the same stream, and nothing
ever touches the global random state.

Definition, version 1 (`KEY_VERSION`; a change of it changes every stream). The key is the BLAKE2b hash with
an 8-byte digest, read as a little-endian unsigned integer, personalised with ``b"ds_efficient.k1"``, of the
seed followed by the folded parts in order, each encoded as

- integer: ``b"i"``, its decimal digits in ASCII (``-`` first when negative), a zero byte;
- string: ``b"s"``, the decimal number of its UTF-8 bytes, ``b":"``, these bytes, a zero byte.

The encoding is prefix-free, so different paths never hash the same bytes (``3`` and ``"3"`` differ too), and
depends neither on the platform nor on Python's hash seed. With m keys in one run some two of them agree with
probability about m^2 / 2^65. BLAKE2b: RFC 7693.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from dataclasses import dataclass, field

KEY_VERSION = 1
_PERSON = b"ds_efficient.k%d" % KEY_VERSION


def _encode(part: int | str) -> bytes:
    if type(part) is int:  # the usual case
        return b"i%d\0" % part
    if isinstance(part, str):
        data = part.encode("utf-8")
        return b"s%d:%s\0" % (len(data), data)
    if isinstance(part, bool):
        raise TypeError(f"a key is folded from integers and strings, got the bool {part}")
    try:
        return b"i%d\0" % operator.index(part)
    except TypeError:
        raise TypeError(
            f"a key is folded from integers and strings, got {part!r} of type {type(part).__name__}"
        ) from None


def _encode_all(*parts: int | str) -> bytes:
    return b"".join(map(_encode, parts))


# All layers of a micro-batch fold the same parts. By type, since True equals 1 and is refused.
_encode_again = functools.lru_cache(maxsize=256, typed=True)(_encode_all)


def _hash(*parts: int | str) -> hashlib.blake2b:
    return hashlib.blake2b(_encode_all(*parts), digest_size=8, person=_PERSON)


@dataclass(frozen=True)
class Key:
    """A named random stream.

    ``Key(1234).fold("rmm", step, layer)`` is immutable and cheap; fold what is known first and reuse it. Make
    keys outside functions that ``torch.compile`` traces (it cannot trace the hash) and pass them in.

    Attributes:
        seed: run seed, any integer.
        path: parts folded so far, integers and strings.
        value: the 64-bit key, 0 <= value < 2^64.
    """

    seed: int
    path: tuple[int | str, ...] = ()
    value: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        digest = _hash(self.seed, *self.path).digest()
        object.__setattr__(self, "value", int.from_bytes(digest, "little"))

    def fold(self, *parts: int | str) -> Key:
        """Return the key of the sub-stream named by ``parts``, one after the other.

        Raises:
            TypeError: a part is neither an integer (numpy's included) nor a string.
        """
        return Key(self.seed, (*self.path, *parts))

    def __int__(self) -> int:
        return self.value


class Subkeys:
    """Values of many keys below one: ``Subkeys(key).value(*parts)`` is ``key.fold(*parts).value``.

    What they have in common is hashed once, and no `Key` is made: for draws in every call of a layer.
    """

    __slots__ = ("_hash", "_key")

    def __init__(self, key: Key) -> None:
        self._key = key
        self._hash = _hash(key.seed, *key.path)

    def value(self, *parts: int | str) -> int:
        """Return the 64-bit key.

        Raises:
            TypeError: a part is neither an integer nor a string.
        """
        state = self._hash.copy()
        state.update(_encode_again(*parts))
        return int.from_bytes(state.digest(), "little")

    def __reduce__(self) -> tuple[type[Subkeys], tuple[Key]]:
        """Copy and pickle the key; a hash can be neither copied by the copy module nor pickled."""
        return Subkeys, (self._key,)


def derive_key(
    seed: int,
    *,
    step: int = 0,
    micro_batch: int = 0,
    layer: int | str = 0,
    rank: int = 0,
    stream: str = "",
) -> int:
    """Return the 64-bit key of one draw, 0 <= key < 2^64.

    It equals ``Key(seed).fold(step, micro_batch, layer, rank, stream).value``.

    Args:
        seed: run seed.
        step: optimizer step.
        micro_batch: micro-batch within the step.
        layer: layer index or module name.
        rank: data-parallel rank where ranks must differ; leave 0 where they must agree (tensor-parallel
            ranks).
        stream: purpose of the draw, for example ``"rmm.sketch"``; two purposes never share a stream.

    Raises:
        TypeError: an argument is neither an integer nor a string.
    """
    return Key(seed).fold(step, micro_batch, layer, rank, stream).value
