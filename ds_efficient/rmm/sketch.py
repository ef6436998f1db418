"""What one layer saves for its weight gradient: a keyed random projection of its input (arXiv 2201.13195).

The projection S^T X of the forward pass and S^T Y of the backward pass use one S, made twice from one key:

    key = (layer's key, step, micro-batch, data-parallel rank [, rank whose rows they are])

the last under sequence parallelism only. The micro-batch is counted by each layer, since the training loop
need not say it (`ds_efficient.core.passes.Calls`). Pipelines run backward passes in the order of the forward
ones, so the i-th recomputation is the i-th forward pass and finds its key; where an order is another one, as
with nested checkpoints, the gradient is still right, because what is saved carries its key with it.

A layer is called a hundred times a step and a GPU waits for none of it, so what is the same in every call is
made once: the hash of the layer's key, and the sizes that follow from the number of rows.
"""

from __future__ import annotations

import functools
import struct
import threading
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_efficient.core.keys import Key, Subkeys
from ds_efficient.core.linear_seam import Region
from ds_efficient.core.passes import Calls
from ds_efficient.errors import UserError
from ds_efficient.ops.rmm import SKETCHES, Partition, partition, project
from ds_efficient.rmm.monitor import measure, squared_norms

_PARTS = 5  # integers of a partition, at the front of a note
_UNSIGNED = (1 << 64) - 1


class _Sizes(NamedTuple):
    """A partition and what is asked of it in every call, which computes it anew."""

    parts: Partition
    exact: bool
    total: int
    numbers: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _sizes(rows: int, ratio: float, block_size: int, min_rows: int) -> _Sizes:
    parts = partition(rows, ratio, block_size=block_size, min_rows=min_rows)
    numbers = parts.rows, parts.block, parts.projected, parts.last_rows, parts.last_projected
    return _Sizes(parts, parts.exact, parts.total, numbers)


@functools.lru_cache(maxsize=4096)
def _read_sizes(*numbers: int) -> _Sizes:
    """Return the sizes with these numbers, which a note has at its front."""
    parts = Partition(*numbers)
    return _Sizes(parts, parts.exact, parts.total, numbers)


@dataclass(slots=True)
class Clock:
    """What the layers of a run have in common.

    Attributes:
        step: optimizer steps done.
        rank: data-parallel rank.
        interval: steps between two measurements of the variance; 0: never.
    """

    step: int = 0
    rank: int = 0
    interval: int = 0

    @property
    def measuring(self) -> bool:
        """Whether the variance is measured in this step."""
        return self.interval > 0 and self.step % self.interval == 0


class _Projected:
    """The latest projection of a thread, for layers that read the same input."""

    __slots__ = ("input", "kept", "owner", "settings", "users", "version")

    def __init__(
        self, owner: Sketch, x: Tensor, settings: tuple[object, ...], kept: tuple[Tensor, ...]
    ) -> None:
        self.owner = owner
        self.version = x._version
        self.settings = settings
        self.kept = held = list(kept)
        self.users = {id(owner)}
        # Nothing here refers back to this object, which would then wait for the garbage collector.
        self.input = weakref.ref(x, lambda _: held.clear())


class _Latest(threading.local):
    found: _Projected | None = None


_LATEST = _Latest()


@dataclass(slots=True)
class Tally:
    """What a layer did with the input of its latest micro-batch, and how often it projected.

    Attributes:
        projections: times that a projection was kept, shared ones included.
        rows, projected: rows of the input and of the projection.
        exact_bytes, kept_bytes: of the input, had it been saved, and of the projection; 0 where another
            layer had saved it already.
    """

    projections: int = 0
    rows: int = 0
    projected: int = 0
    exact_bytes: int = 0
    kept_bytes: int = 0


