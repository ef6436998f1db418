"""Rank-1 vectors of an update on their way to the owners of the factors: all blocks in one exchange.

Vectors go to the owners of their factors once an update, all layers in one exchange: for each layer the
rank's own mean of the input rows, as `comm_dtype` and scaled to a largest entry of 1, with the number of rows
and the scale in fp32. The owner weighs them by rows in fp32, so that a half type rounds each once. The
gradient of the outputs goes the same way for layers without a bias only: where there is one, its averaged
gradient is that vector, and reaches the owner with the rest of the gradient.

With a statistics rank of r above 1 a packet has r vectors, sums of rows with random signs, and the sums of
those signs in its header, fp32; ranks' sums add up, as their signs are independent. Output gradients then go
this way for all layers.

Vectors of equal length from the same ranks are handled together, so that the number of launches depends on
the number of distinct sizes, not of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_efficient.mkor.blocks import Block, Place
from ds_efficient.mkor.exchange import Plane
from ds_efficient.mkor.sums import LayerSums, packets


def _header(vectors: int) -> int:
    """Return the numbers in a header: rows, scale, and with several vectors the sums of their signs."""
    return 2 + (vectors if vectors > 1 else 0)


def vector_ranks(block: Block, places: Sequence[Place], side: str, shard: int) -> list[int]:
    """Return the ranks whose sums make one shard of a block's vector.

    Args:
        block: the block.
        places: of the plane's ranks.
        side: "right" for the inputs, "left" for the output gradients.
        shard: of the vector, where the block's is made of several; 0 where it is not.
    """
    layer = block.layer
    if layer.cut == ("in" if side == "right" else "out"):
        own = block.shard if block.shard is not None else shard
        return [rank for rank, (_, tensor) in enumerate(places) if tensor == own]
    if layer.sequence_parallel:
        return list(range(len(places)))
    own = places[block.owner][1]  # the same on every tensor-parallel rank
    return [rank for rank, (_, tensor) in enumerate(places) if tensor == own]


def vector_shards(block: Block, side: str) -> int:
    """Return of how many shards a block's vector is made."""
    cut = block.layer.cut == ("in" if side == "right" else "out")
    return len(block.weights) if cut else 1


class Vectors(NamedTuple):
    """Vectors, or shards of some, that are alike in all but the block.

    Attributes:
        side: "right" for the inputs, "left" for the output gradients.
        length: elements of each, r vectors together.
        ranks: whose sums make each.
        members: block and number of the shard of each.
    """

    side: str
    length: int
    ranks: tuple[int, ...]
    members: list[tuple[Block, int]]

    def of(self, owner: int) -> list[tuple[Block, int]]:
        """Return the members that a rank owns."""
        return [member for member in self.members if member[0].owner == owner]


def wanted_vectors(
    plane: Plane, blocks: Sequence[Block], sides: Sequence[str], vectors: int = 1
) -> list[Vectors]:
    """Return what an update takes, in the order of exchange; those that are alike are handled together.

    A vector's shards may lie in several of the results, in any order.

    Args:
        plane: the ranks.
        blocks: all of them, with owners.
        sides: factors in use.
        vectors: r, of each block and side.
    """
    found: dict[tuple[str, int, tuple[int, ...]], list[tuple[Block, int]]] = {}
    for block in blocks:
        for side in sides:
            # the averaged bias gradient, where there is one, is the output vector, if there is but one
            if side == "left" and vectors == 1 and block.bias:
                continue
            shards = vector_shards(block, side)
            length = vectors * (block.columns if side == "right" else block.rows) // shards
            for shard in range(shards):
                ranks = tuple(vector_ranks(block, plane.places, side, shard))
                found.setdefault((side, length, ranks), []).append((block, shard))
    return [Vectors(*key, members) for key, members in found.items()]


