"""Runs that save and resume, and an exact comparison of what two runs left on disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rank_pool import RankPool, run_script
from tiny_runs import MODEL, Outcome, deepspeed_json, train

Ranks = Callable[[int], RankPool]

STEPS = 8
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1"
SCHEDULE = "--min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 3"


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """Return a DeepSpeed config of this ZeRO stage, with clipping."""
    return deepspeed_json(zero_optimization={"stage": stage}, gradient_clipping=0.5, **more)


def real_data(prefix: str) -> list[str]:
    """Return MODEL's arguments with the dataset `prefix` (byte-level) instead of synthetic tokens."""
    plain = " ".join(MODEL).replace("--mock-data --vocab-size 128", "")
    return [*plain.split(), "--data-path", prefix, "--split", "80,10,10"]


@dataclass(frozen=True)
class Case:
    """A layout that is run unbroken and in two parts."""

    size: int = 1
    arguments: str = ""
    stage: int = 0
    config: Mapping[str, Any] | None = None
    model: list[str] | None = None
    schedule: str = SCHEDULE

    def run(self, ranks: Ranks, folder: Path, more: str = "", *, save: Path | None = None) -> Outcome:
        """Train with dropout up to step `STEPS`; resume from ``--save`` if it holds a checkpoint."""
        config = {**zero(self.stage), **(self.config or {})}
        arguments = self._arguments(folder, more, save)
        return train(ranks, self.size, folder, arguments, config, steps=STEPS, model=self.model)

    def _arguments(self, folder: Path, more: str, save: Path | None = None) -> str:
        save = save or folder / "checkpoints"
        return f"{DROPOUT} {self.schedule} --save {save} --load {save} {self.arguments} {more}"

    def argv(self, folder: Path, more: str = "") -> list[str]:
        """Write the JSON; return the command line of `run`."""
        pool = _Recorder()
        self.run(lambda size: pool, folder, more)  # type: ignore[arg-type, return-value]
        return pool.argv


class _Recorder:
    """Stands in for a pool and keeps the command line."""

    argv: list[str]

    def run(self, target: str, argv: list[str], timeout: float = 0.0) -> list[int]:
        self.argv = argv
        return []


class ForkingPool:
    """Like RankPool, but loader processes are forked, as under a launcher: a server of their own is slow."""

    def __init__(self, size: int) -> None:
        self._pool = RankPool(size)

    def run(self, target: str, argv: list[str], timeout: float = 120.0) -> list[int]:
        """Run the script on every rank."""
        return self._pool.run("saved_runs:run_script_forking", argv, timeout=timeout)


def run_script_forking(argv: list[str]) -> int:
    """Run the script in this rank, with loader processes by fork."""
    multiprocessing.set_start_method("fork", force=True)
    return run_script(argv)


def fails(ranks: Ranks, case: Case, folder: Path, more: str = "") -> tuple[int, str]:
    """Run; return the exit status, the same on all ranks, and all that they wrote to stderr."""
    outputs = ranks(case.size).run("rank_pool:run_script_with_output", case.argv(folder, more))
    statuses = {status for status, _ in outputs}
    assert len(statuses) == 1, outputs
    return statuses.pop(), "".join(text for _, text in outputs)


def same(left: Any, right: Any) -> bool:
    """Return whether two loaded files are equal, every tensor bit for bit."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and bool(torch.equal(left, right))
        )
    if isinstance(left, Mapping):
        return (
            isinstance(right, Mapping)
            and left.keys() == right.keys()
            and all(same(left[key], right[key]) for key in left)
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) or type(left).__module__.split(".")[0] in ("deepspeed", "megatron")


def states(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and content of every file with tensors in a checkpoint."""
    for path in sorted(folder.glob("*.pt")):
        yield path.name, torch.load(path, map_location="cpu", weights_only=False)


def differences(left: Path, right: Path) -> list[str]:
    """Return what differs between two checkpoint folders: weights, optimizer, random streams, progress."""
    first, second = dict(states(left)), dict(states(right))
    found = [f"{name}: only in one" for name in first.keys() ^ second.keys()]
    for name in sorted(first.keys() & second.keys()):
        found += [f"{name}: {key}" for key in _unequal(first[name], second[name])]
    return found


def _unequal(left: Any, right: Any, path: str = "") -> Iterator[str]:
    if isinstance(left, Mapping) and isinstance(right, Mapping) and left.keys() == right.keys():
        for key in left:
            if key != "seconds":
                yield from _unequal(left[key], right[key], f"{path}.{key}")
    elif not same(left, right):
        yield path or "content"
