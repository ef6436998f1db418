"""Matrices that MKOR preconditions, the ranks that own them, and where their gradients' elements lie.

A *block* is one gradient matrix with its two factors: a whole layer (with the bias's gradient as last
column), also where tensor parallelism cuts it ("exact"), or one rank's shard of it ("block", which makes the
factors block-diagonal). Each block has one owner among the ranks of its *plane*, the data- and
tensor-parallel ranks of one pipeline stage. The owner alone holds its factors, gathers its averaged gradient,
preconditions it and hands every rank back the elements that it had. So the work and the memory fall with the
number of ranks, and the result is that of one rank, whatever the ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ds_efficient.core.linear_seam import Cut

Place = tuple[int, int]  # (data-parallel rank, tensor-parallel rank)


class Segment(NamedTuple):
    """Elements ``start`` to ``end`` of a flattened piece, which rank ``rank`` holds."""

    rank: int
    start: int
    end: int


@dataclass
class Piece:
    """One tensor of a block's gradient: a shard of the weight or of the bias.

    Attributes:
        parameter: on ranks that have this shard, else None.
        numel: elements of the shard.
        shard: tensor-parallel rank that has it; None: all have the same.
        held: elements that each rank holds after the reduction.
        sources: where the owner takes each element from, without overlap.
    """

    parameter: nn.Parameter | None
    numel: int
    shard: int | None
    held: list[Segment] = field(default_factory=list)
    sources: list[Segment] = field(default_factory=list)

    def locate(self, held: Sequence[Segment], owner: int, places: Sequence[Place]) -> None:
        """Take note of who holds what, and choose the owner's sources: itself, then its own replica.

        Raises:
            RuntimeError: elements that nobody holds.
        """
        self.held = list(held)
        self.sources = []

        def nearness(segment: Segment) -> tuple[bool, bool, int]:
            same = places[segment.rank][0] == places[owner][0]
            return segment.rank != owner, not same, segment.rank

        ordered = sorted(held, key=nearness)
        at = 0
        while at < self.numel:
            found = next((one for one in ordered if one.start <= at < one.end), None)
            if found is None:
                raise RuntimeError(f"element {at} of {self.numel} of a gradient is on no rank")
            self.sources.append(Segment(found.rank, at, found.end))
            at = found.end


@dataclass
class Layer:
    """A linear layer of this rank.

    Attributes:
        name: in the whole model.
        module: the layer.
        full_out, full_in: sizes of the whole layer.
        bias: whether it has a trained bias.
        cut: dimension of the weight that tensor parallelism cuts.
        stride: stacked matrices that are cut one by one.
        sequence_parallel: whether the tensor-parallel ranks have different rows.
        transposed: the weight is stored (in, out).
        compact: what expands a compact weight (`compress` and `dense_weight`), or None.
    """

    name: str
    module: nn.Module
    full_out: int
    full_in: int
    bias: bool
    cut: Cut | None = None
    stride: int = 1
    sequence_parallel: bool = False
    transposed: bool = False
    compact: Any = None

    @property
    def weight(self) -> nn.Parameter:
        """The trained weight of this rank."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight


@dataclass
class Block:
    """One matrix with its two factors.

    Attributes:
        name: of the layer, with the shard's number where it is a part of it.
        layer: that it is of.
        shard: which shard, or None for the whole layer.
        rows, columns: sizes of the weight part; the bias adds one column.
        bias: whether the bias's gradient is the last column.
        weights, biases: pieces of the two gradients, shards in order.
        owner: rank in the plane.
        index: place among all blocks.
    """

    name: str
    layer: Layer
    shard: int | None
    rows: int
    columns: int
    bias: bool
    weights: list[Piece]
    biases: list[Piece]
    owner: int = 0
    index: int = 0

    @property
    def pieces(self) -> list[Piece]:
        """All pieces in the order of exchange."""
        return self.weights + self.biases

    @property
    def as_stored(self) -> bool:
        """Whether the matrix is a view of its one piece, so that what is written to it is in the piece."""
        return len(self.weights) == 1 and not self.layer.transposed and self.layer.compact is None

    @property
    def width(self) -> int:
        """Columns with the bias's."""
        return self.columns + self.bias

    @property
    def numel(self) -> int:
        """Elements that an exchange moves."""
        return sum(piece.numel for piece in self.pieces)


def shard_rows(full: int, shard: int, shards: int, stride: int) -> list[tuple[int, int]]:
    """Return the ranges of outputs that a shard has: one for each of the `stride` stacked matrices."""
    part = full // stride
    height = part // shards
    return [(i * part + shard * height, i * part + (shard + 1) * height) for i in range(stride)]


def make_blocks(
    layers: Sequence[Layer], place: Place, shards: int, mode: Literal["exact", "block"]
) -> list[Block]:
    """Return the blocks of a plane, the same list on each of its ranks but for the parameters.

    Args:
        layers: of this rank; its plane's ranks have the same ones in the same order.
        place: of this rank.
        shards: tensor-parallel ranks.
        mode: "exact" for one block a layer, "block" for one a shard.
    """
    blocks: list[Block] = []
    for layer in layers:
        split = layer.cut is not None and shards > 1
        if not split:
            made = [_block(layer, None, [None], place, shards)]
        elif mode == "exact":
            made = [_block(layer, None, list(range(shards)), place, shards)]
        else:
            made = [_block(layer, shard, [shard], place, shards) for shard in range(shards)]
        blocks += made
    for index, block in enumerate(blocks):
        block.index = index
    return blocks


