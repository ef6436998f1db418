"""Tiny training runs of ``pretrain_gpt.py`` for tests, and what they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rank_pool import RankPool

OPTIMIZER = {"type": "AdamW", "params": {"torch_adam": True, "lr": 5e-3}}

MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --attention-dropout 0 "
    "--hidden-dropout 0 --mock-data --vocab-size 128 --num-workers 0"
).split()


@dataclass(frozen=True)
class Outcome:
    """A finished run: exit statuses of the ranks and the records of run.jsonl."""

    status: list[int]
    records: list[dict[str, Any]]

    def of(self, kind: str, name: str) -> list[Any]:
        """Return `name` of every record of `kind`."""
        return [record[name] for record in self.records if record["kind"] == kind]

    @property
    def losses(self) -> list[float]:
        """Training losses, one a step."""
        return self.of("train", "loss")

    @property
    def norms(self) -> list[float]:
        """Gradient norms before clipping, one a step."""
        return self.of("train", "grad_norm")


def deepspeed_json(**sections: Any) -> dict[str, Any]:
    """Return a DeepSpeed config with torch's AdamW; sections given as keywords."""
    return {"optimizer": OPTIMIZER, **sections}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of ``folder/run.jsonl``."""
    path = folder / "run.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def train(
    ranks: Callable[[int], RankPool],
    size: int,
    folder: Path,
    arguments: str = "",
    config: Mapping[str, Any] | None = None,
    *,
    steps: int = 4,
    batch: int = 8,
    micro: int = 2,
    timeout: float = 120.0,
    model: list[str] | None = None,
    script: str = "rank_pool:run_script",
) -> Outcome:
    """Train a tiny GPT on `size` ranks; the global batch is the same whatever the layout.

    Args:
        ranks: the fixture.
        size: number of ranks.
        folder: holds the config and run.jsonl.
        arguments: added to the command line; later ones win.
        config: DeepSpeed config.
        steps, batch, micro: --train-iters, --global-batch-size, --micro-batch-size.
        timeout: seconds.
        model: instead of MODEL.
        script: what runs the script on each rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ds.json"
    path.write_text(json.dumps(config if config is not None else deepspeed_json()))
    argv = [
        *(model or MODEL),
        *f"--deepspeed_config {path} --train-iters {steps} --global-batch-size {batch}".split(),
        *f"--micro-batch-size {micro} --log-interval 1 --eval-iters 0 --run-dir {folder}".split(),
        *arguments.split(),
    ]
    status = ranks(size).run(script, argv, timeout=timeout)
    return Outcome(status, read_records(folder))
