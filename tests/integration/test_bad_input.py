"""Users' mistakes: one message with argument, value and remedy; exit status 2; nothing overwritten."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launched import launch
from saved_runs import Case, Ranks, fails, real_data

pytestmark = pytest.mark.distributed

TENSOR = "--tensor-model-parallel-size"
PIPELINE = "--pipeline-model-parallel-size"


@dataclass(frozen=True)
class Mistake:
    """Command line and JSON of a mistake, and what the message must hold.

    ``{folder}`` stands for the test's folder; a value None in the JSON removes the key.
    """

    expected: tuple[str, ...]
    arguments: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    case: Case = field(default_factory=Case)


CONFIG = {
    "misspelt key": Mistake(
        ("ds_efficient.sed", "unknown key", '"seed"'), config={"ds_efficient": {"sed": 1}}
    ),
    "misspelt key of a technique": Mistake(
        ("slope.enabld", "unknown key", '"enabled"'), config={"slope": {"enabld": True}}
    ),
    "misspelt key of DeepSpeed": Mistake(
        ("zero_optimization.stge", "stage"), config={"zero_optimization": {"stge": 1}}
    ),
    "automatic value": Mistake(
        ("train_micro_batch_size_per_gpu", "auto"), config={"train_micro_batch_size_per_gpu": "auto"}
    ),
    "inverse factors that would grow": Mistake(
        ("mkor.stabilizer", "zeta = 0.99", "gamma = 0.95"),
        config={"mkor": {"enabled": True, "stabilizer": {"zeta": 0.99}}},
    ),
    "missing": Mistake(("missing.json", "no such file"), "--deepspeed_config {folder}/missing.json"),
    "not JSON": Mistake(("broken.json", "not valid JSON"), "--deepspeed_config {folder}/broken.json"),
    "micro-batch of zero": Mistake(
        ("train_micro_batch_size_per_gpu", "0"), config={"train_micro_batch_size_per_gpu": 0}
    ),
}
CONTRADICTIONS = {
    "learning rate": Mistake(("optimizer.params.lr: 0.005", "--lr 0.1", "remove one"), "--lr 0.1"),
    "micro batch": Mistake(
        ("train_micro_batch_size_per_gpu: 4", "--micro-batch-size 2"),
        config={"train_micro_batch_size_per_gpu": 4},
    ),
    "global batch": Mistake(
        ("train_batch_size: 16", "--global-batch-size 8"), config={"train_batch_size": 16}
    ),
    "accumulation": Mistake(
        ("gradient_accumulation_steps: 3", "= 4"), config={"gradient_accumulation_steps": 3}
    ),
    "global batch that does not divide": Mistake(
        ("global batch 7", "micro-batch 2"), "--global-batch-size 7"
    ),
    "bf16 and fp16": Mistake(("bf16", "fp16"), "--fp16", {"bf16": {"enabled": True}}),
    "bf16 switched off": Mistake(("bf16.enabled: False", "--bf16"), "--bf16", {"bf16": {"enabled": False}}),
    "clipping": Mistake(("gradient_clipping: 0.5", "--clip-grad 2.0"), "--clip-grad 2"),
    "schedule": Mistake(
        ("scheduler: WarmupLR", "--lr-warmup-iters"), config={"scheduler": {"type": "WarmupLR", "params": {}}}
    ),
    "no steps": Mistake(("--train-iters 0", "at least 1"), "--train-iters 0"),
    "no heads": Mistake(("--num-attention-heads 0", "at least 1"), "--num-attention-heads 0"),
    "not a number": Mistake(("--clip-grad nan",), "--clip-grad nan"),
    "warm-up": Mistake(("--lr-warmup-iters 9", "8 steps"), "--lr-warmup-iters 9"),
    "minimum above the peak": Mistake(("--min-lr 1.0", "0.005"), "--min-lr 1"),
    "unknown argument": Mistake(("--hiden-size", "did you mean --hidden-size"), "--hiden-size 3"),
    "wrong type": Mistake(("--train-iters", "'many'"), "--train-iters many"),
}
LAYOUT = {
    "too few ranks": Mistake(("1 processes", "= 2", "deepspeed --num_gpus"), f"{TENSOR} 2"),
    "heads": Mistake(
        ("num_attention_heads = 3", "tensor_model_parallel_size = 2"),
        f"{TENSOR} 2 --num-attention-heads 3 --hidden-size 48 --ffn-hidden-size 96",
        case=Case(2),
    ),
    "layers": Mistake(
        ("num_layers = 3", "pipeline_model_parallel_size = 2"), f"{PIPELINE} 2 --num-layers 3", case=Case(2)
    ),
    "pipeline with ZeRO 2": Mistake(("zero_optimization.stage = 2",), f"{PIPELINE} 2", case=Case(2, stage=2)),
    "fp16 on a CPU": Mistake(("fp16", "CPU", "bf16 or fp32"), "--fp16"),
    "Transformer Engine": Mistake(("transformer_engine",), "--transformer-impl transformer_engine"),
    "context parallelism": Mistake(("context_parallel_size = 2",), "--context-parallel-size 2", case=Case(2)),
}
FILES = {
    "output under a file": Mistake(
        ("--save", "broken.json/runs", "annot"), "--save {folder}/broken.json/runs"
    ),
    "log under a file": Mistake(("--run-dir", "broken.json/log"), "--run-dir {folder}/broken.json/log"),
    "log is a folder": Mistake(("run log", "log/run.jsonl"), "--run-dir {folder}/log"),
    "tokenizer's type": Mistake(("--tokenizer-type Words", "ByteLevelTokenizer"), "--tokenizer-type Words"),
    "tokenizer's model": Mistake(
        ("--tokenizer-model", "none.json", "No such file"), "--tokenizer-model {folder}/none.json"
    ),
    "not a tokenizer": Mistake(
        ("--tokenizer-model", "broken.json"), "--tokenizer-model {folder}/broken.json"
    ),
}


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(mistake, id=f"{group}-{name.replace(' ', '_')}")
        for group, table in (
            ("config", CONFIG),
            ("contradiction", CONTRADICTIONS),
            ("layout", LAYOUT),
            ("files", FILES),
        )
        for name, mistake in table.items()
    ],
)
def test_a_mistake_gives_one_message(ranks: Ranks, tmp_path: Path, mistake: Mistake) -> None:
    (tmp_path / "broken.json").write_text("{this is: [no JSON")
    (tmp_path / "log" / "run.jsonl").mkdir(parents=True)
    case = replace(mistake.case, config=mistake.config)
    arguments = mistake.arguments.replace("{folder}", str(tmp_path))
    refused(ranks, case, tmp_path, arguments, mistake.expected)


def refused(ranks: Ranks, case: Case, folder: Path, arguments: str, expected: tuple[str, ...]) -> str:
    """Run; check that it ends with one message that holds `expected`, and writes nothing."""
    case.argv(folder, arguments)  # writes the JSON
    before = contents(folder)
    status, message = fails(ranks, case, folder, arguments)
    assert status == 2
    assert message.startswith("pretrain_gpt.py: ") and message.count("pretrain_gpt.py") == 1
    assert "Traceback" not in message
    for text in expected:
        assert text in message
    assert contents(folder) == before
    return message


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file in a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_misspelt_section_is_warned_of_once(ranks: Ranks, tmp_path: Path) -> None:
    """Other tools may put sections of their own at the top level, so that it is no error."""
    argv = Case(2, config={"slop": {"enabled": True}}).argv(tmp_path)
    outputs = ranks(2).run("broken_saves:run_with_log", argv)
    assert [status for status, _ in outputs] == [0, 0]
    assert [output.count('did you mean "slope"?') for _, output in outputs] == [1, 0]


def test_all_contradictions_are_told_at_once(ranks: Ranks, tmp_path: Path) -> None:
    expected = ("--lr 0.1", "--clip-grad 2.0", "train_batch_size: 16")
    refused(ranks, Case(config={"train_batch_size": 16}), tmp_path, "--lr 0.1 --clip-grad 2", expected)


def dataset(folder: Path, tokens: int = 4000, sidecar: bool = True) -> str:
    """Write a byte-level dataset of `tokens` ids in documents of 100."""
    import prepare_data

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n".join(["x" * 99] * (tokens // 100)))
    arguments = f"--input {folder}/text.txt --output-prefix {folder}/data --text-document line --workers 1"
    assert prepare_data.main(arguments.split()) == 0
    if not sidecar:
        (folder / "data_text_document.json").unlink()
    return f"{folder}/data_text_document"


def test_data_that_is_not_there(ranks: Ranks, tmp_path: Path) -> None:
    case = Case(model=real_data(str(tmp_path / "nothing")))
    refused(ranks, case, tmp_path, "", ("data prefix", "nothing.bin", "nothing.idx"))


def test_truncated_data(ranks: Ranks, tmp_path: Path) -> None:
    prefix = dataset(tmp_path)
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.truncate(1000)
    refused(ranks, Case(model=real_data(prefix)), tmp_path, "", ("1000 bytes", "prepare the data again"))


@pytest.mark.parametrize("sidecar", [True, False])
def test_data_of_another_vocabulary(ranks: Ranks, tmp_path: Path, sidecar: bool) -> None:
    case = Case(model=real_data(dataset(tmp_path, sidecar=sidecar)))
    other = "--tokenizer-type NullTokenizer --vocab-size 50"
    refused(ranks, case, tmp_path, other, ("data prefix", "NullTokenizer of 51 ids", "give th"))


def test_a_sequence_longer_than_the_data(ranks: Ranks, tmp_path: Path) -> None:
    case = Case(model=real_data(dataset(tmp_path)))
    expected = ("--seq-length 100000", "tokens", "shorten --seq-length")
    refused(ranks, case, tmp_path, "--seq-length 100000", expected)


def test_a_validation_part_shorter_than_a_sequence(ranks: Ranks, tmp_path: Path) -> None:
    case = Case(model=real_data(dataset(tmp_path)))
    refused(ranks, case, tmp_path, "--split 100,0,0 --eval-iters 1", ("no valid data", "--eval-iters 0"))


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    case = Case(2, stage=1)
    assert case.run(ranks, folder, "--save-interval 2 --exit-interval 4").status == [0, 0]
    return folder / "checkpoints"


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoints to damage."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def cut(path: Path) -> None:
    """Remove the last third of a file."""
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size * 2 // 3)


@pytest.mark.parametrize(
    "name",
    ["mp_rank_00_model_states.pt", "ds_efficient_mp_00.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"],
)
def test_a_truncated_checkpoint(ranks: Ranks, tmp_path: Path, damaged: Path, name: str) -> None:
    cut(damaged / "global_step4" / name)
    expected = (f"{name}: ", "bytes, was", "--ckpt-step", "global_step2")
    refused(ranks, Case(2, stage=1), tmp_path, "", expected)
    other = Case(2, stage=1).run(ranks, tmp_path, "--ckpt-step 2")
    assert other.status == [0, 0] and other.of("resume", "step") == [2]


def test_a_checkpoint_without_a_file(ranks: Ranks, tmp_path: Path, damaged: Path) -> None:
    (damaged / "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    refused(ranks, Case(2, stage=1), tmp_path, "", ("zero_pp_rank_1", "missing", "global_step2"))


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "ds_efficient_rank_00001.pt"])
def test_a_checkpoint_with_scrambled_bytes(ranks: Ranks, tmp_path: Path, damaged: Path, name: str) -> None:
    """The size is right, so only the reader notices."""
    path = damaged / "global_step4" / name
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
    statuses = ranks(2).run("rank_pool:run_script_with_output", Case(2, stage=1).argv(tmp_path))
    message = "".join(text for _, text in statuses)
    assert 2 in {status for status, _ in statuses} and "Traceback" not in message
    assert "global_step4" in message and "cannot" in message


def test_a_checkpoint_whose_save_was_interrupted(ranks: Ranks, tmp_path: Path, damaged: Path) -> None:
    (damaged / "global_step4/ds_efficient_manifest.json").unlink()
    refused(ranks, Case(2, stage=1), tmp_path, "", ("was interrupted", "--ckpt-step", "global_step2"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "latest: empty"), ("global_step9\n", "names 'global_step9'"), ("\0\xff", "latest")],
)
def test_a_wrong_latest(ranks: Ranks, tmp_path: Path, damaged: Path, content: str, expected: str) -> None:
    (damaged / "latest").write_bytes(content.encode("latin-1"))
    refused(ranks, Case(2, stage=1), tmp_path, "", (expected, "--ckpt-step", "global_step2, global_step4"))


def test_a_manifest_that_is_not_json(ranks: Ranks, tmp_path: Path, damaged: Path) -> None:
    cut(damaged / "global_step4/ds_efficient_manifest.json")
    refused(ranks, Case(2, stage=1), tmp_path, "", ("manifest.json: not JSON", "earlier checkpoint"))


def test_the_launcher_passes_a_refusal_before_the_start_on(tmp_path: Path) -> None:
    case = Case(2, config={"ds_efficient": {"sed": 1}})
    status, output = launch(case.argv(tmp_path), tmp_path / "log")
    assert status == 2
    assert output.count("ds_efficient.sed: unknown key") == 1 and "Traceback" not in output


def test_the_launcher_passes_a_refusal_after_the_start_on(tmp_path: Path) -> None:
    case = Case(2, model=real_data(str(tmp_path / "nothing")))
    status, output = launch(case.argv(tmp_path), tmp_path / "log")
    assert status == 2
    assert output.count("no such dataset") == 1 and "Traceback" not in output


def test_a_checkpoint_is_not_touched_by_a_refused_run(ranks: Ranks, tmp_path: Path, damaged: Path) -> None:
    message = refused(ranks, Case(2, stage=1), tmp_path, "--hidden-size 64", ("--hidden-size 32",))
    assert json.loads((damaged / "global_step4/ds_efficient_manifest.json").read_text())["facts"]
    assert "this run has 64" in message
