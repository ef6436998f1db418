"""L-GreCo in training over NCCL: stages and precisions follow the uncompressed run; overflows of fp16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from tiny_runs import Outcome, deepspeed_json, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

Ranks = Callable[[int], RankPool]
QSGD = {"enabled": True, "compressor": "qsgd", "default": 8, "interval": 2}


def config(stage: int, section: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    lgreco = {} if section is None else {"lgreco": section}
    return deepspeed_json(zero_optimization={"stage": stage}, gradient_clipping=0.5, **lgreco, **more)


@pytest.fixture(scope="module")
def plain(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Return the run in fp32 without compression."""
    return train(ranks, 2, tmp_path_factory.mktemp("plain"), "", config(1, None), timeout=240.0)


@pytest.mark.parametrize(
    ("stage", "more", "near"),
    [
        (0, {}, 2e-3),
        (1, {"bf16": {"enabled": True}}, 2e-2),
        (1, {"fp16": {"enabled": True, "initial_scale_power": 10}}, 2e-2),
        (2, {"bf16": {"enabled": True}}, 2e-2),
        (3, {}, 2e-3),
    ],
    ids=["stage 0", "bf16", "fp16", "stage 2", "stage 3"],
)
def test_eight_bits_learn_what_exact_gradients_learn(
    ranks: Ranks, tmp_path: Path, plain: Outcome, stage: int, more: dict[str, Any], near: float
) -> None:
    run = train(ranks, 2, tmp_path, "", config(stage, QSGD, **more), timeout=240.0)
    assert run.status == [0, 0]
    assert run.losses == pytest.approx(plain.losses, rel=near)
    assert run.losses != plain.losses
    rows = run.of("train", "lgreco")
    assert rows[-1]["plans"] == 2
    assert all(one["ratio"] > 1.5 for one in rows)


@pytest.mark.parametrize("compressor", ["powersgd", "topk"])
def test_an_overflow_in_fp16_leaves_the_error_buffers_finite(
    ranks: Ranks, tmp_path: Path, compressor: str
) -> None:
    """The first loss scales are far too high: what those steps added to the errors is taken back."""
    section = {
        "powersgd": {"enabled": True, "compressor": "powersgd", "default": 4, "range": [1, 8], "interval": 4},
        "topk": {"enabled": True, "compressor": "topk", "default": 0.2, "range": [0.05, 0.4], "interval": 4},
    }[compressor]
    scale = {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}
    run = train(ranks, 2, tmp_path, "", config(1, section, fp16=scale), steps=32, timeout=240.0)
    assert run.status == [0, 0]
    rows = run.of("train", "lgreco")
    assert rows[-1]["ratio"] > 1.0
    assert all(loss == loss for loss in run.losses)
    assert run.losses[-1] < run.losses[0]  # after the scale has come down, steps are applied
