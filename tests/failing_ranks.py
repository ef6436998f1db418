"""Runs in which something happens on one rank only; also a script for launchers (see the end)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def act(kind: str) -> None:
    """Do what `kind` says: a signal's name, ``mistake`` (UserError) or ``bug`` (any other exception)."""
    from ds_efficient.errors import UserError

    if kind == "mistake":
        raise UserError("--some-argument 7: is wrong on one rank; correct it")
    if kind == "bug":
        raise ZeroDivisionError("a bug on one rank")
    os.kill(os.getpid(), getattr(signal, kind))


def run_with(kind: str, rank: int, step: int, argv: list[str]) -> tuple[int, str]:
    """Run the script; `kind` happens on `rank` before its step `step`.

    Returns:
        Exit status, and what was written to stderr.
    """
    import pretrain_gpt
    from pretraining import steps
    from rank_pool import run_script_with_output

    train_step, done = steps.PlainRunner.train_step, []

    def train(self: Any, batches: Any) -> Any:
        done.append(1)
        if int(os.environ["RANK"]) == rank and len(done) == step:
            act(kind)
        return train_step(self, batches)

    with mock.patch.object(steps.PlainRunner, "train_step", train):
        if __name__ == "__main__":
            sys.exit(pretrain_gpt.run(argv))
        return run_script_with_output(argv)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "tests")]
    # deepspeed puts --local_rank first.
    local, kind, rank, step, *argv = sys.argv[1:]
    run_with(kind, int(rank), int(step), [local, *argv])
