"""MKOR's rank-1 vectors on their way to the owners: all ranks of a plane in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_efficient.mkor.blocks import Block, Layer, assign_owners, make_blocks
from ds_efficient.mkor.vectors import exchange_vectors, wanted_vectors

HIDDEN = 8
SIDES = ("left", "right")
Shape = tuple[int, int, str]  # outputs, inputs, cut


class SentError(Exception):
    """A rank has said what it sends."""


class Ranks:
    """A plane whose ranks take turns: first each sends, then each receives."""

    def __init__(self, tensor: int, data: int) -> None:
        self.places = [(replica, part) for replica in range(data) for part in range(tensor)]
        self.size, self.rank = len(self.places), 0
        self.sent: list[list[Tensor]] = []

    def swap(
        self, parts: Sequence[Sequence[Tensor]], counts: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        if len(self.sent) < self.size:
            self.sent.append([torch.cat([torch.empty(0, dtype=dtype), *group]) for group in parts])
            raise SentError
        received = [each[self.rank] for each in self.sent]
        assert [len(one) for one in received] == list(counts)
        return received


class Sums:
    """A layer's sums on one rank, of one row."""

    def __init__(self, right: Tensor, left: Tensor) -> None:
        self._vectors = {"right": right, "left": left}

    def vector(self, side: str) -> Tensor:
        return self._vectors[side]

    def count(self, side: str) -> int:
        return 1


def model(layers: int, inner: int, gate: int) -> dict[str, Shape]:
    """Linear layers of transformer layers as megatron-core cuts them."""
    kinds = {
        "qkv": (3 * HIDDEN, HIDDEN, "out"),
        "proj": (HIDDEN, HIDDEN, "in"),
        "fc1": (gate * inner * HIDDEN, HIDDEN, "out"),
        "fc2": (HIDDEN, inner * HIDDEN, "in"),
    }
    return {f"{number}.{name}": shape for number in range(layers) for name, shape in kinds.items()}


def blocks_of(shapes: dict[str, Shape], ranks: Ranks, rank: int, tensor: int) -> list[Block]:
    layers = [
        Layer(name, nn.Linear(1, 1, bias=False), out, inputs, False, cut=cut)  # type: ignore[arg-type]
        for name, (out, inputs, cut) in shapes.items()
    ]
    blocks = make_blocks(layers, ranks.places[rank], tensor, "exact")
    assign_owners(blocks, ranks.places, SIDES)
    return blocks


def with_signs(parts: Tensor, ones: Tensor, vectors: int) -> Tensor:
    return parts[0] if vectors == 1 else torch.cat([parts, ones[:, None]], 1)


@pytest.mark.parametrize("vectors", (1, 2))
@pytest.mark.parametrize(
    ("tensor", "data", "layers", "inner", "gate"), ((2, 1, 3, 2, 2), (2, 2, 1, 2, 1), (4, 1, 3, 4, 1))
)
def test_the_shards_of_a_vector_come_in_order_whoever_owns_what(
    tensor: int, data: int, layers: int, inner: int, gate: int, vectors: int
) -> None:
    """Lengths meet: h inputs of a layer that is not cut there are as many as a part of 4h on 4 ranks."""
    shapes, ranks = model(layers, inner, gate), Ranks(tensor, data)
    draw = torch.Generator().manual_seed(3)
    whole = {
        name: {
            "left": torch.randn(vectors, outputs, generator=draw),
            "right": torch.randn(vectors, inputs, generator=draw),
        }
        for name, (outputs, inputs, _) in shapes.items()
    }
    ones = torch.randn(vectors, generator=draw)

    def run(rank: int) -> tuple[list[Block], dict[int, dict[str, list[Tensor]]]]:
        ranks.rank = rank
        blocks, part, sums = blocks_of(shapes, ranks, rank, tensor), ranks.places[rank][1], {}
        for name, (_, _, cut) in shapes.items():
            right, left = whole[name]["right"], whole[name]["left"]
            right = right.chunk(tensor, 1)[part] if cut == "in" else right
            left = left.chunk(tensor, 1)[part] if cut == "out" else left
            sums[name] = Sums(with_signs(right, ones, vectors), with_signs(left, ones, vectors))
        plane: Any = ranks
        wanted = wanted_vectors(plane, blocks, SIDES, vectors)
        found: Any = exchange_vectors(plane, wanted, sums, torch.float32, data, vectors)  # type: ignore[arg-type]
        return blocks, found

    for rank in range(ranks.size):
        with pytest.raises(SentError):
            run(rank)
    # each replica has sums over one row, all alike: several vectors are divided by the root of the rows
    grown = data**0.5 if vectors > 1 else 1.0
    for rank in range(ranks.size):
        blocks, found = run(rank)
        mine = [block for block in blocks if block.owner == rank]
        assert mine and found.keys() == {block.index for block in mine}
        for block in mine:
            for side in SIDES:
                expected = grown * whole[block.name][side]
                joined = torch.atleast_2d(torch.cat(found[block.index][side], -1))
                torch.testing.assert_close(joined, expected)
            assert len(found[block.index].get("ones", [])) == (vectors > 1)
