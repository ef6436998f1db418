"""Agreement of all ranks on when to stop: SIGTERM, a time limit or a step."""

from __future__ import annotations

import argparse
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Stop:
    """Why a run ends early.

    Attributes:
        reason: for the log.
        urgent: somebody waits: save at once, evaluate nothing.
    """

    reason: str
    urgent: bool


class StopSignal:
    """Tells after each step whether the run ends early, with the same answer on every rank.

    Args:
        args: ``exit_interval`` and ``exit_duration_in_mins``.
        group: a gloo group of all ranks: the answer stays off the GPU and costs no synchronisation.
    """

    def __init__(self, args: argparse.Namespace, group: Any) -> None:
        self._interval = args.exit_interval
        self._limit = None if args.exit_duration_in_mins is None else 60.0 * args.exit_duration_in_mins
        self._group = group
        self._begin = time.monotonic()
        self._received = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def after(self, step: int) -> Stop | None:
        """Return whether and why the run ends after `step`; collective."""
        late = self._limit is not None and time.monotonic() - self._begin > self._limit
        # The signal's number travels, so that every rank can name it.
        found = torch.tensor([self._received, int(late)], dtype=torch.int32)
        if dist.get_world_size(self._group) > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        if int(found[0]):
            return Stop(signal.Signals(int(found[0])).name, urgent=True)
        if int(found[1]):
            return Stop("--exit-duration-in-mins", urgent=True)
        if self._interval is not None and step % self._interval == 0:
            return Stop(f"--exit-interval {self._interval}", urgent=False)
        return None
