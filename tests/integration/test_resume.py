"""A run that stops, saves and resumes is the unbroken run, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from saved_runs import STEPS, Case, Ranks, differences, real_data
from tiny_runs import Outcome

TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
BF16 = {"bf16": {"enabled": True}}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 5e-3, "warmup_num_steps": 5}}}

pytestmark = pytest.mark.distributed

CASES = {
    "one-rank": Case(),
    "one-rank-zero1": Case(stage=1),
    "dp2-zero0": Case(2),
    "dp2-zero1": Case(2, stage=1),
    "dp2-zero2": Case(2, stage=2),
    "dp2-zero3": Case(2, stage=3),
    "tp2-sp": Case(2, TENSOR, stage=1),
    "pp2": Case(2, PIPELINE),
    "pp2-zero1": Case(2, PIPELINE, stage=1),
    "bf16-zero1": Case(2, stage=1, config=BF16),
    "bf16-zero0": Case(1, config=BF16),
    "recomputed": Case(1, "--recompute-granularity full"),
    "scheduler-of-the-json": Case(1, "--min-lr 0", stage=1, config=WARMUP),
}


def assert_exact(ranks: Ranks, case: Case, folder: Path, more: str = "") -> tuple[Outcome, Outcome]:
    unbroken = case.run(ranks, folder / "unbroken", more)
    assert set(unbroken.status) == {0}
    first = case.run(ranks, folder / "broken", f"{more} --exit-interval 4")
    assert set(first.status) == {0} and len(first.losses) == 4
    broken = case.run(ranks, folder / "broken", more)
    assert set(broken.status) == {0}
    assert len(unbroken.losses) == STEPS
    for name in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert broken.of("train", name) == unbroken.of("train", name), name
    assert broken.of("resume", "step") == [4]
    found = [folder / run / "checkpoints" / f"global_step{STEPS}" for run in ("unbroken", "broken")]
    assert differences(*found) == []
    return unbroken, broken


@pytest.mark.parametrize("name", CASES)
def test_every_layout_resumes_exactly(ranks: Ranks, tmp_path: Path, name: str) -> None:
    assert_exact(ranks, CASES[name], tmp_path)
