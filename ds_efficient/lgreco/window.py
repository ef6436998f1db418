"""The gradients that the next plan is made from: sums over the last steps before it.

Without partitioned gradients each rank sums its own, before they are compressed, which the plan averages
over the ranks. Where ZeRO partitions gradients a rank sums its slice of the mean instead, so that a gradient
is kept once in the whole group, and not once a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

STEPS = 10
"""Most steps that are summed (as in the published code): memory is held, and time spent, in these only."""


class GradientWindow:
    """Sums of gradients by name, float32, without loss scale.

    Args:
        shapes: of the whole gradients that may be compressed.
        slices: the elements of a flat gradient that this rank sums, from their number: (start, end); None for
            all of them.
        ranks: of the group, by which slices are weighted, since the plan divides by it.
        immediate: add at once; nothing can be rolled back then, and a step's gradients are not copied.
            Otherwise copies of them are held until the step is over, in their own dtype.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        slices: Callable[[int], tuple[int, int]] | None = None,
        ranks: int = 1,
        immediate: bool = False,
    ) -> None:
        self._shapes, self._slices, self._ranks, self._immediate = dict(shapes), slices, ranks, immediate
        self._sums: dict[str, Tensor] = {}
        self._pending: list[tuple[str, Tensor, float]] = []

    def add(self, gradients: Mapping[str, Tensor], *, unscale: float = 1.0) -> None:
        """Add one step's gradients, or one micro-batch's; whole ones, or this rank's slices."""
        for name, gradient in gradients.items():
            if name not in self._shapes:
                continue
            part = self._own(name, gradient.detach())
            if self._immediate:
                self._sum(name, part, unscale)
            else:
                self._pending.append((name, part.clone(), unscale))

    def _sum(self, name: str, part: Tensor, unscale: float) -> None:
        known = self._sums.get(name)
        if known is None:
            self._sums[name] = part.to(torch.float32, copy=True).mul_(unscale)
        else:
            known.add_(part, alpha=unscale)

    def _own(self, name: str, gradient: Tensor) -> Tensor:
        flat = gradient.reshape(-1)
        if self._slices is None or gradient.shape != self._shapes[name]:
            return flat
        start, end = self._slices(flat.numel())
        return flat[start:end]

    def commit(self) -> None:
        """The step was taken: its gradients count."""
        for name, part, unscale in self._pending:
            self._sum(name, part, unscale)
        self._pending.clear()

    def rollback(self) -> None:
        """The step was left out: its gradients do not count."""
        self._pending.clear()

    def __bool__(self) -> bool:
        return bool(self._sums)

    @property
    def nbytes(self) -> int:
        """Memory of the sums, and of what waits to be added."""
        waiting = sum(part.nbytes for _, part, _ in self._pending)
        return waiting + sum(part.nbytes for part in self._sums.values())

    def take(self) -> Mapping[str, Tensor]:
        """Hand the sums over as whole gradients, each made when it is asked for and once only; start anew."""
        taken = _Whole(self._sums, self)
        self._sums = {}
        self._pending.clear()
        return taken

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A sum as a whole gradient: zeros where other ranks have its elements."""
        shape = self._shapes[name]
        if self._slices is None:
            return part.view(shape)
        total = torch.zeros(shape, dtype=torch.float32, device=part.device)
        start, end = self._slices(total.numel())
        total.view(-1)[start:end] = part * self._ranks
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of steps that were taken; the tensors themselves."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Replace the sums by copies of these, of gradients that are here."""
        self._pending.clear()
        self._sums = {
            name: part.detach().to(device, torch.float32, copy=True)
            for name, part in state.items()
            if name in self._shapes
        }


class _Whole(Mapping[str, Tensor]):
    def __init__(self, sums: dict[str, Tensor], window: GradientWindow) -> None:
        self._sums, self._window = sums, window

    def __getitem__(self, name: str) -> Tensor:
        return self._window.whole(name, self._sums.pop(name))

    def __contains__(self, name: object) -> bool:
        return name in self._sums

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


def mean_of(parts: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Means over ranks of their tensors by name; a rank without one counts as zeros."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            share = value.to(torch.float32) / len(parts)
            total[name] = total[name] + share if name in total else share
    return total
