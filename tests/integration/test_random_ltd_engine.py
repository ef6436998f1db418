"""random-LTD through `ds_efficient.initialize`: ZeRO, schedule, layer tokens, learning rate, resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_ltd_ranks
import torch
from random_ltd_ranks import BATCH, LR, MICRO_BATCHES, TOKENS
from rank_pool import RankPool

from ds_efficient.core.keys import Key
from ds_efficient.random_ltd import sample_tokens

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
STEPS, WORLD = 6, 2
WARMUP, DECAY, MIN_LR = 700, 2000, 1e-3
SCHEDULE = {
    "enabled": True,
    "warmup_layer_tokens": WARMUP,
    "decay_layer_tokens": DECAY,
    "decay_style": "linear",
    "min_lr": MIN_LR,
}
KEPT = [4, 4, 6, 6, 8, 8]
LAYER_TOKENS = [BATCH * MICRO_BATCHES * (2 * kept + 2 * TOKENS) for kept in KEPT]
CONSUMED = [sum(LAYER_TOKENS[: count + 1]) for count in range(STEPS)]


def rate(consumed: int) -> float:
    """Return the learning rate after so many layer tokens."""
    if consumed < WARMUP:
        return LR * consumed / WARMUP
    return max(MIN_LR, MIN_LR + (LR - MIN_LR) * (1 - (consumed - WARMUP) / (DECAY - WARMUP)))


@pytest.fixture(scope="module")
def runs(ranks: Ranks) -> dict[int, dict[str, Any]]:
    """Return a run with the LayerToken learning rate on two ranks for every stage."""
    ltd = {"layer_token_lr_schedule": SCHEDULE}
    return ranks(WORLD).run("random_ltd_ranks:train", [0, 1, 2, 3], STEPS, ltd)[0]


def by_hand() -> list[float]:
    """Train with indexing written out and torch's own AdamW; return the losses."""
    net = random_ltd_ranks.Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    losses, consumed = [], 0
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(MICRO_BATCHES):
            data = torch.randn(BATCH, TOKENS, 4, generator=torch.Generator().manual_seed(100 * step + micro))
            for rank, x in enumerate(data.chunk(WORLD)):
                hidden = net.first(x)
                for number, layer in enumerate(net.layers):
                    if number in (0, 3):
                        hidden = layer(hidden)
                        continue
                    key = Key(5, ("random_ltd",)).fold(step, micro, number, rank)
                    index = sample_tokens(TOKENS, KEPT[step], len(x), key=key)
                    at = index[:, :, None].expand(-1, -1, hidden.shape[2])
                    hidden = hidden.scatter(1, at, layer(hidden.gather(1, at)))
                total = total + (net.head(hidden) - x.sin()).square().mean() / MICRO_BATCHES / WORLD
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(consumed)
        optimizer.step()
        consumed += LAYER_TOKENS[step]
        losses.append(float(total.detach()))
    return losses


def test_every_stage_trains_like_indexing_written_by_hand(runs: dict[int, dict[str, Any]]) -> None:
    expected = by_hand()
    for stage, run in runs.items():
        assert run["losses"] == pytest.approx(expected, rel=2e-5), stage


def test_the_learning_rate_follows_the_layer_tokens(runs: dict[int, dict[str, Any]]) -> None:
    expected = [rate(consumed) for consumed in [0, *CONSUMED[:-1]]]
    assert len(set(expected)) == STEPS and expected[0] == 0 and LR not in expected
    for run in runs.values():
        assert run["rates"] == pytest.approx(expected, rel=1e-12)


def test_layer_tokens_are_counted_once_a_step_over_all_ranks(runs: dict[int, dict[str, Any]]) -> None:
    for run in runs.values():
        assert [one["layer_tokens"] for one in run["metrics"]] == CONSUMED
        assert [one["layer_tokens_of_step"] for one in run["metrics"]] == LAYER_TOKENS
        assert [one["kept_tokens"] for one in run["metrics"]] == KEPT
        tokens = BATCH * MICRO_BATCHES * TOKENS
        assert [one["tokens"] for one in run["metrics"]] == [tokens * (step + 1) for step in range(STEPS)]
        assert run["metrics"][-1]["saving"] == pytest.approx(1 - CONSUMED[-1] / (4 * STEPS * tokens))


def test_evidence_says_what_every_layer_left_out(runs: dict[int, dict[str, Any]]) -> None:
    dropped = sum(TOKENS - kept for kept in KEPT) * BATCH * MICRO_BATCHES // WORLD
    for run in runs.values():
        proof = run["evidence"]
        assert proof.acted and proof.due
        assert proof.counts["dropped_by_layer_1"] == proof.counts["dropped_by_layer_2"] == dropped
        assert proof.counts["dropped"] == 2 * dropped and proof.counts["layer_tokens"] == CONSUMED[-1]
        assert "2 of 4 layers drop tokens" in proof.summary


