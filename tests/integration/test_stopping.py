"""Runs that end early: by a signal, a limit, a diverged loss, or a failure of one rank."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from failing_ranks import ROOT
from launched import launch, launched, rank_process, steps_done, wait_for
from rank_pool import RankError
from saved_runs import STEPS, Case, Ranks, differences, fails
from tiny_runs import read_records

pytestmark = pytest.mark.distributed

DP2 = Case(2, stage=1)
# Seconds within which a failed run must be over; without care its other ranks wait for 30 minutes.
PATIENCE = 40.0
MISTAKE = "--some-argument 7: is wrong on one rank; correct it"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_saves_and_the_run_resumes_exactly(
    ranks: Ranks, tmp_path: Path, name: str
) -> None:
    whole = DP2.run(ranks, tmp_path / "whole")
    argv = DP2.argv(tmp_path / "stopped", "--eval-iters 1 --eval-interval 3")
    outputs = ranks(2).run("failing_ranks:run_with", name, 1, 3, argv)
    assert outputs == [(0, ""), (0, "")]
    records = read_records(tmp_path / "stopped")
    assert (records[-1]["kind"], records[-1]["step"], records[-1]["reason"]) == ("end", 3, name)
    # Somebody waits: nothing was evaluated at step 3.
    assert [record["step"] for record in records if record["kind"] == "eval"] == [0]
    again = DP2.run(ranks, tmp_path / "stopped")
    assert again.of("resume", "step") == [3]
    assert again.losses == whole.losses
    saved = [tmp_path / run / f"checkpoints/global_step{STEPS}" for run in ("whole", "stopped")]
    assert differences(*saved) == []


def test_a_signal_under_the_launcher(ranks: Ranks, tmp_path: Path) -> None:
    case = Case(2, stage=1, schedule="--lr-decay-style constant")
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with launched(case.argv(stopped, "--train-iters 100000"), tmp_path / "log") as process:
        wait_for(lambda: steps_done(stopped) >= 3)
        rank_process(process.pid, 1).send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
    end = read_records(stopped)[-1]
    assert (end["kind"], end["reason"]) == ("end", "SIGTERM")
    last = end["step"]
    until = f"--train-iters 100000 --exit-interval {last + 2}"
    unbroken = case.run(ranks, whole, until)
    again = case.run(ranks, stopped, until)
    assert again.of("resume", "step") == [last]
    assert again.losses == unbroken.losses


def test_an_interval_stops_after_its_evaluation(ranks: Ranks, tmp_path: Path) -> None:
    run = Case().run(ranks, tmp_path, "--exit-interval 3 --eval-iters 1 --eval-interval 3")
    assert run.records[-1]["reason"] == "--exit-interval 3" and run.of("train", "step") == [1, 2, 3]
    assert run.of("eval", "step") == [0, 3]
    assert (tmp_path / "checkpoints/latest").read_text() == "global_step3"


def test_an_interval_that_ends_with_the_run_changes_nothing(ranks: Ranks, tmp_path: Path) -> None:
    run = Case().run(ranks, tmp_path, f"--exit-interval {STEPS} --eval-iters 1")
    assert run.records[-2]["reason"] == f"--train-iters {STEPS} reached"
    assert [record["split"] for record in run.records if record["kind"] == "eval"] == ["valid"] * 2 + ["test"]


def test_a_time_limit_stops_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    run = Case(2, "--tensor-model-parallel-size 2").run(ranks, tmp_path, "--exit-duration-in-mins 0")
    assert run.status == [0, 0] and run.of("train", "step") == [1]
    assert run.records[-1]["reason"] == "--exit-duration-in-mins"
    assert (tmp_path / "checkpoints/latest").read_text() == "global_step1"


@pytest.mark.parametrize(
    "case",
    [DP2, Case(2, "--tensor-model-parallel-size 2"), Case(2, "--pipeline-model-parallel-size 2")],
    ids=["data", "tensor", "pipeline"],
)
def test_a_diverged_loss_ends_all_ranks_and_is_not_saved(ranks: Ranks, tmp_path: Path, case: Case) -> None:
    optimizer = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e30}}}
    diverging = Case(2, case.arguments, case.stage, optimizer, schedule="")
    status, message = fails(ranks, diverging, tmp_path, "--log-interval 100 --save-interval 1")
    assert seconds_since_last_step(tmp_path) < PATIENCE
    assert status == 2
    assert message.count("training has diverged") == 1 and "Traceback" not in message
    end = read_records(tmp_path)[-1]
    assert end["kind"] == "end" and end["reason"].startswith("diverged: the loss is nan")
    last = int((tmp_path / "checkpoints/latest").read_text().removeprefix("global_step"))
    assert last < end["step"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_on_one_rank_is_printed_once_and_nobody_waits(
    ranks: Ranks, tmp_path: Path, rank: int
) -> None:
    outputs = ranks(2).run("failing_ranks:run_with", "mistake", rank, 3, DP2.argv(tmp_path))
    assert seconds_since_last_step(tmp_path) < PATIENCE
    assert outputs[rank][0] == 2 and MISTAKE in outputs[rank][1]
    assert outputs[1 - rank][0] == 1 and "lost the connection to another rank" in outputs[1 - rank][1]
    both = "".join(text for _, text in outputs)
    assert both.count(MISTAKE) == 1 and "Traceback" not in both


def test_the_same_mistake_on_all_ranks_is_printed_once(ranks: Ranks, tmp_path: Path) -> None:
    missing = Case(2, "", model=[*_without_mock(), "--data-path", str(tmp_path / "missing")])
    status, message = fails(ranks, missing, tmp_path)
    assert status == 2 and message.count("no such dataset") == 1


def _without_mock() -> list[str]:
    from saved_runs import real_data

    return real_data("unused")[:-4]


def test_a_mistake_on_rank_0_ends_the_launcher_with_status_2(tmp_path: Path) -> None:
    script = ROOT / "tests" / "failing_ranks.py"
    status, output = launch(["mistake", "0", "3", *DP2.argv(tmp_path)], tmp_path / "log", script)
    assert seconds_since_last_step(tmp_path) < PATIENCE
    assert status == 2, output
    assert output.count(MISTAKE) == 1 and "Traceback" not in output


def test_a_bug_on_rank_1_ends_the_launcher_with_its_trace(tmp_path: Path) -> None:
    script = ROOT / "tests" / "failing_ranks.py"
    status, output = launch(["bug", "1", "3", *DP2.argv(tmp_path)], tmp_path / "log", script)
    assert seconds_since_last_step(tmp_path) < PATIENCE
    assert status == 1, output
    assert output.count("ZeroDivisionError: a bug on one rank") == 1
    assert output.count("Traceback") == 1


def seconds_since_last_step(folder: Path) -> float:
    return time.time() - (folder / "run.jsonl").stat().st_mtime


def test_a_bug_is_not_taken_for_a_mistake(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="ZeroDivisionError: a bug on one rank"):
        ranks(1).run("failing_ranks:run_with", "bug", 0, 2, Case().argv(tmp_path))