def _block(layer: Layer, shard: int | None, parts: Sequence[int | None], place: Place, shards: int) -> Block:
    rows, columns, has_bias = layer.full_out, layer.full_in, layer.bias
    if shard is not None:
        rows = rows // shards if layer.cut == "out" else rows
        columns = columns // shards if layer.cut == "in" else columns
        # the bias of a row-parallel layer is not cut: it goes with the first shard
        has_bias = has_bias and (layer.cut == "out" or shard == 0)

    def piece(parameter: Any, part: int | None) -> Piece:
        numel = int(getattr(parameter, "ds_numel", parameter.numel()))
        here = part is None or part == place[1]
        return Piece(parameter if here else None, numel, part)

    bias_parts = parts if layer.cut == "out" else [None]
    return Block(
        name=layer.name if shard is None else f"{layer.name}#{shard}",
        layer=layer,
        shard=shard,
        rows=rows,
        columns=columns,
        bias=has_bias,
        weights=[piece(layer.weight, part) for part in parts],
        biases=[piece(layer.module.bias, part) for part in bias_parts] if has_bias else [],
    )


def cost(rows: int, width: int, sides: Sequence[str]) -> float:
    """Return the multiplications of preconditioning a (rows, width) gradient once."""
    return float(rows) * width * (rows * ("left" in sides) + width * ("right" in sides))


def assign_owners(blocks: Sequence[Block], places: Sequence[Place], sides: Sequence[str]) -> None:
    """Choose each block's owner: the largest block first, to the rank with the least work so far.

    Args:
        blocks: of a plane.
        places: of its ranks.
        sides: factors in use.
    """
    load = [0.0] * len(places)
    work = {block.index: cost(block.rows, block.width, sides) for block in blocks}
    for block in sorted(blocks, key=lambda block: (-work[block.index], block.index)):
        able = [rank for rank, (_, shard) in enumerate(places) if block.shard is None or shard == block.shard]
        block.owner = min(able, key=lambda rank: (load[rank], rank))
        load[block.owner] += work[block.index]


def make_rounds(blocks: Sequence[Block], ranks: int, most: float) -> list[list[Block]]:
    """Cut the blocks into rounds: an owner handles at most `most` elements in each, or one larger block.

    Blocks of one shape come one after another, since those of a round are multiplied together.
    """
    rounds: list[list[Block]] = []
    at, filled = [0] * ranks, [0] * ranks
    for block in sorted(blocks, key=lambda block: (block.rows, block.columns, block.bias, block.index)):
        owner = block.owner
        if filled[owner] and filled[owner] + block.numel > most:
            at[owner], filled[owner] = at[owner] + 1, 0
        filled[owner] += block.numel
        while len(rounds) <= at[owner]:
            rounds.append([])
        rounds[at[owner]].append(block)
    return rounds


def assemble(
    block: Block, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return a block's gradient: (rows, columns), and (rows,) of the bias or None, both contiguous.

    Views of what is given where the block is made of one shard.

    Args:
        block: the block.
        weights, biases: its flat pieces, shards in order.
    """
    parts = [_as_matrix(block, piece, len(weights)) for piece in weights]
    if len(parts) == 1:
        matrix = parts[0].contiguous()
    else:
        matrix = parts[0].new_empty(block.rows, block.columns)
        for shard, part in enumerate(parts):
            for rows, columns, own in _places(block, shard, len(parts)):
                matrix[rows, columns] = part[own]
    return matrix, in_rows(block, biases) if block.bias else None


def in_rows(block: Block, parts: Sequence[Tensor]) -> Tensor:
    """Return the shards of a vector of outputs in the order of the block's rows."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(block.rows)
    for shard, part in enumerate(parts):
        begin = 0
        for first, last in shard_rows(block.rows, shard, len(parts), block.layer.stride):
            whole[first:last] = part[begin : begin + last - first]
            begin += last - first
    return whole


def take_apart(block: Block, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Return the flat pieces of a gradient in the order of `Block.pieces`."""
    count, found = len(block.weights), []
    for shard in range(count):
        parts = [matrix[rows, columns] for rows, columns, _ in _places(block, shard, count)]
        part = parts[0] if len(parts) == 1 else torch.cat(parts)
        if block.layer.compact is not None:
            part = block.layer.compact.compress(part.to(dtype))
        elif block.layer.transposed:
            part = part.t()
        found.append(part.to(dtype).reshape(-1))
    for shard in range(len(block.biases)):
        assert bias is not None
        if len(block.biases) == 1:
            found.append(bias.to(dtype))
        else:
            rows = shard_rows(block.rows, shard, len(block.biases), block.layer.stride)
            found.append(torch.cat([bias[first:last] for first, last in rows]).to(dtype))
    return found


def _as_matrix(block: Block, flat: Tensor, shards: int) -> Tensor:
    """Return a shard's gradient (out, in) from its flat form."""
    rows = block.rows // (shards if block.layer.cut == "out" else 1)
    columns = block.columns // (shards if block.layer.cut == "in" else 1)
    if block.layer.compact is not None:
        dense: Tensor = block.layer.compact.dense_weight(flat.view(rows, -1))
        return dense
    return flat.view(columns, rows).t() if block.layer.transposed else flat.view(rows, columns)


def _places(block: Block, shard: int, shards: int) -> list[tuple[slice, slice, slice]]:
    """Return (rows, columns) of a shard in the block's matrix, and its own rows for each."""
    if shards == 1:
        return [(slice(0, block.rows), slice(0, block.columns), slice(None))]
    if block.layer.cut == "in":
        width = block.columns // shards
        return [(slice(0, block.rows), slice(shard * width, (shard + 1) * width), slice(None))]
    places, begin = [], 0
    for first, last in shard_rows(block.rows, shard, shards, block.layer.stride):
        rows = slice(first, last)
        places.append((rows, slice(0, block.columns), slice(begin, begin + last - first)))
        begin += last - first
    return places