def test_the_plan_the_names_and_deepspeeds_own_version(runs: dict[int, dict[str, Any]]) -> None:
    for run in runs.values():
        assert [(name, reason) for name, _, reason in run["actions"]] == [
            ("layers.0", "first layer"),
            ("layers.1", ""),
            ("layers.2", ""),
            ("layers.3", "last layer"),
        ]
        assert [options.get("token_share") for options in run["now"]] == [None, 8 / 12, 8 / 12, None]
        assert run["names"] == sorted(random_ltd_ranks.Net().state_dict())
        assert run["deepspeed"] == "False" and not run["deepspeed scheduler"]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_resumes_exactly_in_the_middle_of_the_schedule(
    ranks: Ranks, tmp_path: Path, stage: int, runs: dict[int, dict[str, Any]]
) -> None:
    ltd = {"layer_token_lr_schedule": SCHEDULE}
    for run in ranks(WORLD).run("random_ltd_ranks:resume", str(tmp_path), stage, ltd):
        assert run["resumed"] == run["rest"]
        assert run["first"] == runs[stage]["losses"][:3]
        assert run["loaded"]["consumed_layer_tokens"] == CONSUMED[2]
        assert run["states"][0] == run["states"][1]
        assert run["states"][0]["consumed_layer_tokens"] == CONSUMED[-1]


def test_evaluation_drops_nothing_and_counts_nothing(ranks: Ranks) -> None:
    found = ranks(1).run("random_ltd_ranks:evaluation")[0]
    assert found["found"] == found["unmarked"] == found["expected"]
    assert found["counts"] == 0


def test_lengths_that_differ_between_steps_and_ranks_are_counted_exactly(ranks: Ranks) -> None:
    """The schedule without max_value ends at the length of each sequence."""
    runs = ranks(WORLD).run("random_ltd_ranks:lengths", 3)
    assert [one["layer_tokens"] for one in runs[0]] == [one["layer_tokens"] for one in runs[1]]
    consumed = tokens = 0
    for number in range(3):
        for rank in range(WORLD):
            length = TOKENS + 4 * number + 2 * rank
            increases = math.floor(number * (length - 4) / (2 * 8))
            samples = BATCH // WORLD * MICRO_BATCHES
            consumed += samples * (2 * (4 + 2 * increases) + 2 * length)
            tokens += samples * length
        assert runs[0][number]["layer_tokens"] == consumed
        assert runs[0][number]["tokens"] == tokens


def test_a_constant_number_of_tokens_and_chosen_layers(ranks: Ranks) -> None:
    ltd = {
        "random_ltd_schedule": {"schedule_type": "constant", "min_value": 5},
        "random_ltd_layer_id": [0, 3],
    }
    run = ranks(1).run("random_ltd_ranks:train", [0], 3, ltd)[0][0]
    assert [one["kept_tokens"] for one in run["metrics"]] == [5.0] * 3
    counts = run["evidence"].counts
    assert {name for name in counts if name.startswith("dropped_by_layer")} == {
        "dropped_by_layer_0",
        "dropped_by_layer_3",
    }


def test_a_schedule_that_keeps_all_tokens_trains_like_none(ranks: Ranks) -> None:
    """And is no reason to stop the run: nothing is due."""
    keep = {"random_ltd_schedule": {"min_value": TOKENS, "schedule_config": {"require_steps": 8}}}
    run, plain = (
        ranks(1).run("random_ltd_ranks:train", [0], 4, copy.deepcopy(ltd))[0][0] for ltd in (keep, {})
    )
    off = ranks(1).run("random_ltd_ranks:train_without", 4)[0]
    assert run["losses"] == off != plain["losses"]
    assert not run["evidence"].due and not run["evidence"].acted


@pytest.mark.parametrize(
    ("ltd", "scheduler", "part"),
    [
        ({"layer_token_lr_schedule": SCHEDULE}, True, "random_ltd schedules the learning rate itself"),
        ({"total_layer_num": 5}, False, "total_layer_num 5: the model has 4 layers"),
        ({"random_ltd_layer_id": [4]}, False, "layer 4 does not exist; the model has 4 layers, 0 to 3"),
        ({"random_ltd_layer_num": 0}, False, "random_ltd_layer_num"),
    ],
)
def test_contradictions_are_refused_by_name(
    ranks: Ranks, ltd: dict[str, Any], scheduler: bool, part: str
) -> None:
    assert part in ranks(1).run("random_ltd_ranks:refused", ltd, scheduler)[0]


def test_the_layer_token_schedule_replaces_the_scheduler_section(ranks: Ranks) -> None:
    section = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}}
    ltd = {"layer_token_lr_schedule": SCHEDULE, "sections": section}
    run = ranks(1).run("random_ltd_ranks:train", [1], 2, ltd)[0][1]
    assert run["rates"] == pytest.approx([0.0, rate(CONSUMED[0])], rel=1e-12)
