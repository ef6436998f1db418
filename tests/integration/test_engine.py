"""`ds_efficient.initialize` on a plain torch model, with a sixth technique that is one folder and one row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_sixth_technique_goes_through_all_its_calls(ranks: Ranks, stage: int) -> None:
    (found,) = ranks(1).run("engine_ranks:train", stage, {}, 4, {})
    assert found["calls"] == [["plan", "apply", "attach", *["before_step", "on_step"] * 4]]
    assert found["actions"] == {"sixth": ["scale", "skip"]}
    assert found["metrics"] == {"sixth": {"passes": 4.0}}
    assert found["evidence"] == {"sixth": "4 passes scaled"}


def test_the_sixth_technique_changes_the_model(ranks: Ranks) -> None:
    (plain,) = ranks(1).run("engine_ranks:train", 0, None, 2, {})
    (scaled,) = ranks(1).run("engine_ranks:train", 0, {"factor": 0.25}, 2, {})
    assert scaled["losses"] != plain["losses"]
    assert plain["calls"] == [] and plain["metrics"] == {}


def test_accumulation_calls_it_once_an_optimizer_step(ranks: Ranks) -> None:
    (found,) = ranks(1).run("engine_ranks:train", 1, {}, 4, {"gradient_accumulation_steps": 2})
    assert found["calls"] == [["plan", "apply", "attach", *["before_step", "on_step"] * 2]]


def test_a_technique_without_effect_stops_the_run(ranks: Ranks) -> None:
    arguments = (0, {"modules": ["absent"]}, 5, {"ds_efficient": {"evidence_steps": 2}})
    messages = ranks(2).run("engine_ranks:refuse", *arguments)
    assert messages[0] == messages[1]
    assert "after 2 steps" in messages[0] and "sixth: 0 passes scaled" in messages[0]


def test_the_run_context_knows_ranks_and_seed(ranks: Ranks) -> None:
    found = ranks(2).run("engine_ranks:train", 1, {}, 1, {"ds_efficient": {"seed": 7}})
    assert [f["context"]["data_parallel_rank"] for f in found] == [0, 1]
    assert all(f["context"]["data_parallel_size"] == 2 and f["context"]["seed"] == 7 for f in found)
    assert all(f["context"]["zero_stage"] == 1 for f in found)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_state_survives_a_checkpoint(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    saved = ranks(2).run("engine_ranks:save", str(tmp_path), stage)
    loaded = ranks(2).run("engine_ranks:load", str(tmp_path), stage)
    for before, after in zip(saved, loaded, strict=True):
        assert after["state"]["passes"] == before["state"]["passes"] == 3
        assert after["state"]["noise"] == before["state"]["noise"] != [0.0, 0.0, 0.0]
        assert after["losses"] == before["losses"]
    files = sorted(tmp_path.glob("global_step3/ds_efficient_*.pt"))
    assert files
    for path in files:
        assert torch.load(path, weights_only=True)["states"]["sixth"]["version"] == 2


def test_state_goes_over_to_another_data_parallel_size(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks(2).run("engine_ranks:save", str(tmp_path), 0)
    (loaded,) = ranks(1).run("engine_ranks:load", str(tmp_path), 0)
    assert loaded["state"]["noise"] == saved[0]["state"]["noise"]
    assert loaded["losses"] == pytest.approx(saved[0]["losses"], rel=1e-6)


def test_partitions_of_another_data_parallel_size_are_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run("engine_ranks:save", str(tmp_path), 1)
    (loaded,) = ranks(1).run("engine_ranks:load", str(tmp_path), 1)
    assert "saved on 2 data-parallel ranks, this run has 1" in loaded["error"]


def test_a_checkpoint_without_the_state_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    (message,) = ranks(1).run("engine_ranks:load_without_the_technique", str(tmp_path))
    assert "has no state of sixth" in message


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gradient_norm_is_right_at_every_stage(ranks: Ranks, stage: int) -> None:
    for norm, reference in ranks(2).run("engine_ranks:norms", stage):
        assert norm == pytest.approx(reference, rel=1e-5)


def test_parameters_of_another_model_are_refused(ranks: Ranks) -> None:
    (message,) = ranks(1).run("engine_ranks:stale_parameters")
    assert "model_parameters" in message and "lambda model" in message


def test_metrics_reach_the_monitors(ranks: Ranks, tmp_path: Path) -> None:
    (files,) = ranks(1).run("engine_ranks:monitor_file", str(tmp_path))
    assert any("ds_efficient_sixth_passes" in name for name in files), files
