"""Runs that die at a chosen moment, for tests of what they leave behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from rank_pool import RankPool, run_script


class Killed(BaseException):
    """Ends a rank where a signal would: nothing catches it."""


class KilledPool:
    """Like RankPool, but the ranks die when they reach `moment` of saving step `step`.

    Args:
        size: number of ranks.
        moment: a key of `MOMENTS`.
        step: of the checkpoint.
    """

    def __init__(self, size: int, moment: str, step: int) -> None:
        self._pool = RankPool(size)
        self._how = (moment, step)

    def run(self, target: str, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Run the script on every rank; a rank that died gives ``"killed"``."""
        return self._pool.run("broken_saves:killed_at", *self._how, *args, timeout=timeout)


def _after_states() -> Any:
    from ds_efficient.core import checkpoint

    write = checkpoint.CheckpointStore._write_states

    def write_then_die(self: Any, folder: Path) -> None:
        write(self, folder)
        raise Killed

    return mock.patch.object(checkpoint.CheckpointStore, "_write_states", write_then_die)


def _after_engine() -> Any:
    """After DeepSpeed's files, before the manifest."""
    return mock.patch("ds_efficient.core.checkpoint._barrier", side_effect=Killed)


def _before_latest() -> Any:
    """The checkpoint has its name, but ``latest`` does not know it."""
    from ds_efficient.core import checkpoint

    on_first_rank, calls = checkpoint._on_first_rank, []

    def die_at_the_end(action: Callable[[], Any]) -> None:
        calls.append(action)
        with mock.patch.object(checkpoint.files, "LATEST", "latest.not_written"):
            on_first_rank(action)
        if len(calls) == 2:
            raise Killed

    return mock.patch.object(checkpoint, "_on_first_rank", die_at_the_end)


MOMENTS = {"states": _after_states, "engine": _after_engine, "latest": _before_latest}


def killed_at(moment: str, step: int, argv: list[str]) -> Any:
    """Run the script; die at `moment` of saving `step`."""
    from pretraining import checkpoints

    save = checkpoints.save

    def save_or_die(engine: Any, args: Any, progress: Any) -> str:
        if progress.step < step:
            return save(engine, args, progress)
        with MOMENTS[moment]():
            return save(engine, args, progress)

    try:
        with mock.patch.object(checkpoints, "save", save_or_die):
            return run_script(argv)
    except Killed:
        return "killed"


def rank_1_killed_in_step(step: int, argv: list[str]) -> int:
    """Run the script; SIGKILL ends rank 1 in the middle of `step`."""
    from pretraining import steps

    train_step, done = steps.PlainRunner.train_step, []

    def train_or_die(self: Any, batches: Any) -> Any:
        done.append(1)
        if os.environ["RANK"] == "1" and len(done) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, batches)

    with mock.patch.object(steps.PlainRunner, "train_step", train_or_die):
        return run_script(argv)


def run_with_log(argv: list[str]) -> tuple[int, str]:
    """Run the script; return its exit status and what it wrote to stdout."""
    import contextlib
    import io

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = run_script(argv)
    return status, output.getvalue()
