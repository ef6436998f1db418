"""One step of MKOR on the ranks of a plane: vectors and gradients to the owners, products back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ds_efficient.core.compact_weight import CompactWeight
from ds_efficient.core.deepspeed_gradients import AveragedGradients
from ds_efficient.mkor.bank import FactorBank
from ds_efficient.mkor.blocks import Block, assemble, in_rows, take_apart
from ds_efficient.mkor.exchange import Plane, collect, hand_back, locate
from ds_efficient.mkor.sums import LayerSums
from ds_efficient.mkor.vectors import exchange_vectors, wanted_vectors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Owners:
    """Preconditions the averaged gradients of an engine, each block at its owner.

    Attributes:
        plane: the ranks.
        bank: the factors of the blocks that this rank owns.
        vector_bytes: bytes of rank-1 vectors sent so far to other ranks.

    Args:
        plane, bank: see there.
        blocks: of the plane, with owners.
        rounds: the same blocks, in groups that are exchanged one after the other.
        gradients: of the engine.
        sums: statistics by layer.
        comm_dtype: type in which vectors are sent.
        vectors: that an update takes of each block and side.
    """

    def __init__(
        self,
        plane: Plane,
        blocks: Sequence[Block],
        rounds: Sequence[Sequence[Block]],
        bank: FactorBank,
        gradients: AveragedGradients,
        sums: Mapping[str, LayerSums],
        comm_dtype: torch.dtype = torch.float32,
        vectors: int = 1,
    ) -> None:
        self.plane, self.bank = plane, bank
        self.vector_bytes = 0
        self._blocks, self._rounds = blocks, rounds
        self._gradients, self._sums = gradients, sums
        self._comm_dtype, self._rank = comm_dtype, vectors
        self._dtype: torch.dtype | None = None  # of the gradients
        pieces = [piece for block in blocks for piece in block.pieces]
        self._parameters = {id(one.parameter): one.parameter for one in pieces if one.parameter is not None}
        self._wanted = wanted_vectors(plane, blocks, bank.sides, vectors)
        self._one = torch.ones(1, device=plane.device)  # what a bias adds to the mean input row
        self._mine = [block for block in blocks if block.owner == plane.rank]
        # of the latest step: blocks, and (blocks, 3) as the bank returns them
        self._sums_now: list[tuple[list[str], Tensor]] = []

    @property
    def owned(self) -> int:
        """Number of this rank's blocks."""
        return len(self._mine)

    def _local(self) -> dict[int, tuple[int, Tensor]]:
        """Return this rank's elements of the blocks' gradients, their start and their values."""
        local: dict[int, tuple[int, Tensor]] = dict(self._gradients.slices(self._parameters))
        if not self._gradients.stage:
            for number in self._parameters.keys() - local.keys():  # the loss did not depend on it
                local[number] = (0, torch.zeros_like(self._parameters[number]).detach().view(-1))
        return local

    def _locate(self, local: Mapping[int, tuple[int, Tensor]]) -> torch.dtype:
        """Find out, once, who holds what in which type."""
        locate(self.plane, self._blocks, local)
        own = {values.dtype for _, values in local.values()}
        known = own <= set(_DTYPES) and len(own) == 1
        code = _DTYPES.index(own.pop()) if known else 0 if own else -1
        table = self.plane.gather_table(torch.tensor([[code]], dtype=torch.int64, device=self.plane.device))
        codes = {rows[0][0] for rows in table} - {-1}
        return _DTYPES[codes.pop()] if len(codes) == 1 else torch.float32

    @torch.no_grad()
    def step(self, *, update: bool, loss_scale: float | None, replicas: int) -> None:
        """Precondition the averaged gradients in place; collective over the plane.

        Args:
            update: update the factors first.
            loss_scale: of fp16, else None.
            replicas: data-parallel ranks.
        """
        local = self._local()
        if self._dtype is None:
            self._dtype = self._locate(local)
        if update:
            good = None if loss_scale is None else self._all_finite()
            self._complete_sums()
            before = self.plane.sent
            vectors = exchange_vectors(
                self.plane, self._wanted, self._sums, self._comm_dtype, replicas, self._rank
            )
            self.vector_bytes += self.plane.sent - before
            biases = self._biases(local) if "left" in self.bank.sides and self._rank == 1 else {}
            taken = {
                block.name: self._vectors(
                    block, vectors.get(block.index, {}), biases.get(block.index, []), loss_scale
                )
                for block in self._mine
            }
            self.bank.update(taken, good)
        self._sums_now = []
        for blocks in self._rounds:
            pieces = collect(self.plane, blocks, local, self._dtype)
            results = self._apply([block for block in blocks if block.owner == self.plane.rank], pieces)
            hand_back(self.plane, blocks, results, local, self._dtype)

    def _all_finite(self) -> Tensor:
        """Return 1 where no gradient on any rank of the plane is infinite or NaN, else NaN."""
        slices = self._gradients.slices().values()
        norms = [torch.linalg.vector_norm(one.values, dtype=torch.float32) for one in slices]
        total = torch.stack(norms).sum() if norms else torch.zeros((), device=self.plane.device)
        bad = (~total.isfinite()).float()
        self.plane.all_reduce(bad, op=dist.ReduceOp.MAX)
        return torch.where(bad > 0, torch.full_like(bad, float("nan")), torch.ones_like(bad))

    def _complete_sums(self) -> None:
        """Give layers that saw no row this step zeros to send."""
        for block in self._blocks:
            layer, shards = block.layer, len(block.weights) if block.shard is None else 1
            inputs = block.columns // (shards if layer.cut == "in" else 1)
            outputs = block.rows // (shards if layer.cut == "out" else 1)
            self._sums[layer.name].ensure(inputs, outputs, self.plane.device)

    def _biases(self, local: Mapping[int, tuple[int, Tensor]]) -> dict[int, list[Tensor]]:
        """Bring the gradients of biases to their owners; fp32, converted together."""
        assert self._dtype is not None
        found = collect(self.plane, self._blocks, local, self._dtype, biases_only=True)
        pieces = [piece for parts in found.values() for piece in parts]
        if not pieces:
            return found
        wide = iter(torch.cat(pieces).float().split([piece.shape[0] for piece in pieces]))
        return {index: [next(wide) for _ in parts] for index, parts in found.items()}

    def _vectors(
        self,
        block: Block,
        found: Mapping[str, Sequence[Tensor]],
        biases: Sequence[Tensor],
        loss_scale: float | None,
    ) -> dict[str, list[Tensor]]:
        """Return a block's vectors in pieces, one behind the other (size,); several as (r, size)."""
        vectors: dict[str, list[Tensor]] = {}
        if "right" in self.bank.sides:
            ones = [self._one if self._rank == 1 else found["ones"][0]] if block.bias else []
            vectors["right"] = [*found["right"], *ones]
        if "left" in self.bank.sides:
            known = biases if block.bias and self._rank == 1 else found["left"]
            if self._rank == 1:
                g = in_rows(block, known)
            else:
                g = torch.stack([in_rows(block, list(parts)) for parts in zip(*known, strict=True)])
            vectors["left"] = [g if loss_scale is None else g / loss_scale]
        return vectors

    def _apply(
        self, blocks: Sequence[Block], pieces: Mapping[int, Sequence[Tensor]]
    ) -> dict[int, Sequence[Tensor]]:
        """Return the preconditioned pieces of this rank's blocks of a round."""
        assert self._dtype is not None
        made = {
            block.index: assemble(
                block, pieces[block.index][: len(block.weights)], pieces[block.index][len(block.weights) :]
            )
            for block in blocks
        }
        plain = [block for block in blocks if block.layer.compact is None]
        names = [block.name for block in plain]
        sums = self.bank.precondition(names, [made[block.index] for block in plain])
        self._sums_now.append((names, sums))
        for block in blocks:
            compact = block.layer.compact
            if compact is not None:
                made[block.index], sums = self.bank.precondition_sparse(
                    block.name, made[block.index], partial(_masked, compact)
                )
                self._sums_now.append(([block.name], sums[None]))
        return {
            block.index: pieces[block.index]  # overwritten in place
            if block.as_stored
            else take_apart(block, *made[block.index], self._dtype)
            for block in blocks
        }

    def measure(self, *, applied: bool) -> dict[str, float]:
        """Return what the latest step did, over all ranks; collective over them.

        Args:
            applied: whether the optimizer took the step.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.plane.device)
        _, cosines = self._cosines()
        known = cosines.isfinite()
        bank = self.bank
        counts = (bank.hits, bank.left_out, bank.resets)
        sums = torch.stack(
            [
                known.sum().double(),
                torch.where(known, cosines, 0.0).sum(),
                *(count.sum().double() for count in counts),
                zero + self.plane.sent,
            ]
        )
        entries, errors = bank.largest_entries().double(), bank.truncation_errors().double()
        most = torch.stack([found.amax() if len(found) else zero for found in (entries, errors)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        # read once, after the optimizer's step
        changed, cosine, hits, left_out, resets, sent, largest, error = torch.cat([sums, most]).tolist()
        return {
            "layers_changed": changed,
            "cosine": cosine / changed if changed else 1.0,
            "stabilizer_hits": hits,
            "updates_left_out": left_out,
            "factors_reset": resets,
            "largest_entry": largest,
            "truncation_error": error,
            "bytes_sent": sent,
            "update_applied": float(applied),
        }

    def changed_layers(self) -> dict[str, float]:
        """Return this rank's blocks whose factors have taken an update, with the cosine of G and product."""
        taken = self.bank.taken.view(-1, len(self.bank.sides)).amin(1).tolist() if len(self.bank) else []
        updated = {name for name, count in zip(self.bank, taken, strict=True) if count}
        names, cosines = self._cosines()
        return {
            name: value
            for name, value in zip(names, cosines.tolist(), strict=True)
            if name in updated and math.isfinite(value)
        }

    def _cosines(self) -> tuple[list[str], Tensor]:
        """Return this rank's blocks, and the cosine of G and product of each in the latest step.

        NaN where one of them is 0 or not finite.
        """
        names = [name for some, _ in self._sums_now for name in some]
        none = torch.zeros(0, 3, dtype=torch.float64, device=self.plane.device)
        sums = torch.cat([none, *(found.to(none.device) for _, found in self._sums_now)])
        return names, sums[:, 2] / (sums[:, 0].sqrt() * sums[:, 1].sqrt())

    def report(self) -> dict[str, float]:
        """Return what this rank's factors are like by block and side: largest entry, condition, hits.

        A condition lacks where it is not known or not finite.
        """
        bank = self.bank
        names = [f"{name}/{side}" for name in bank for side in bank.sides]
        columns = {
            "largest": bank.largest_entries().tolist(),
            "condition": bank.conditions(),
            "hits": bank.hits.tolist(),
        }
        return {
            f"{what}/{name}": float(value)
            for what, values in columns.items()
            for name, value in zip(names, values, strict=True)
            if math.isfinite(value)
        }


def _masked(compact: CompactWeight, dense: Tensor) -> Tensor:
    """Return a matrix with zeros outside of a sparse weight's pattern."""
    return compact.dense_weight(compact.compress(dense))
