"""RMM through `ds_efficient.initialize`: ZeRO stages, keys, resuming, evidence, SLoPe in the same layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rmm_ranks
import torch
from rank_pool import RankPool
from rmm_ranks import LR, MICRO_BATCHES, RMM, ROWS, SEED, SLOPE, STEPS, WIDTHS, Net

from ds_efficient.core.keys import Key
from ds_efficient.ops.rmm import partition, sketch_matrix

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
AUTO = {"rmm": {"ratio": "auto", "target_variance_ratio": 2, "variance_interval": 2}}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    **{f"zero {stage}": (stage, "fp32", {}) for stage in range(4)},
    "bf16": (1, "bf16", {}),
    "slope": (1, "fp32", {"slope": SLOPE}),
    "slope without ZeRO": (0, "fp32", {"slope": SLOPE}),
    "auto": (1, "fp32", AUTO),
}


@pytest.fixture(scope="module")
def runs(ranks: Ranks) -> dict[str, list[dict[str, Any]]]:
    """Return what each of two ranks found in every case."""
    found = ranks(2).run("rmm_ranks:train_all", list(CASES.values()), timeout=180.0)
    return {name: [rank[number] for rank in found] for number, name in enumerate(CASES)}


def by_hand() -> list[float]:
    """Train both ranks' micro-batches with every S written out, by torch's own AdamW."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.01)
    parts = partition(ROWS, RMM["ratio"], block_size=RMM["block_size"], min_rows=RMM["min_rows"])

    def sketched(name: str, x: torch.Tensor, place: tuple[int, int, int]) -> torch.Tensor:
        layer = getattr(net, name)
        s = sketch_matrix(Key(SEED, ("rmm", name)).fold(*place), "gaussian", parts)
        through_weight = (s @ (s.t() @ x.detach())) @ layer.weight.t()
        y = x @ layer.weight.detach().t() + layer.bias
        return y + (through_weight - through_weight.detach())

    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(MICRO_BATCHES):
            for rank in range(2):
                place = (step, micro, rank)
                x = rmm_ranks.batch(step, micro, rank)
                hidden = torch.tanh(sketched("fc1", x, place))
                y = net.head(torch.tanh(sketched("fc2", hidden, place)))
                total = total + (y - x[..., :4].sin()).square().mean() / (2 * MICRO_BATCHES)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    return losses


def test_every_stage_trains_like_sketches_written_out_by_hand(runs: dict[str, Any]) -> None:
    """Keys of step, micro-batch and data-parallel rank; gradients averaged over ranks and micro-batches."""
    expected = by_hand()
    for stage in range(4):
        for rank in runs[f"zero {stage}"]:
            assert rank["losses"] == pytest.approx(expected, rel=2e-5), stage
    assert runs["bf16"][0]["losses"] == pytest.approx(expected, rel=3e-2)


def test_metrics_and_evidence_say_what_was_saved(runs: dict[str, Any]) -> None:
    for name in ("zero 0", "zero 3", "slope", "bf16"):
        run, element = runs[name][0], 2 if name == "bf16" else 4
        inputs = ROWS * (WIDTHS["fc1"][0] + WIDTHS["fc2"][0]) * element
        assert run["metrics"][-1] == {"layers": 2, "ratio": 0.25, "saved_bytes": 0.75 * inputs}
        counts = run["counts"]
        assert (counts["layers"], counts["layers_projected"], counts["layers_total"]) == (2, 2, 3)
        assert (counts["rows"], counts["rows_kept"]) == (2 * ROWS, 2 * ROWS // 4)
        assert counts["projections"] == 2 * MICRO_BATCHES * STEPS
        assert counts["saved_bytes"] == counts["predicted_bytes"] == 0.75 * inputs
        assert counts["exact_bytes"] == inputs


def test_names_in_checkpoints_are_those_of_the_exact_model(runs: dict[str, Any]) -> None:
    assert runs["zero 1"][0]["names"] == list(Net().state_dict())


def test_slope_and_rmm_act_on_one_layer_together(runs: dict[str, Any]) -> None:
    run = runs["slope"][0]
    assert run["losses"] == pytest.approx(runs["slope without ZeRO"][0]["losses"], rel=2e-5)
    assert run["losses"] != pytest.approx(runs["zero 1"][0]["losses"], rel=1e-3)
    assert run["losses"][-1] < run["losses"][0] and "fc1.slope.mask" in run["names"]


def test_auto_keeps_the_variance_below_the_target_and_is_the_same_on_all_ranks(runs: dict[str, Any]) -> None:
    """With 1/4 of the rows the variance is about four times SGD's; a target of 2 takes about half of them."""
    first, second = runs["auto"]
    assert first["ratios"] == second["ratios"]
    assert all(0.25 < ratio <= 1 for ratio in first["ratios"].values())
    measured = [metrics["variance_ratio"] for metrics in first["metrics"]]
    assert measured[0] == measured[1] > 2.5  # of step 0; the next measurement is of step 2
    assert max(metrics["variance_ratio"] for metrics in first["metrics"][2:]) < 2.5
    assert first["metrics"][-1]["ratio"] > first["metrics"][0]["ratio"] == 0.25
    for mine, others in zip(first["metrics"], second["metrics"], strict=True):
        assert mine["variance"] == others["variance"] > 0 and mine["sgd_variance"] > 0


def test_an_optimizer_that_was_made_before_stays_usable(ranks: Ranks) -> None:
    losses = ranks(1).run("rmm_ranks:own_optimizer")[0]
    assert losses[-1] < losses[0] / 1.3


def test_sketches_that_keep_every_row_are_reported(ranks: Ranks) -> None:
    (message,) = ranks(1).run("rmm_ranks:idle")
    assert message.startswith("2: ") and "0 projected" in message and "see rmm.min_rows" in message


@pytest.mark.parametrize(("stage", "sections"), [(0, {}), (3, AUTO), (1, {"slope": SLOPE})], ids=str)
def test_resumed_runs_are_exact(ranks: Ranks, tmp_path: Path, stage: int, sections: dict[str, Any]) -> None:
    for found in ranks(2).run("rmm_ranks:save_and_resume", str(tmp_path), stage, sections):
        for first in (1, 4):
            resumed = found[str(first)]
            assert resumed["losses"] == found["unbroken"]["losses"][first:], first
            assert resumed["digest"] == found["unbroken"]["digest"], first


def test_a_run_can_be_switched_to_sketches_and_back(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks(2).run("rmm_ranks:switch", str(tmp_path)):
        assert found == {"kept": [True, True], "moved": True, "left": {}}


def test_a_hugging_face_gpt2_trains_with_its_own_names(ranks: Ranks) -> None:
    (found,) = ranks(1).run("rmm_ranks:hugging_face")
    assert found["names"] and found["counts"]["layers_projected"] == found["counts"]["layers"] == 6
    assert found["losses"][-1] < found["losses"][0] - 1.0
