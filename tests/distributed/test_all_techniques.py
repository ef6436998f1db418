"""All five techniques in one run of the script: each acts, and a run that was stopped goes on exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool
from tiny_runs import MODEL, Outcome, deepspeed_json, train

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
TECHNIQUES = ("slope", "rmm", "mkor", "random_ltd", "lgreco")
STEPS = 4
WIDE = [*MODEL[:2], "--hidden-size", "64", *MODEL[4:]]  # matrices that quantisation makes smaller


def config(stage: int) -> dict[str, Any]:
    """Return a configuration with every technique, each from the first steps on."""
    schedule = {"min_value": 8, "max_value": 16, "schedule_config": {"require_steps": 8, "seq_per_step": 2}}
    random_ltd = {"enabled": True, "random_ltd_layer_num": 2, "random_ltd_schedule": schedule}
    return deepspeed_json(
        zero_optimization={"stage": stage},
        gradient_clipping=0.5,
        ds_efficient={"seed": 7, "evidence_steps": 2},
        slope={"enabled": True, "column_mask_interval": 2, "adapter": {"rank": 2, "start_step": 2}},
        rmm={"enabled": True, "ratio": 0.5, "block_size": 16, "min_rows": 8},
        mkor={"enabled": True, "inversion_interval": 2, "warmup_steps": 1, "tensor_parallel": "block"},
        lgreco={
            "enabled": True,
            "compressor": "qsgd",
            "default": 8,
            "range": [4, 8],
            "interval": 2,
            "start_step": 0,
        },
        data_efficiency={"enabled": True, "data_routing": {"enabled": True, "random_ltd": random_ltd}},
    )


def all_acted(run: Outcome) -> None:
    """Check that the run ended well, and that every technique did something."""
    assert set(run.status) == {0}
    assert len(run.losses) == STEPS and all(math.isfinite(loss) for loss in run.losses)
    for technique in TECHNIQUES:
        found = run.of("evidence", technique)[-1]
        assert found["acted"], (technique, found)


@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"])
def test_every_technique_acts_on_four_ranks(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    all_acted(train(ranks, 4, tmp_path, layout, config(stage=1), steps=STEPS, model=WIDE))


def test_a_stopped_run_with_every_technique_goes_on_exactly(ranks: Ranks, tmp_path: Path) -> None:
    whole = train(ranks, 2, tmp_path / "whole", "", config(stage=1), steps=STEPS, model=WIDE)
    all_acted(whole)
    save = f"--save {tmp_path / 'saved'} --load {tmp_path / 'saved'}"
    folder, half = tmp_path / "parts", STEPS // 2
    first = train(
        ranks, 2, folder, f"{save} --exit-interval {half}", config(stage=1), steps=STEPS, model=WIDE
    )
    assert first.losses == whole.losses[:half]
    second = train(ranks, 2, folder, save, config(stage=1), steps=STEPS, model=WIDE)
    assert set(second.status) == {0}
    assert second.losses[-half:] == whole.losses[half:]
    assert second.norms[-half:] == whole.norms[half:]