def exchange_vectors(
    plane: Plane,
    wanted: Sequence[Vectors],
    sums: Mapping[str, LayerSums],
    dtype: torch.dtype,
    replicas: int,
    vectors: int = 1,
) -> dict[int, dict[str, list[Tensor]]]:
    """Bring the rank-1 vectors of all blocks to their owners, in one exchange.

    Args:
        plane: the ranks.
        wanted: what `wanted_vectors` returned.
        sums: of this rank's layers, by name.
        dtype: to send the vectors in.
        replicas: data-parallel ranks, over which output gradients are averaged.
        vectors: r, of each block and side.

    Returns:
        On an owner by block: ``"right"``, the mean input row, and for layers without a bias ``"left"``, the
        output gradient, still with the loss scale; each as its shards. fp32. NaN where no row was seen.
        With several vectors (r, size) each, ``"left"`` for all layers, and ``"ones"``, the (r, 1) that a
        column of ones makes of the inputs.
    """
    parts: list[list[Tensor]] = []
    even = 4 // dtype.itemsize  # headers are read as fp32, so packets end at multiples of 4 bytes
    for owner in range(plane.size):
        group = []
        for alike in wanted:
            members = alike.of(owner) if plane.rank in alike.ranks else []
            if members:
                layers = [sums[block.layer.name] for block, _ in members]
                group.append(packets(layers, alike.side, dtype))
        parts.append(_packed(group, even))
    mine = [(alike, members) for alike in wanted if (members := alike.of(plane.rank))]
    sizes = [
        [(len(members), alike.length) for alike, members in mine if rank in alike.ranks]
        for rank in range(plane.size)
    ]
    received = plane.swap(parts, [_bytes(one, dtype, even, _header(vectors)) for one in sizes], torch.uint8)
    readers = [_Reader(data, one, dtype, _header(vectors)) for data, one in zip(received, sizes, strict=True)]
    shards: dict[int, dict[str, dict[int, Tensor]]] = {}
    for alike, members in mine:
        heads, total = readers[alike.ranks[0]].next()
        for rank in alike.ranks[1:]:
            head, values = readers[rank].next()
            heads, total = heads + head, total + values
        made = _averaged(alike.side, heads, total, replicas, vectors)
        for side, each in made.items():
            for (block, shard), one in zip(members, each.unbind(), strict=True):
                shards.setdefault(block.index, {}).setdefault(side, {})[shard] = one
    # in order: the ranks of a later shard may be those of a vector that was met before
    found = {
        index: {side: [pieces[shard] for shard in sorted(pieces)] for side, pieces in by_side.items()}
        for index, by_side in shards.items()
    }
    for by_side in found.values():  # every shard of the inputs has the same rows and signs
        del by_side.get("ones", [])[1:]
    return found


def _averaged(side: str, heads: Tensor, total: Tensor, replicas: int, vectors: int) -> dict[str, Tensor]:
    """Return what (blocks, length) sums stand for: means over rows or replicas, or several vectors."""
    count = heads[:, :1]
    if vectors == 1:
        return {side: total / (count if side == "right" else replicas)}
    scale = (count.rsqrt() if side == "right" else count.sqrt() / replicas)[..., None]
    made = {side: total.view(len(total), vectors, -1) * scale}
    return made | {"ones": heads[:, 2:, None] * scale} if side == "right" else made


def _bytes(sizes: Sequence[tuple[int, int]], dtype: torch.dtype, even: int, header: int) -> int:
    """Return the bytes of packets, given as numbers of them and lengths."""
    numbers = sum(number * length for number, length in sizes)
    return 4 * header * sum(number for number, _ in sizes) + -(-numbers // even) * even * dtype.itemsize


def _packed(group: Sequence[tuple[Tensor, Tensor]], even: int) -> list[Tensor]:
    """Return headers and vectors for one rank as bytes."""
    if not group:
        return []
    headers = torch.cat([header for header, _ in group])
    values = torch.cat([values for _, values in group])
    missing = -values.numel() % even
    if missing:
        values = torch.cat([values, values.new_zeros(missing)])
    return [headers.view(torch.uint8).view(-1), values.view(torch.uint8)]


class _Reader:
    """Reads one rank's packets in order."""

    def __init__(
        self, data: Tensor, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, header: int
    ) -> None:
        self._sizes = list(sizes)
        if sizes:
            numbers = [number for number, _ in sizes]
            split = 4 * header * sum(numbers)
            self._headers = data[:split].clone().view(torch.float32).view(-1, header).split(numbers)
            lengths = [number * length for number, length in sizes]
            self._values = data[split:].clone().view(dtype).float()[: sum(lengths)].split(lengths)
        self._at = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Return headers, their first number the weight, and the vectors times their scale, (n, length)."""
        head, (number, length) = self._headers[self._at], self._sizes[self._at]
        values = self._values[self._at].view(number, length) * head[:, 1:2]
        self._at += 1
        return head, values
