"""What MKOR's ranks send each other: rank-1 vectors before an update, gradients to their owners and back.

Everything is one ``all_to_all`` at a time, in which each rank sends each other rank just what that one needs.
Vectors go to the owners of their factors once an update, all layers in one exchange: for each layer the
rank's own mean of the input rows, as `comm_dtype` and scaled to a largest entry of 1, with the number of rows
and the scale in fp32. The owner weighs them by rows in fp32, so that a half type rounds each once. The
gradient of the outputs goes the same way for layers without a bias only: where there is one, its averaged
gradient is that vector, and reaches the owner with the rest of the gradient.

With a statistics rank of r above 1 a packet has r vectors, sums of rows with random signs, and the sums of
those signs in its header, fp32; ranks' sums add up, as their signs are independent. Output gradients then go
this way for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_efficient.mkor.blocks import Block, Place, Segment
from ds_efficient.mkor.sums import LayerSums


def _header(vectors: int) -> int:
    """Return the numbers in a header: rows, scale, and with several vectors the sums of their signs."""
    return 2 + (vectors if vectors > 1 else 0)


class Plane:
    """The data- and tensor-parallel ranks of one pipeline stage.

    Attributes:
        group: process group, None for all ranks.
        rank, size: place in it.
        places: (data-parallel rank, tensor-parallel rank) of each.
        sent: bytes sent so far to other ranks.

    Args:
        coordinates: (pipeline, data, tensor) rank of this process.
        device: of the tensors that are exchanged.
    """

    def __init__(self, coordinates: tuple[int, int, int], device: torch.device) -> None:
        self.device = device
        self.group: Any = None
        self.rank, self.size, self.places = 0, 1, [coordinates[1:]]
        self.sent = 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1:
            return
        own = torch.tensor(coordinates, dtype=torch.int64, device=device)
        every = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(every, own)
        table = [tuple(int(number) for number in one.tolist()) for one in every]
        for stage in sorted({one[0] for one in table}):  # collective: each rank makes every group
            members = [rank for rank, one in enumerate(table) if one[0] == stage]
            group = None if len(members) == world else dist.new_group(members)
            if stage == coordinates[0]:
                self.group, self.size = group, len(members)
                self.rank = members.index(dist.get_rank())
                self.places = [(table[rank][1], table[rank][2]) for rank in members]

    @property
    def place(self) -> Place:
        """Place of this rank."""
        return self.places[self.rank]

    def swap(
        self, parts: Sequence[Sequence[Tensor]], counts: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        """Send each rank its parts; return what each rank sent to this one, flat.

        Args:
            parts: for each rank the flat tensors to send, of `dtype`.
            counts: elements that each rank sends here.
            dtype: of all of them.
        """
        sizes = [sum(part.numel() for part in group) for group in parts]
        flat = [part for group in parts for part in group]
        sending = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self.device)
        if self.size == 1:
            return [sending]
        received = torch.empty(sum(counts), dtype=dtype, device=self.device)
        dist.all_to_all_single(
            received.view(torch.uint8),
            sending.view(torch.uint8),
            [count * dtype.itemsize for count in counts],
            [size * dtype.itemsize for size in sizes],
            group=self.group,
        )
        self.sent += (sum(sizes) - sizes[self.rank]) * dtype.itemsize
        return list(received.split(list(counts)))

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over the plane, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def gather_table(self, own: Tensor) -> list[list[list[int]]]:
        """Return each rank's (n, k) int64 tensor as lists."""
        if self.size == 1:
            return [own.tolist()]
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, group=self.group)
        return [one.tolist() for one in every]


