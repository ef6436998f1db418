"""Evaluation: the same loss on every layout, and from a checkpoint as during the run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from saved_runs import Case, Ranks, fails
from tiny_runs import Outcome

pytestmark = pytest.mark.distributed

EVALUATING = "--eval-iters 2 --eval-interval 4"
TENSOR = "--tensor-model-parallel-size 2"
PIPELINE = "--pipeline-model-parallel-size 2"

LAYOUTS = {
    "dp2": Case(2),
    "dp2-zero3": Case(2, stage=3),
    "tp2": Case(2, TENSOR),
    "tp2-sp": Case(2, f"{TENSOR} --sequence-parallel", stage=1),
    "pp2": Case(2, PIPELINE),
    "dp4": Case(4, stage=1),
    "pp2-tp2": Case(4, f"{PIPELINE} {TENSOR}"),
    "micro-batches": Case(1, "--micro-batch-size 1"),
}


def evaluations(run: Outcome) -> list[tuple[str, int, float]]:
    return [(r["split"], r["step"], r["loss"]) for r in run.records if r["kind"] == "eval"]


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Return the folder and the run on one rank: losses at steps 0, 4, 8, and the test's."""
    folder = tmp_path_factory.mktemp("one")
    run = Case().run(ranks, folder, f"{EVALUATING} --save-interval 4")
    assert [(split, step) for split, step, _ in evaluations(run)] == [
        ("valid", 0),
        ("valid", 4),
        ("valid", 8),
        ("test", 8),
    ]
    return folder, run


def test_evaluation_uses_whole_global_batches(one_rank: tuple[Path, Outcome]) -> None:
    _, run = one_rank
    assert run.of("eval", "tokens") == [2 * 8 * 16] * 4
    for record in (record for record in run.records if record["kind"] == "eval"):
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_evaluates_the_same_samples(
    ranks: Ranks, tmp_path: Path, one_rank: tuple[Path, Outcome], name: str
) -> None:
    """At step 0 the weights are the same to the last bit, so the losses differ by the order of sums alone."""
    run = LAYOUTS[name].run(ranks, tmp_path, f"{EVALUATING} --exit-interval 1")
    assert set(run.status) == {0}
    (split, step, loss), expected = evaluations(run)[0], evaluations(one_rank[1])[0]
    assert (split, step) == ("valid", 0)
    assert loss == pytest.approx(expected[2], rel=1e-6)
    assert run.of("eval", "tokens")[0] == 2 * 8 * 16


@pytest.mark.parametrize("step", [4, 8])
def test_a_checkpoint_evaluates_as_its_run_did(
    ranks: Ranks, tmp_path: Path, one_rank: tuple[Path, Outcome], step: int
) -> None:
    folder, trained = one_rank
    more = f"{EVALUATING} --skip-train --ckpt-step {step} --save {tmp_path}/new"
    run = Case().run(ranks, tmp_path, f"--load {folder}/checkpoints {more}")
    assert run.status == [0]
    assert evaluations(run)[0] in evaluations(trained)
    assert [split for split, _, _ in evaluations(run)] == ["valid", "test"]
    assert run.losses == [] and run.records[-1]["reason"] == "--skip-train"
    assert not (tmp_path / "new/latest").exists()
    if step == 8:
        assert evaluations(run)[1] in evaluations(trained)


@pytest.mark.parametrize("case", [Case(2), Case(2, stage=2)], ids=["dp2", "dp2-zero2"])
def test_a_checkpoint_evaluates_on_other_data_parallel_layouts(
    ranks: Ranks, tmp_path: Path, one_rank: tuple[Path, Outcome], case: Case
) -> None:
    folder, trained = one_rank
    more = f"{EVALUATING} --skip-train --save {tmp_path}/new"
    run = case.run(ranks, tmp_path, f"--load {folder}/checkpoints {more}")
    assert run.status == [0, 0]
    expected = evaluations(trained)[2:]
    assert [loss for _, _, loss in evaluations(run)] == pytest.approx([e[2] for e in expected], rel=1e-6)


def test_a_checkpoint_evaluates_without_the_arguments_of_training(
    ranks: Ranks, tmp_path: Path, one_rank: tuple[Path, Outcome]
) -> None:
    """Neither learning rate nor schedule nor number of steps is needed."""
    folder, trained = one_rank
    config = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    argv = Case(config=config, schedule="").argv(tmp_path, f"{EVALUATING} --skip-train")
    del argv[argv.index("--train-iters") : argv.index("--train-iters") + 2]
    argv[argv.index("--load") + 1] = str(folder / "checkpoints")
    assert ranks(1).run("rank_pool:run_script", argv) == [0]
    from tiny_runs import read_records

    found = evaluations(Outcome([0], read_records(tmp_path)))
    assert found == evaluations(trained)[2:]


def test_nothing_to_evaluate_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    status, message = fails(ranks, Case(), tmp_path, "--skip-train --eval-iters 0")
    assert status == 2 and "--eval-iters 0" in message
