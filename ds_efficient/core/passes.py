"""Which forward pass of a step a layer is in, also while activations are recomputed.

A random draw that is keyed by the micro-batch should find the same micro-batch again when a checkpoint runs
the layer a second time, inside of autograd's backward pass.

`Passes` is for draws that change what a layer computes, which the recomputation must repeat whatever happens.
Counting does not tell it: a pipeline has several micro-batches under way, one backward pass may belong to
two forward passes, and what a checkpoint holds may be one layer or many. Autograd's own numbering does: every
node of the graph carries the sequence number that it got when the forward pass made it, ever growing. So the
number that is next when a forward pass begins is noted, and the node that causes a recomputation tells by its
number which pass it belongs to. That holds for reentrant and other checkpoints, in any order; a checkpoint
inside of a checkpoint is not covered, since its node is made by the recomputation.

`Calls` is for draws whose key is saved for the backward pass, so that any draw in a recomputation is right.
It counts the calls of one layer by itself: no model need be watched, and each call of a layer that a pass
calls several times has a number of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn


def recomputing() -> bool:
    """Return whether this code runs inside of autograd's backward pass."""
    return torch._C._current_graph_task_id() != -1


class Passes:
    """Counts the forward passes of a model that are there to train it, from 0 in each optimizer step.

    Passes in evaluation mode, or with gradients switched off around the whole model, are not counted.

    Attributes:
        step: optimizer steps done.
        number: the latest pass; -1 before the first.
        watches: whether `watch` was called.
    """

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.number = -1
        self.watches = False
        self._open = False
        self._trains = False
        self._starts: list[int] = []
        self._seen: set[Hashable] = set()

    def watch(self, model: nn.Module) -> None:
        """Count the passes of `model`: everything that it does belongs to one."""

        @torch.compiler.disable
        def begins(module: nn.Module, inputs: Any) -> None:
            if not recomputing():
                self._open = True
                self._trains = module.training and torch.is_grad_enabled()
                if self._trains:
                    self.begin()

        @torch.compiler.disable
        def ends(module: nn.Module, inputs: Any, output: Any) -> None:
            if not recomputing():
                self._open = False

        model.register_forward_pre_hook(begins)
        model.register_forward_hook(ends, always_call=True)
        self.watches = True

    def begin(self) -> None:
        """Begin a pass."""
        self.number += 1
        self._starts.append(torch.autograd._get_sequence_nr())
        self._seen.clear()

    def restart(self, step: int) -> None:
        """Count from 0 again: the first pass of step `step` is next."""
        self.step = step
        self.number = -1
        self._starts.clear()
        self._seen.clear()

    def current(self, layer: Hashable) -> int | None:
        """Return the pass that a layer runs in, or None for one that trains nothing.

        Args:
            layer: names the layer. Where a part of the model is called by itself, a layer that runs again
                begins a new pass.
        """
        if recomputing():
            node = torch._C._current_autograd_node()
            number = bisect_right(self._starts, node._sequence_nr()) - 1 if node is not None else self.number
            return max(number, 0)
        if self._open:
            return self.number if self._trains else None
        if not torch.is_grad_enabled():
            return None
        if self.number < 0 or layer in self._seen:
            self.begin()
        self._seen.add(layer)
        return self.number


class Calls:
    """Counts the calls of one layer that are there to train it, from 0 in each optimizer step.

    Calls inside of autograd's backward pass, which are recomputations, have a count of their own. Schedules
    run backward passes in the order of the forward ones, so that the i-th recomputation is the i-th call.
    """

    __slots__ = ("_recomputed", "_run", "_step")

    def __init__(self) -> None:
        self._step = -1
        self._run = self._recomputed = 0

    def count(self, step: int) -> int:
        """Return the number of the call that runs now.

        Args:
            step: optimizer steps done; where it is another one than before, the counts begin again.
        """
        if self._step != step:
            self._step = step
            self._run = self._recomputed = 0
        if torch._C._current_graph_task_id() == -1:
            self._run += 1
            return self._run - 1
        self._recomputed += 1
        return self._recomputed - 1

    def restart(self) -> None:
        """Count from 0 again."""
        self._step = -1
