"""Runs of pretrain_gpt.py that end at a budget of tokens or layer tokens, and go on with a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from saved_runs import Ranks, differences
from tiny_runs import Outcome, deepspeed_json, train

from ds_efficient.random_ltd.schedule import TokenSchedule

pytestmark = pytest.mark.distributed

# Of tiny_runs.MODEL: 4 layers, the two in the middle drop; 8 sequences of 16 tokens a step.
SCHEDULE = TokenSchedule(4, 16, 6, 4, total_layer_num=4, batch_size=8)
TOKENS = 8 * 16


def run(ranks: Ranks, folder: Path, **budgets: int) -> Outcome:
    """Up to 9 steps, saved in `folder` and resumed from there."""
    schedule = {"min_value": 4, "schedule_config": {"require_steps": 6, "seq_per_step": 4}}
    rate = {"enabled": True, "warmup_layer_tokens": 600, "decay_layer_tokens": 4000, "min_lr": 1e-4}
    ltd = {"enabled": True, "random_ltd_schedule": schedule, "layer_token_lr_schedule": rate, **budgets}
    sections: dict[str, Any] = {"enabled": True, "data_routing": {"enabled": True, "random_ltd": ltd}}
    return train(
        ranks, 2, folder, f"--save {folder / 'c'} --load {folder / 'c'}",
        deepspeed_json(data_efficiency=sections, zero_optimization={"stage": 1}), steps=9,
    )  # fmt: skip


def test_a_run_ends_at_its_budget_and_goes_on_exactly_with_a_larger_one(ranks: Ranks, tmp_path: Path) -> None:
    whole = run(ranks, tmp_path / "whole", token_budget=8 * TOKENS)
    counts = [SCHEDULE.consumed_layer_tokens(step) for step in range(1, 9)]
    assert whole.of("train", "layer_tokens") == counts
    assert whole.of("end", "reason") == [f"random_ltd.token_budget {8 * TOKENS} reached"]

    budget = counts[2] + 1  # inside of the fourth step
    first = run(ranks, tmp_path / "parts", layer_token_budget=budget)
    assert first.of("train", "step") == [1, 2, 3, 4]
    assert first.of("end", "reason") == [f"random_ltd.layer_token_budget {budget} reached"]
    spent = run(ranks, tmp_path / "parts", layer_token_budget=budget)
    assert spent.of("train", "step") == [1, 2, 3, 4]
    second = run(ranks, tmp_path / "parts", token_budget=8 * TOKENS)
    assert second.losses == whole.losses
    assert second.of("train", "lr") == whole.of("train", "lr")
    assert len(set(whole.of("train", "lr"))) == 8
    saved = [tmp_path / part / "c/global_step8" for part in ("whole", "parts")]
    assert differences(*saved) == []
