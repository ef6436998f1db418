"""A run that stops, saves and resumes is the unbroken run, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from saved_runs import STEPS, Case, Ranks, differences, real_data
from tiny_runs import Outcome

TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
BF16 = {"bf16": {"enabled": True}}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 5e-3, "warmup_num_steps": 5}}}
HALF = STEPS // 2

pytestmark = pytest.mark.distributed

CASES = {
    "one-rank": Case(),
    "dp2-zero0": Case(2),
    "dp2-zero1": Case(2, stage=1),
    "dp2-zero2": Case(2, stage=2),
    "dp2-zero3": Case(2, stage=3),
    "tp2-sp": Case(2, TENSOR, stage=1),
    "pp2": Case(2, PIPELINE),
    "pp2-zero1": Case(2, PIPELINE, stage=1),
    "bf16-zero1": Case(2, stage=1, config=BF16),
    "bf16-zero0": Case(config=BF16),
    "recomputed": Case(arguments="--recompute-granularity full"),
    "linear": Case(schedule="--lr-decay-style linear --lr-warmup-fraction 0.7 --lr-warmup-init 1e-5"),
    "inverse-square-root": Case(schedule="--lr-decay-style inverse-square-root --lr-warmup-iters 2"),
    "scheduler-of-the-json": Case(stage=1, config=WARMUP, schedule=""),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the prefix of a small byte-level dataset."""
    import prepare_data

    folder = tmp_path_factory.mktemp("corpus")
    text = [f"Document {number}: {'abc defg ' * (number % 7 + 3)}" for number in range(60)]
    (folder / "text.txt").write_text("\n".join(text))
    arguments = f"--input {folder}/text.txt --output-prefix {folder}/tiny --text-document line --workers 1"
    assert prepare_data.main(arguments.split()) == 0
    return f"{folder}/tiny_text_document"


def start_again(unbroken: Path, broken: Path, step: int = HALF) -> None:
    """Leave in `broken` what a run had on disk when it was killed after saving `step`."""
    (broken / "checkpoints").mkdir(parents=True)
    shutil.copytree(unbroken / f"checkpoints/global_step{step}", broken / f"checkpoints/global_step{step}")
    (broken / "checkpoints/latest").write_text(f"global_step{step}")


def assert_same_from(step: int, found: Outcome, expected: Outcome) -> None:
    for name in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert found.of("train", name) == expected.of("train", name)[step:], name


def assert_exact(ranks: Ranks, case: Case, folder: Path, first: str = "", second: str = "") -> None:
    unbroken = case.run(ranks, folder / "unbroken", f"--save-interval {HALF} {first}")
    assert set(unbroken.status) == {0} and len(unbroken.losses) == STEPS
    start_again(folder / "unbroken", folder / "broken")
    broken = case.run(ranks, folder / "broken", second)
    assert set(broken.status) == {0}
    assert broken.of("resume", "step") == [HALF]
    assert_same_from(HALF, broken, unbroken)
    saved = [folder / run / "checkpoints" / f"global_step{STEPS}" for run in ("unbroken", "broken")]
    assert differences(*saved) == []


@pytest.mark.parametrize("name", CASES)
def test_every_layout_resumes_exactly(ranks: Ranks, tmp_path: Path, name: str) -> None:
    assert_exact(ranks, CASES[name], tmp_path)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 2)])
def test_real_data_resumes_exactly_whoever_reads_it(
    ranks: Ranks, tmp_path: Path, corpus: str, before: int, after: int
) -> None:
    case = Case(2, stage=1, model=real_data(corpus))
    workers = [f"--num-workers {count}" for count in (before, after)]
    assert_exact(ranks, case, tmp_path, *workers)


def test_evaluations_do_not_change_the_training(ranks: Ranks, tmp_path: Path, corpus: str) -> None:
    evaluating = "--eval-interval 2 --eval-iters 1"
    case = Case(2, stage=3, model=real_data(corpus))
    assert_exact(ranks, case, tmp_path, "--eval-iters 1 --eval-interval 100", evaluating)


def test_a_resumed_run_adds_to_the_log(ranks: Ranks, tmp_path: Path) -> None:
    first = Case().run(ranks, tmp_path, f"--exit-interval {HALF}")
    assert [record["kind"] for record in first.records] == ["run", *["train"] * HALF, "end"]
    second = Case().run(ranks, tmp_path)
    assert second.records[: len(first.records)] == first.records
    added = [record["kind"] for record in second.records[len(first.records) :]]
    assert added == ["resume", *["train"] * HALF, "end"]
    third = Case().run(ranks, tmp_path)  # nothing is left to do
    assert [record["kind"] for record in third.records[len(second.records) :]] == ["resume", "end"]


def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(ranks: Ranks, tmp_path: Path) -> None:
    whole = Case(2, stage=1).run(ranks, tmp_path / "whole", "--save-interval 2")
    folder = tmp_path / "killed" / "checkpoints"
    arguments = [tmp_path / "killed", "--save-interval 2"]
    for moment, last in (("states", 2), ("engine", 4), ("manifest", 6)):
        status = ranks(2).run("broken_saves:killed_at", moment, last + 2, str(tmp_path / "killed"))
        assert set(status) == {"killed"}
        if last > 2:
            assert (folder / "latest").read_text() == f"global_step{last}"
        assert (folder / f"global_step{last + 2}.saving").is_dir()
    killed = Case(2, stage=1).run(ranks, *arguments)  # type: ignore[arg-type]
    assert killed.of("train", "loss")[-2:] == whole.losses[-2:]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        f"global_step{step}" for step in (2, 4, 6, 8)
    ]
    saved = [tmp_path / run / f"checkpoints/global_step{STEPS}" for run in ("whole", "killed")]
    assert differences(*saved) == []
