"""A run that stops, saves and resumes is the unbroken run, bit for bit."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_saves import KilledPool
from rank_pool import RankError
from saved_runs import STEPS, Case, ForkingPool, Ranks, differences, fails, real_data, states
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
    "linear": Case(schedule="--lr-decay-style linear --lr-warmup-fraction 0.7 --lr-warmup-init 1e-5"),
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


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_real_data_resumes_exactly_whoever_reads_it(
    tmp_path: Path, corpus: str, before: int, after: int
) -> None:
    case = Case(2, stage=1, model=real_data(corpus))
    workers = [f"--num-workers {count}" for count in (before, after)]
    assert_exact(ForkingPool, case, tmp_path, *workers)  # type: ignore[arg-type]


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
    case, often = Case(2, stage=1), "--save-interval 2"
    whole = case.run(ranks, tmp_path / "whole", often)
    folder = tmp_path / "killed/checkpoints"
    for moment, step, left in (("states", 4, 2), ("engine", 6, 4), ("latest", 8, 6)):
        dying = functools.partial(KilledPool, moment=moment, step=step)
        killed = case.run(dying, tmp_path / "killed", often)  # type: ignore[arg-type]
        assert set(killed.status) == {"killed"}
        assert (folder / "latest").read_text() == f"global_step{left}"
        unfinished = f"global_step{step}" + ("" if moment == "latest" else ".saving")
        assert (folder / unfinished).is_dir()
    last = case.run(ranks, tmp_path / "killed", often)
    assert last.of("resume", "step") == [2, 4, 6]
    assert last.losses[-2:] == whole.losses[-2:]
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    assert names == {f"global_step{step}" for step in (2, 4, 6, 8)}
    assert differences(tmp_path / "whole/checkpoints/global_step8", folder / "global_step8") == []


def test_a_run_killed_between_steps_goes_on_from_its_last_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    case, often = Case(2, stage=1), "--save-interval 4"
    whole = case.run(ranks, tmp_path / "whole", often)
    argv = case.argv(tmp_path / "killed", often)
    with pytest.raises(RankError, match="exit code -9"):
        ranks(2).run("broken_saves:rank_1_killed_in_step", 6, argv)
    last = case.run(ranks, tmp_path / "killed", often)
    assert last.of("resume", "step") == [4]
    assert last.losses[-4:] == whole.losses[-4:]


def test_no_checkpoint_starts_from_the_beginning_unless_one_is_needed(ranks: Ranks, tmp_path: Path) -> None:
    run = Case().run(ranks, tmp_path / "new")
    assert run.status == [0] and run.of("train", "step")[0] == 1
    for more in ("--exit-on-missing-checkpoint", "--finetune", "--skip-train --eval-iters 1"):
        status, message = fails(ranks, Case(), tmp_path / "other", more)
        assert status == 2 and "holds no checkpoint" in message and "Traceback" not in message


def test_an_earlier_step_can_be_named(ranks: Ranks, tmp_path: Path) -> None:
    whole = Case().run(ranks, tmp_path, "--save-interval 2")
    again = Case().run(ranks, tmp_path, "--ckpt-step 4")
    assert again.of("resume", "step") == [4]
    assert again.losses[STEPS:] == whole.losses[4:]
    status, message = fails(ranks, Case(), tmp_path, "--ckpt-step 5")
    assert status == 2 and "global_step5" in message
    assert "global_step2, global_step4, global_step6, global_step8" in message


WEIGHTS = {
    "bf16-zero0": Case(config=BF16),
    "bf16-zero1": Case(2, stage=1, config=BF16),
    "tp2-zero3": Case(2, TENSOR, stage=3),
    "pp2-zero1": Case(2, PIPELINE, stage=1),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_alone_are_those_of_the_step_that_is_named(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """A later evaluation must see them too: copies in fp32 may not bring the initial weights back."""
    case = WEIGHTS[name]
    evaluating = "--eval-iters 1 --eval-interval 4"
    whole = case.run(ranks, tmp_path, f"--save-interval 4 {evaluating}")
    expected = validation(whole)[1]
    plain = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    resting = replace(case, config={**(case.config or {}), **plain})
    for kind, first in (("finetune", 1), ("no-load-optim", 5)):
        more = f"--save {tmp_path}/{kind} --{kind} --ckpt-step 4 {evaluating} --lr 1e-7 --min-lr 0"
        again = resting.run(ranks, tmp_path / kind, f"--load {tmp_path}/checkpoints {more}")
        assert set(again.status) == {0}
        assert again.of("train", "step")[0] == first
        found = validation(again)
        assert found == pytest.approx([expected] * len(found), rel=1e-3)
        if kind == "finetune":
            assert found[0] == pytest.approx(expected, rel=1e-6)
            assert again.of("resume", "step") == [] and again.of("run", "world_size") == [case.size]
        else:
            assert again.of("train", "lr")[0] == pytest.approx(
                whole.of("train", "lr")[4] * 1e-7 / 5e-3, rel=0.1
            )


def validation(run: Outcome) -> list[float]:
    return [record["loss"] for record in run.records if record.get("split") == "valid"]


def test_hyperparameters_are_those_of_the_command_line(ranks: Ranks, tmp_path: Path) -> None:
    """A checkpoint holds its own; a run that asks for others must get them."""
    for stage in (0, 1):
        folder = tmp_path / str(stage)
        case = Case(stage=stage)
        case.run(ranks, folder, "--exit-interval 4 --weight-decay 0.1")
        kept, changed = folder / "kept", folder / "changed"
        for run, decay in ((kept, 0.1), (changed, 0.5)):
            start_again(folder, run)
            assert case.run(ranks, run, f"--weight-decay {decay}").status == [0]
        assert differences(kept / "checkpoints/global_step8", changed / "checkpoints/global_step8")
        for run, decay in ((kept, 0.1), (changed, 0.5)):
            assert decay in weight_decays(run / "checkpoints/global_step8")


def weight_decays(folder: Path) -> set[float]:
    """Return the weight decays of the parameter groups in a checkpoint."""
    found: set[float] = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if "weight_decay" in value:
                found.add(value["weight_decay"])
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                visit(item)

    for _, content in states(folder):
        visit(content)
    return found


def test_our_files_hold_no_pickles(ranks: Ranks, tmp_path: Path) -> None:
    Case(2, stage=1).run(ranks, tmp_path)
    ours = sorted((tmp_path / f"checkpoints/global_step{STEPS}").glob("ds_efficient_*.pt"))
    assert [path.name for path in ours] == [
        "ds_efficient_mp_00.pt",
        "ds_efficient_rank_00000.pt",
        "ds_efficient_rank_00001.pt",
    ]
    for path in ours:
        assert torch.load(path, weights_only=True)["format"] == 1


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a checkpoint folder at step 4 by the name of a case; each is made once."""
    known: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in known:
            folder = tmp_path_factory.mktemp("saved")
            assert set(SAVED[name].run(ranks, folder, "--exit-interval 4").status) == {0}
            known[name] = folder / "checkpoints"
        return known[name]

    return get