def collect(
    plane: Plane,
    blocks: Sequence[Block],
    local: Mapping[int, tuple[int, Tensor]],
    dtype: torch.dtype,
    *,
    biases_only: bool = False,
) -> dict[int, list[Tensor]]:
    """Bring the averaged gradients of some blocks to their owners.

    Args:
        plane: the ranks.
        blocks: the same on every rank.
        local: this rank's elements by ``id(parameter)``: their start and their values.
        dtype: to send them in.
        biases_only: leave the weights out.

    Returns:
        On an owner the flat pieces of its blocks, by the block's index. One rank alone gets views of its
        gradients.
    """
    chosen = {block.index: block.biases if biases_only else block.pieces for block in blocks}
    if plane.size == 1:
        return {
            index: [_elements(local, piece.parameter, 0, piece.numel, dtype) for piece in pieces]
            for index, pieces in chosen.items()
        }
    parts: list[list[Tensor]] = [[] for _ in range(plane.size)]
    counts = [0] * plane.size
    mine = [block for block in blocks if block.owner == plane.rank]
    for block in blocks:
        for piece in chosen[block.index]:
            for rank, start, end in piece.sources:
                if rank == plane.rank:
                    parts[block.owner].append(_elements(local, piece.parameter, start, end, dtype))
                if block.owner == plane.rank:
                    counts[rank] += end - start
    received = plane.swap(parts, counts, dtype)
    at = [0] * plane.size
    found: dict[int, list[Tensor]] = {}
    for block in mine:
        pieces = found[block.index] = []
        for piece in chosen[block.index]:
            segments = []
            for rank, start, end in piece.sources:
                segments.append(received[rank][at[rank] : at[rank] + end - start])
                at[rank] += end - start
            pieces.append(segments[0] if len(segments) == 1 else torch.cat(segments))
    return found


def _elements(
    local: Mapping[int, tuple[int, Tensor]], parameter: Any, start: int, end: int, dtype: torch.dtype
) -> Tensor:
    first, values = local[id(parameter)]
    return values[start - first : end - first].to(dtype)