class Sketch:
    """Weight gradient of one layer from random projections (`ds_efficient.core.weight_gradient`).

    Args:
        key: of the layer.
        ratio: rows of a projection as a share of the rows of the input, > 0 and <= 1.
        kind: ``"gaussian"``, ``"rademacher"``, ``"srht"``, ``"count"`` or ``"rows"``.
        block_size: rows that are projected together; 0: all of them.
        min_rows: fewest rows of a projection.
        clock: of the run.

    Raises:
        UserError: an argument is out of range.

    Attributes:
        tally: what it did.
        noise: sum of `ds_efficient.rmm.monitor.measure` over the micro-batches since it was last set to
            None.
        leader: the sketch whose projection this one used last, or None.
    """

    def __init__(
        self,
        key: Key,
        *,
        ratio: float,
        kind: str = "gaussian",
        block_size: int = 512,
        min_rows: int = 64,
        clock: Clock | None = None,
    ) -> None:
        _check(ratio, kind, block_size, min_rows)
        self.key = key
        self.ratio = ratio
        self.kind = kind
        self.block_size = block_size
        self.min_rows = min_rows
        self.clock = clock or Clock()
        self.tally = Tally()
        self.noise: Tensor | None = None
        self.leader: Sketch | None = None
        self._subkeys = Subkeys(key)
        self._calls = Calls()

    def keep(self, x: Tensor, region: Region, cast: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the projection of `x`, a note with keys and sizes, and where measuring its rows' norms.

        The projection is a plain tensor; the note is int64 on the CPU, so that reading it waits for nothing.
        An exact gradient keeps the rows themselves.
        """
        clock, tally = self.clock, self.tally
        micro_batch = self._calls.count(clock.step)
        used = x if cast is None else cast
        rows = x.shape[0] if x.dim() == 2 else x.shape[:-1].numel()
        shards, measuring = region.shards, clock.measuring
        sizes = _sizes(rows, self.ratio, self.block_size, -(-self.min_rows // shards))
        tally.rows = rows
        if sizes.exact and not measuring:
            tally.projected = rows
            tally.exact_bytes = tally.kept_bytes = used.nbytes
            return (_flat(used.detach()),)
        place = region.shard if shards > 1 else 0
        settings = (sizes, self.kind, used.dtype, clock.step, clock.rank, measuring, shards, place)
        kept = self._shared(x, settings)
        if kept is None:
            kept = self._kept(_flat(used), sizes, self._keys(micro_batch, shards), place, measuring)
            tally.exact_bytes, tally.kept_bytes = used.nbytes, kept[0].nbytes
            _LATEST.found = _Projected(self, x, settings, kept)
        else:
            tally.exact_bytes = tally.kept_bytes = 0
        tally.projections += not sizes.exact
        tally.projected = rows if sizes.exact else sizes.total
        return kept

    def partition(self, rows: int, shards: int = 1) -> Partition:
        """Return how so many rows are cut into blocks and projected.

        Args:
            rows: of this rank's input.
            shards: ranks that hold as many each, whose projections together have `min_rows`.
        """
        return _sizes(rows, self.ratio, self.block_size, -(-self.min_rows // shards)).parts

    def _keys(self, micro_batch: int, shards: int) -> list[int]:
        """Return the key of every rank whose rows are joined."""
        step, rank = self.clock.step, self.clock.rank
        if shards == 1:
            return [self._subkeys.value(step, micro_batch, rank)]
        return [self._subkeys.value(step, micro_batch, rank, shard) for shard in range(shards)]

    def _kept(
        self, flat: Tensor, sizes: _Sizes, keys: list[int], place: int, measuring: bool
    ) -> tuple[Tensor, ...]:
        # Takes less than half the time of torch.tensor; the tensor has the bytes themselves.
        written = struct.pack(f"{_PARTS}q{len(keys)}Q", *sizes.numbers, *keys)
        note = torch.frombuffer(bytearray(written), dtype=torch.int64)
        projected = flat.detach() if sizes.exact else project(flat, keys[place], self.kind, sizes.parts)
        return (projected, note, squared_norms(flat)) if measuring else (projected, note)

    def restart(self) -> None:
        """Count micro-batches from 0 again."""
        self._calls.restart()

    def _shared(self, x: Tensor, settings: tuple[object, ...]) -> tuple[Tensor, ...] | None:
        """Return what another layer kept of the very same input, once for each layer."""
        found = _LATEST.found
        if found is None or found.input() is not x or id(self) in found.users:
            return None
        if found.version != x._version or found.settings != settings:
            return None
        found.users.add(id(self))
        self.leader = found.owner
        return tuple(found.kept)

    def gather(self, kept: tuple[Tensor, ...], region: Region) -> tuple[Tensor, ...]:
        """Return `kept` with the rows of all ranks; the note knows the keys of all of them."""
        if region.shards == 1:
            return kept
        rows, *rest = kept
        seen = region.enter(rows)
        if len(rest) == 2:
            rest[1] = region.enter(rest[1].unsqueeze(1)).squeeze(1)
        return (seen, *rest)

    def gradient(self, dy: Tensor, gathered: tuple[Tensor, ...]) -> Tensor:
        """Return (S^T dY)^T (S^T X), or dY^T X where the rows themselves were kept."""
        seen = gathered[0]
        if len(gathered) == 1:
            return torch.mm(dy.t(), seen)
        numbers = gathered[1].tolist()
        sizes = _read_sizes(*numbers[:_PARTS])
        keys = numbers[_PARTS:]
        projected = dy if sizes.exact else self._projected(dy, keys, sizes.parts)
        found = torch.mm(projected.t(), seen)
        if len(gathered) == 3:
            norms, own = gathered[2], squared_norms(dy)
            noise = measure(norms, own, seen, projected, found, sizes.parts, self.kind, shards=len(keys))
            self.noise = noise if self.noise is None else self.noise + noise
        return found

    def _projected(self, dy: Tensor, keys: list[int], parts: Partition) -> Tensor:
        """Return S^T dY, each rank's rows with its key."""
        if len(keys) == 1:
            return project(dy, keys[0] & _UNSIGNED, self.kind, parts)
        pieces = zip(dy.split(parts.rows), keys, strict=True)
        return torch.cat([project(rows, key & _UNSIGNED, self.kind, parts) for rows, key in pieces])


def _flat(x: Tensor) -> Tensor:
    """Return (..., in) as (rows, in), also where there are none."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _check(ratio: float, kind: str, block_size: int, min_rows: int) -> None:
    """Raise UserError unless the arguments of a sketch are in range."""
    if not 0 < ratio <= 1:
        raise UserError(f"ratio={ratio} is not allowed; allowed: a number > 0 and <= 1, for example 0.125")
    if kind not in SKETCHES:
        raise UserError(f"sketch={kind!r} is not known; allowed: {', '.join(SKETCHES)}")
    if block_size < 0:
        raise UserError(f"block_size={block_size} is negative; allowed: 0 (all rows at once) or more")
    if kind == "srht" and block_size & (block_size - 1):
        raise UserError(f"block_size={block_size} is no power of two, which sketch='srht' needs; or use 0")
    if min_rows < 1:
        raise UserError(f"min_rows={min_rows} is not allowed; allowed: 1 or more")
