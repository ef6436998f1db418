"""MKOR in training on GPUs: what the CPU learns, in all precisions, over NCCL, with fp16's overflows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from tiny_runs import Outcome, deepspeed_json, train

pytestmark = pytest.mark.gpu

Ranks = Callable[[int], RankPool]
SEQUENCE = "--tensor-model-parallel-size 2 --sequence-parallel"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def config(stage: int, mkor: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    section = {"enabled": True, "inversion_interval": 2, "stabilizer": {"threshold": 1.04, "zeta": 0.5}}
    return deepspeed_json(
        zero_optimization={"stage": stage}, gradient_clipping=0.5, mkor=section | (mkor or {}), **more
    )


@pytest.fixture(scope="module")
def fp32(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Return the run in fp32 on one GPU."""
    return train(ranks, 1, tmp_path_factory.mktemp("one"), "", config(0), timeout=240.0)


@needs_gpu
@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"stage": 2}, 1e-4),
        ({"stage": 3, "mkor": {"form": "factored", "max_rank": 64}}, 1e-3),
        ({"stage": 1, "bf16": {"enabled": True}}, 2e-2),
        ({"stage": 1, "bf16": {"enabled": True}, "mkor": {"form": "factored", "max_rank": 64}}, 2e-2),
        ({"stage": 1, "fp16": {"enabled": True, "initial_scale_power": 10}}, 2e-2),
    ],
    ids=["stage 2", "factored", "bf16", "bf16 factored", "fp16"],
)
def test_precisions_and_forms_follow_fp32(
    ranks: Ranks, tmp_path: Path, fp32: Outcome, options: dict[str, Any], near: float
) -> None:
    run = train(ranks, 1, tmp_path, "", config(**options), timeout=240.0)
    assert run.status == [0]
    assert run.losses == pytest.approx(fp32.losses, rel=near)
    assert run.of("train", "mkor")[-1]["layers_changed"] == fp32.of("train", "mkor")[-1]["layers_changed"]
    assert fp32.of("train", "mkor")[-1]["stabilizer_hits"] > 0


@needs_gpu
def test_a_step_that_overflows_leaves_the_factors_as_they_were(ranks: Ranks, tmp_path: Path) -> None:
    """The first loss scales are far too high: nothing is taken in until a step is applied."""
    scale = {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}
    run = train(ranks, 1, tmp_path, "", config(1, fp16=scale), steps=24, timeout=240.0)
    metrics = run.of("train", "mkor")
    assert metrics[0]["update_applied"] == 0 and metrics[0]["updates"] == 0
    assert metrics[0]["largest_entry"] == 1
    assert metrics[0]["updates_left_out"] > 0
    assert metrics[-1]["updates"] > 0 and metrics[-1]["largest_entry"] > 1


@needs_two
@pytest.mark.parametrize(("layout", "stage"), [("", 0), ("", 2), (SEQUENCE, 1)], ids=["dp", "zero 2", "sp"])
def test_two_gpus_learn_what_one_learns(
    ranks: Ranks, tmp_path: Path, fp32: Outcome, layout: str, stage: int
) -> None:
    run = train(ranks, 2, tmp_path, layout, config(stage), timeout=240.0)
    assert run.status == [0, 0]
    assert run.losses == pytest.approx(fp32.losses, rel=1e-4)
    assert run.norms == pytest.approx(fp32.norms, rel=1e-4)
