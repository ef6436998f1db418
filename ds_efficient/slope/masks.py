"""N:M masks of the forward pass: drawn by key, or chosen by magnitude; both packed to bits.

A mask keeps N of every M consecutive inputs of each output. Packed masks: `ds_efficient.ops.slope`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.ops import slope as ops
from ds_efficient.ops.keyed_random import random_bits, sample_k_of_n

_CHUNK = 1 << 22  # groups drawn at a time: about 200 MB of temporaries
_MAX_TABLE = 1 << 16


def random_mask(
    key: Key | int,
    in_features: int,
    n: int,
    m: int,
    *,
    rows: Sequence[tuple[int, int]],
    columns: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw an N:M mask: in each group every choice of N positions is equally likely.

    A group's choice depends only on `key` and the group's place in the full matrix, so the shards of tensor
    parallelism together are the mask of one rank, and every device draws the same. A choice is
    ``floor(word * C / 2^32)`` of the C = C(M, N) choices in lexicographic order, which favours none by more
    than C / 2^32 (2e-9 for 2:4); where C exceeds 65536 it is `sample_k_of_n`.

    Args:
        key: key of this layer's mask.
        in_features: inputs of the full matrix, a multiple of M.
        n, m: pattern.
        rows: ranges (first, end) of the full matrix's outputs; the mask has them one below the other.
        columns: range of inputs, both ends multiples of M; None: all.
        device: where the mask is made.

    Returns:
        Packed mask of (sum of the ranges, width of `columns`).
    """
    groups = in_features // m
    first, end = (0, groups) if columns is None else (columns[0] // m, columns[1] // m)
    parts = []
    for start, stop in _row_chunks(rows, groups):
        kept = _draw(key, start * groups, (stop - start) * groups, n, m, torch.device(device))
        kept = kept.view(stop - start, groups, m)[:, first:end]
        parts.append(ops.pack_mask(kept.reshape(stop - start, (end - first) * m).contiguous()))
    return torch.cat(parts)


def _row_chunks(rows: Sequence[tuple[int, int]], groups: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // max(1, groups))
    for first, end in rows:
        for start in range(first, max(end, first + 1), step):  # an empty range too: its mask has no rows
            yield start, min(start + step, end)


def _draw(key: Key | int, offset: int, count: int, n: int, m: int, device: torch.device) -> Tensor:
    """Return bool (count, m): the groups ``offset ..`` of the full matrix in row-major order."""
    choices = math.comb(m, n)
    if choices > _MAX_TABLE:
        index = sample_k_of_n(key, m, n, batch=count, offset=offset, device=device)
        return torch.zeros(count, m, dtype=torch.bool, device=device).scatter_(1, index, True)
    words = random_bits(key, count, offset=offset, device=device).to(torch.int64) & 0xFFFFFFFF
    return _choices(n, m).to(device)[(words * choices) >> 32]


@functools.lru_cache(maxsize=16)
def _choices(n: int, m: int) -> Tensor:
    """Return bool (C(m, n), m): every choice of n of m, in lexicographic order."""
    index = torch.tensor(list(itertools.combinations(range(m), n)), dtype=torch.int64)
    return torch.zeros(len(index), m, dtype=torch.bool).scatter_(1, index, True)


def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Keep the N largest magnitudes of every M inputs; of equal ones the first.

    Args:
        weight: (out, in), in a multiple of M.

    Returns:
        Packed mask of (out, in).
    """
    parts = []
    for start, stop in _row_chunks([(0, weight.shape[0])], weight.shape[1] // m):
        groups = weight.detach()[start:stop].abs().reshape(-1, m)
        index = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
        kept = torch.zeros(groups.shape, dtype=torch.bool, device=weight.device).scatter_(1, index, True)
        parts.append(ops.pack_mask(kept.view(stop - start, weight.shape[1])))
    return torch.cat(parts)
