"""What MKOR's ranks send each other: gradients to their owners and back; for vectors see `mkor.vectors`.

Everything is one ``all_to_all`` at a time, in which each rank sends each other rank just what that one needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_efficient.mkor.blocks import Block, Place, Segment


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
    if start != first or end - start != values.shape[0]:
        values = values[start - first : end - first]
    return values if values.dtype == dtype else values.to(dtype)


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
                if result is not values and result.data_ptr() != values.data_ptr():  # else done in place
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