SAVED = {"zero0": Case(2), "zero1": Case(2, stage=1), "zero3": Case(2, stage=3), "tp2": Case(2, TENSOR)}
OTHER = {
    "dp-zero1": ("zero1", Case(1, stage=1), "", "saved on 2 data-parallel ranks, this run has 1"),
    "tp": ("zero0", Case(2, TENSOR), "", "--tensor-model-parallel-size 1, this run has 2"),
    "pp": ("zero0", Case(2, PIPELINE), "", "--pipeline-model-parallel-size 1, this run has 2"),
    "stage": ("zero1", Case(2, stage=2), "", "zero_optimization.stage 1, this run has 2"),
    "precision": ("zero0", Case(2, config=BF16), "", "precision fp32, this run has bf16"),
    "tp-weights": ("tp2", Case(1), "--finetune", "--tensor-model-parallel-size 2, this run has 1"),
    "zero3-weights": ("zero3", Case(1, stage=3), "--finetune", "saved on 2 data-parallel ranks"),
    "hidden": ("zero0", Case(2), "--hidden-size 64", "--hidden-size 32, this run has 64"),
    "heads": ("zero0", Case(2), "--num-attention-heads 8", "--num-attention-heads 4, this run has 8"),
    "layers": ("zero1", Case(2, stage=1), "--num-layers 2", "--num-layers 4, this run has 2"),
    "heads-weights": ("zero0", Case(2), "--finetune --num-attention-heads 8", "--num-attention-heads 4"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    ranks: Ranks, tmp_path: Path, saved: Callable[[str], Path], name: str
) -> None:
    source, case, more, expected = OTHER[name]
    before = listing(saved(source))
    save = f"--save {tmp_path}/new --load {saved(source)} {more}"
    status, message = fails(ranks, case, tmp_path, save)
    assert status == 2 and expected in message and "Traceback" not in message
    assert listing(saved(source)) == before
    assert listing(tmp_path / "new") == {}


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.*")}


@pytest.mark.parametrize(
    ("source", "case", "more"),
    [
        ("zero0", Case(1), ""),
        ("zero0", Case(2, stage=1), "--finetune"),
        ("zero1", Case(1, stage=2), "--no-load-optim"),
        ("zero1", Case(2, stage=2, config=BF16), "--finetune"),
    ],
    ids=["dp1", "zero0-to-1", "zero1-to-dp1-zero2", "fp32-to-bf16"],
)
def test_what_fits_another_layout_is_loaded(
    ranks: Ranks, tmp_path: Path, saved: Callable[[str], Path], source: str, case: Case, more: str
) -> None:
    evaluating = "--eval-iters 2 --eval-interval 1"
    same = SAVED[source].run(ranks, tmp_path / "same", f"--load {saved(source)} --skip-train {evaluating}")
    expected = same.of("eval", "loss")[0]
    save = f"--save {tmp_path}/new --load {saved(source)} {evaluating}"
    run = case.run(ranks, tmp_path / "other", f"{save} {more}")
    assert set(run.status) == {0}
    if "--finetune" in more:
        assert run.of("eval", "loss")[0] == pytest.approx(expected, rel=1e-2 if case.config else 1e-5)
    else:
        assert run.of("train", "step") == [5, 6, 7, 8]
        assert run.of("train", "tokens")[0] == 5 * 8 * 16
        assert run.of("eval", "loss")[0] == pytest.approx(expected, rel=0.05)


def test_another_number_of_samples_is_said_to_change_the_order(
    ranks: Ranks, tmp_path: Path, corpus: str
) -> None:
    case = Case(2, model=real_data(corpus))
    case.run(ranks, tmp_path, "--exit-interval 4")
    outputs = ranks(2).run("broken_saves:run_with_log", case.argv(tmp_path, "--train-iters 6"))
    said = [output.count("the order of the data changes") for _, output in outputs]
    assert said == [1, 0]
    assert "num_samples: was" in outputs[0][1]
    outputs = ranks(2).run("broken_saves:run_with_log", case.argv(tmp_path, "--ckpt-step 4"))
    assert [output.count("the order of the data changes") for _, output in outputs] == [0, 0]
