"""What one layer saves for its weight gradient: a keyed random projection of its input (arXiv 2201.13195).

The projection S^T X of the forward pass and S^T Y of the backward pass use one S, made twice from one key:

    key = (layer's key, step, micro-batch, data-parallel rank [, rank whose rows they are])

the last under sequence parallelism only. The micro-batch is counted by each layer, since the training loop
need not say it: one counter for passes outside of autograd's backward pass and one for passes inside of it,
which are recomputations. Pipelines run backward passes in the order of the forward ones, so the i-th
recomputation is the i-th forward pass and finds its key; where an order is another one, as with nested
checkpoints, the gradient is still right, because what is saved carries its key with it.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.core.linear_seam import Region
from ds_efficient.errors import UserError
from ds_efficient.ops.rmm import SKETCHES, Partition, partition, project
from ds_efficient.rmm.monitor import measure, squared_norms

_PARTS = 5  # integers of a partition, at the front of a note
_UNSIGNED = (1 << 64) - 1


@dataclass
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


@dataclass
class _Projected:
    """The latest projection of a thread, for layers that read the same input."""

    owner: Sketch
    version: int
    settings: tuple[object, ...]
    kept: tuple[Tensor, ...]
    users: set[int] = field(default_factory=set)
    input: weakref.ref[Tensor] | None = None

    def drop(self, _: object = None) -> None:
        """Let go of the tensors; called when the input is gone."""
        self.kept = ()


class _Latest(threading.local):
    found: _Projected | None = None


_LATEST = _Latest()


@dataclass
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
        self._counted_step = -1
        self._passes = [0, 0]

    def keep(self, x: Tensor, region: Region, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Return the projection of `x`, a note with keys and sizes, and where measuring its rows' norms.

        The projection is a plain tensor; the note is int64 on the CPU, so that reading it waits for nothing.
        An exact gradient keeps the rows themselves.
        """
        micro_batch = self._count_pass()
        rows = x.shape[:-1].numel()
        parts = self.partition(rows, region.shards)
        dtype = dtype or x.dtype
        if parts.exact and not self.clock.measuring:
            self.tally.rows = self.tally.projected = rows
            self.tally.exact_bytes = self.tally.kept_bytes = x.numel() * dtype.itemsize
            return (_flat(x).to(dtype),)
        clock = self.clock
        settings = (
            parts,
            self.kind,
            dtype,
            clock.step,
            clock.rank,
            clock.measuring,
            region.shards,
            region.shard,
        )
        kept = self._shared(x, settings)
        if kept is None:
            kept = self._kept(x, parts, dtype, region, micro_batch)
            self.tally.exact_bytes, self.tally.kept_bytes = x.numel() * dtype.itemsize, kept[0].nbytes
            self._share(x, settings, kept)
        else:
            self.tally.exact_bytes = self.tally.kept_bytes = 0
        self.tally.projections += not parts.exact
        self.tally.rows, self.tally.projected = rows, rows if parts.exact else parts.total
        return kept

    def partition(self, rows: int, shards: int = 1) -> Partition:
        """Return how so many rows are cut into blocks and projected.

        Args:
            rows: of this rank's input.
            shards: ranks that hold as many each, whose projections together have `min_rows`.
        """
        fewest = -(-self.min_rows // shards)
        return partition(rows, self.ratio, block_size=self.block_size, min_rows=fewest)

    def _kept(
        self, x: Tensor, parts: Partition, dtype: torch.dtype, region: Region, micro_batch: int
    ) -> tuple[Tensor, ...]:
        flat = _flat(x).to(dtype)
        key = self.key.fold(self.clock.step, micro_batch, self.clock.rank)
        shards = region.shards
        keys = [int(key)] if shards == 1 else [int(key.fold(shard)) for shard in range(shards)]
        sizes = (parts.rows, parts.block, parts.projected, parts.last_rows, parts.last_projected)
        note = torch.tensor([*sizes, *map(_signed, keys)], dtype=torch.int64, device="cpu")
        projected = flat if parts.exact else project(flat, keys[region.shard], self.kind, parts)
        return (projected, note, squared_norms(flat)) if self.clock.measuring else (projected, note)

    def _count_pass(self) -> int:
        """Return which micro-batch of the step this pass is; see the module."""
        if self._counted_step != self.clock.step:
            self._counted_step, self._passes = self.clock.step, [0, 0]
        inside = int(torch._C._current_graph_task_id() != -1)
        self._passes[inside] += 1
        return self._passes[inside] - 1

    def restart(self) -> None:
        """Count micro-batches from 0 again."""
        self._counted_step = -1

    def _shared(self, x: Tensor, settings: tuple[object, ...]) -> tuple[Tensor, ...] | None:
        """Return what another layer kept of the very same input, once for each layer."""
        found = _LATEST.found
        if found is None or not found.kept or id(self) in found.users or found.input is None:
            return None
        if found.input() is not x or found.version != x._version or found.settings != settings:
            return None
        found.users.add(id(self))
        self.leader = found.owner
        return found.kept

    def _share(self, x: Tensor, settings: tuple[object, ...], kept: tuple[Tensor, ...]) -> None:
        entry = _Projected(self, x._version, settings, kept, {id(self)})
        entry.input = weakref.ref(x, entry.drop)
        _LATEST.found = entry

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
        seen, *rest = gathered
        if not rest:
            return dy.t() @ seen
        numbers = rest[0].tolist()
        parts = Partition(*numbers[:_PARTS])
        keys = [value & _UNSIGNED for value in numbers[_PARTS:]]
        projected = dy
        if not parts.exact:
            pieces = [
                project(rows, key, self.kind, parts)
                for rows, key in zip(dy.split(parts.rows), keys, strict=True)
            ]
            projected = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        found = projected.t() @ seen
        if len(rest) == 2:
            noise = measure(
                rest[1], squared_norms(dy), seen, projected, found, parts, self.kind, shards=len(keys)
            )
            self.noise = noise if self.noise is None else self.noise + noise
        return found


def _flat(x: Tensor) -> Tensor:
    """Return (..., in) as (rows, in), also where there are none."""
    return x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned number."""
    return value - (1 << 64) if value >> 63 else value


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
