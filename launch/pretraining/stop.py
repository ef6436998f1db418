"""Agreement of all ranks on when to stop: SIGTERM, a time limit or a step."""

from __future__ import annotations

import argparse
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


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
        self._received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name

    def reason(self, step: int) -> str | None:
        """Return why the run ends after `step`, or None; collective."""
        own = 0
        if self._received is not None:
            own = 1
        elif self._limit is not None and time.monotonic() - self._begin > self._limit:
            own = 2
        code = torch.tensor([own], dtype=torch.int32)
        if dist.get_world_size(self._group) > 1:
            dist.all_reduce(code, op=dist.ReduceOp.MAX, group=self._group)
        if int(code) == 1:
            return self._received or "a signal on another rank"
        if int(code) == 2:
            return "--exit-duration-in-mins"
        if self._interval is not None and step % self._interval == 0:
            return f"--exit-interval {self._interval}"
        return None