def hand_back(
    plane: Plane,
    blocks: Sequence[Block],
    results: Mapping[int, Sequence[Tensor]],
    local: Mapping[int, tuple[int, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Bring preconditioned gradients from the owners to every rank that holds some of their elements.

    Args:
        plane, blocks, local, dtype: as for `collect`; the values in `local` are overwritten.
        results: on an owner the flat pieces of its blocks, by the block's index.
    """
    if plane.size == 1:
        for block in blocks:
            for piece, result in zip(block.pieces, results[block.index], strict=True):
                values = local[id(piece.parameter)][1]
                if result.data_ptr() != values.data_ptr():  # else it was done in place
                    values.copy_(result)
        return
    parts: list[list[Tensor]] = [[] for _ in range(plane.size)]
    counts = [0] * plane.size
    for block in blocks:
        for number, piece in enumerate(block.pieces):
            for rank, start, end in piece.held:
                if block.owner == plane.rank:
                    parts[rank].append(results[block.index][number][start:end])
                if rank == plane.rank:
                    counts[block.owner] += end - start
    received = plane.swap(parts, counts, dtype)
    at = [0] * plane.size
    for block in blocks:
        for piece in block.pieces:
            for rank, start, end in piece.held:
                if rank == plane.rank:
                    new = received[block.owner][at[block.owner] : at[block.owner] + end - start]
                    first, values = local[id(piece.parameter)]
                    values[start - first : end - first].copy_(new)
                    at[block.owner] += end - start


def locate(plane: Plane, blocks: Sequence[Block], local: Mapping[int, tuple[int, Tensor]]) -> None:
    """Find out which rank holds which elements of every piece; collective over the plane."""
    pieces = [(block, piece) for block in blocks for piece in block.pieces]
    own = torch.zeros(len(pieces), 2, dtype=torch.int64)
    for number, (_, piece) in enumerate(pieces):
        if piece.parameter is not None and id(piece.parameter) in local:
            start, values = local[id(piece.parameter)]
            own[number, 0], own[number, 1] = start, start + values.numel()
    table = plane.gather_table(own.to(plane.device))
    for number, (block, piece) in enumerate(pieces):
        held = [Segment(rank, *rows[number]) for rank, rows in enumerate(table) if rows[number][1]]
        piece.locate(held, block.owner, plane.places)


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


def exchange_vectors(
    plane: Plane,
    blocks: Sequence[Block],
    sums: Mapping[str, LayerSums],
    sides: Sequence[str],
    dtype: torch.dtype,
    replicas: int,
    vectors: int = 1,
) -> dict[int, dict[str, list[Tensor]]]:
    """Bring the rank-1 vectors of all blocks to their owners, in one exchange.

    Args:
        plane: the ranks.
        blocks: all of them.
        sums: of this rank's layers, by name.
        sides: factors in use.
        dtype: to send the vectors in.
        replicas: data-parallel ranks, over which output gradients are averaged.
        vectors: r, of each block and side.

    Returns:
        On an owner by block: ``"right"``, the mean input row, and for layers without a bias ``"left"``, the
        output gradient, still with the loss scale; each as its shards. fp32. NaN where no row was seen.
        With several vectors (r, size) each, ``"left"`` for all layers, and ``"ones"``, the (r, 1) that a
        column of ones makes of the inputs.
    """
    # the averaged bias gradient, where there is one, is the output vector, if there is but one
    wanted = [
        (block, side)
        for block in blocks
        for side in sides
        if side == "right" or vectors > 1 or not block.bias
    ]
    packets: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(plane.size)]
    for block, side in wanted:
        for shard in range(vector_shards(block, side)):
            if plane.rank in vector_ranks(block, plane.places, side, shard):
                packets[block.owner].append(sums[block.layer.name].packet(side, dtype))
    sizes = _expected(plane, wanted, vectors)
    even = 4 // dtype.itemsize  # headers are read as fp32, so packets end at multiples of 4 bytes
    parts = [_packed(group, dtype, even) for group in packets]
    counts = [
        4 * _header(vectors) * len(one) + (-(-sum(one) // even) * even) * dtype.itemsize if one else 0
        for one in sizes
    ]
    received = plane.swap(parts, counts, torch.uint8)
    readers = [
        _Reader(data, one, dtype, _header(vectors)) if one else None
        for data, one in zip(received, sizes, strict=True)
    ]
    found: dict[int, dict[str, list[Tensor]]] = {}
    for block, side in wanted:
        if block.owner != plane.rank:
            continue
        shards = []
        for shard in range(vector_shards(block, side)):
            total = heads = None
            for rank in vector_ranks(block, plane.places, side, shard):
                reader = readers[rank]
                assert reader is not None
                head, values = reader.next()
                total = values if total is None else total + values
                heads = head if heads is None else heads + head
            assert total is not None and heads is not None
            count, ones = heads[0], heads[2:, None]
            if vectors == 1:
                shards.append(total / (count if side == "right" else replicas))
                continue
            scale = count.rsqrt() if side == "right" else count.sqrt() / replicas
            shards.append(total.view(vectors, -1) * scale)
            if side == "right":  # every shard of the inputs has the same rows and signs
                found.setdefault(block.index, {})["ones"] = [ones * scale]
        found.setdefault(block.index, {})[side] = shards
    return found


def _expected(plane: Plane, wanted: Sequence[tuple[Block, str]], vectors: int) -> list[list[int]]:
    """Return the lengths of the packets that each rank sends here, in order."""
    sizes: list[list[int]] = [[] for _ in range(plane.size)]
    for block, side in wanted:
        if block.owner == plane.rank:
            shards = vector_shards(block, side)
            length = vectors * (block.columns if side == "right" else block.rows) // shards
            for shard in range(shards):
                for rank in vector_ranks(block, plane.places, side, shard):
                    sizes[rank].append(length)
    return sizes


def _packed(group: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype, even: int) -> list[Tensor]:
    """Return headers and vectors for one rank as bytes."""
    if not group:
        return []
    headers = torch.stack([header for header, _ in group])
    values = torch.cat([values for _, values in group])
    missing = -values.numel() % even
    if missing:
        values = torch.cat([values, values.new_zeros(missing)])
    return [headers.view(torch.uint8).view(-1), values.view(torch.uint8)]


class _Reader:
    """Reads one rank's packets in order."""

    def __init__(self, data: Tensor, sizes: Sequence[int], dtype: torch.dtype, header: int) -> None:
        split = 4 * header * len(sizes)
        self._headers = data[:split].clone().view(torch.float32).view(-1, header)
        values = data[split:].clone().view(dtype).float()
        self._values = values[: sum(sizes)].split(list(sizes))
        self._at = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the header, its first number the weight, and the vectors times their scale, flat."""
        head = self._headers[self._at]
        values = self._values[self._at] * head[1]
        self._at += 1
        return head, values
