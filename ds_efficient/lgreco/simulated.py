"""Ranks simulated in one process: the same reducer, without processes and without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_efficient.lgreco.transport import Handle, Tally


@dataclass
class _Meeting:
    """One collective: what each rank has brought, and what to do once all have."""

    brought: dict[int, Any] = field(default_factory=dict)
    done: bool = False


class SimulatedGroup:
    """The collectives of ranks that take turns in one process.

    Args:
        ranks: number of ranks.

    Attributes:
        transports: one a rank, for `ds_efficient.lgreco.Reducer`.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.transports = [SimulatedTransport(self, rank) for rank in range(ranks)]
        self._meetings: list[_Meeting] = []

    def meet(self, number: int, rank: int, brought: Any, finish: Callable[[list[Any]], None]) -> Handle:
        """Bring a rank's part of its ``number``-th collective; the last one to come runs ``finish``."""
        while len(self._meetings) <= number:
            self._meetings.append(_Meeting())
        meeting = self._meetings[number]
        meeting.brought[rank] = brought
        if len(meeting.brought) == self.ranks:
            finish([meeting.brought[one] for one in range(self.ranks)])
            meeting.brought, meeting.done = {}, True
        return _Waiting(meeting)


_END = object()


class _Waiting:
    def __init__(self, meeting: _Meeting) -> None:
        self._meeting = meeting

    def wait(self) -> None:
        if not self._meeting.done:
            raise RuntimeError("a simulated rank waits for one that has not come; use `reduce_together`")


class SimulatedTransport:
    """One simulated rank."""

    name = "simulated"

    def __init__(self, group: SimulatedGroup, rank: int) -> None:
        self._group, self._number = group, 0
        self.rank, self.ranks = rank, group.ranks
        self.sent = Tally()

    def _meet(self, brought: Any, finish: Callable[[list[Any]], None]) -> Handle:
        self._number += 1
        return self._group.meet(self._number - 1, self.rank, brought, finish)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place.

        Raises:
            RuntimeError: always with more than one rank, which take turns only where gradients are reduced.
        """
        if self.ranks > 1:
            raise RuntimeError("simulated ranks cannot wait inside of an all-reduce; sum the tensors outside")

    def start_all_reduce(self, tensor: Tensor) -> Handle:
        """Sum in place, in the order of the ranks."""
        self.sent.all_reduced(tensor.nbytes, self.ranks)

        def finish(tensors: list[Tensor]) -> None:
            total = tensors[0].clone()
            for one in tensors[1:]:
                total += one
            for one in tensors:
                one.copy_(total)

        return self._meet(tensor, finish)

    def start_all_gather(self, payload: Tensor) -> tuple[Tensor, Handle]:
        """Payloads of all ranks."""
        self.sent.gradients += (self.ranks - 1) * payload.nbytes
        out = payload.new_empty(self.ranks, payload.numel())

        def finish(pairs: list[tuple[Tensor, Tensor]]) -> None:
            whole = torch.stack([one for one, _ in pairs])
            for _, target in pairs:
                target.copy_(whole)

        return out, self._meet((payload, out), finish)

    def start_all_to_all(
        self, payload: Tensor, sizes: Sequence[int], received: Sequence[int]
    ) -> tuple[Tensor, Handle]:
        """Bytes for this rank."""
        self.sent.gradients += sum(sizes) - sizes[self.rank]
        out = payload.new_empty(sum(received))

        def finish(parts: list[tuple[Tensor, list[int], Tensor]]) -> None:
            cut = [one.split(lengths) for one, lengths, _ in parts]
            for rank, (_, _, target) in enumerate(parts):
                torch.cat([pieces[rank] for pieces in cut], out=target)

        return out, self._meet((payload, list(sizes), out), finish)


def reduce_together(
    reducers: Sequence[Any], gradients: Sequence[Mapping[str, Tensor]], **options: Any
) -> None:
    """Average the gradients of simulated ranks in place.

    Args:
        reducers: one `ds_efficient.lgreco.Reducer` a rank, made with the transports of one `SimulatedGroup`.
        gradients: of each rank, by name.
        options: further arguments of `Reducer.reduce`.
    """
    going: list[Iterator[None]] = [
        one.turns(named, **options) for one, named in zip(reducers, gradients, strict=True)
    ]
    while going:
        going = [turn for turn in going if next(turn, _END) is not _END]
