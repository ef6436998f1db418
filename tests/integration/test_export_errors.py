"""Bad input to ``ds_efficient export`` and to the loader: one message, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from tiny_runs import deepspeed_json, train

from ds_efficient.cli import main
from ds_efficient.core.deepspeed_files import load_file
from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.export import export_hf, load_sparse

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
pytestmark = pytest.mark.distributed

WORDS = [f"word{number}" for number in range(100)]


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer.json of 101 words, the last one the end of document."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra 'data' is not installed")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="word0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def saved(ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoints of a sparse run with a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    write_tokenizer(folder / "tokenizer.json")
    model = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --mock-data --num-workers 0 "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder / 'tokenizer.json'}"
    ).split()
    config = deepspeed_json(slope={"enabled": True, "adapter": {"rank": 2, "start_step": 50}})
    outcome = train(ranks, 1, folder, f"--save {folder / 'save'}", config, steps=1, model=model)
    assert outcome.status == [0]
    return folder / "save"


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoints to damage."""
    shutil.copytree(saved, tmp_path / "save")
    return tmp_path / "save"


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: Any) -> str:
    """Export; fail unless it ends with one message and leaves nothing. Return the message."""
    before = sorted(out.parent.rglob("*"))
    assert main(["export", "hf", *map(str, arguments)]) == 2
    assert sorted(out.parent.rglob("*")) == before
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("ds_efficient export:") == 1
    assert "Traceback" not in written.err
    return written.err


def change_facts(save: Path, **facts: Any) -> None:
    """Write other facts into the manifest."""
    path = save / "global_step1/ds_efficient_manifest.json"
    content = json.loads(path.read_text())
    content["facts"].update({f"--{name.replace('_', '-')}": value for name, value in facts.items()})
    path.write_text(json.dumps(content))


def test_the_tokenizer_of_the_run_comes_along(saved: Path, tmp_path: Path) -> None:
    done = export_hf(saved, tmp_path / "out")
    assert done.notes == ["adapters were left out: they did not take part yet, so outputs are the same"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("word7 word3")["input_ids"] == [7, 3]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, config.eos_token_id) == ("<|endoftext|>", 100)


def test_a_tokenizer_that_has_changed_is_left_out(damaged: Path, tmp_path: Path) -> None:
    path = damaged / "global_step1/ds_efficient_manifest.json"
    content = json.loads(path.read_text())
    content["about"]["tokenizer"]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    done = export_hf(damaged, tmp_path / "out")
    assert any("has changed since the run: not copied" in note for note in done.notes)
    assert not (tmp_path / "out/tokenizer.json").exists()


def test_wrong_paths_and_tags(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/out"
    out.parent.mkdir()
    assert "nowhere: no such folder" in refused(capsys, out, tmp_path / "nowhere", out)
    assert "holds no checkpoint" in refused(capsys, out, tmp_path, out)
    message = refused(capsys, out, saved, out, "--tag", "global_step9")
    assert "global_step9: no such checkpoint. There: global_step1" in message


def test_a_folder_in_use_is_not_written_to(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/out"
    out.mkdir(parents=True)
    (out / "precious").write_text("text")
    assert "exists and is not an empty folder" in refused(capsys, out, saved, out)
    (out / "precious").unlink()
    assert main(["export", "hf", str(saved), str(out)]) == 0
    assert (out / "config.json").is_file()
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, out, saved, tmp_path / "file/out")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--format sparse --merge-adapters", "--merge-adapters: merging makes the weights dense"),
        ("--merge-adapters --separate-adapters", "not allowed with"),
    ],
)
def test_contradictions(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, named: str
) -> None:
    command = ["export", "hf", str(saved), str(tmp_path / "out"), *arguments.split()]
    try:
        status = main(command)
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoints(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "new/out", damaged / "global_step1"
    out.parent.mkdir()
    path = folder / "mp_rank_00_model_states.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    message = refused(capsys, out, damaged, out)
    assert "mp_rank_00_model_states.pt" in message and "Name an earlier one by --tag" in message
    path.write_bytes(bytes(len(whole)))
    assert "cannot be read" in refused(capsys, out, damaged, out)
    path.write_bytes(whole)
    change_facts(damaged, num_layers=3)
    assert "holds 2 layers, its manifest says 3" in refused(capsys, out, damaged, out)
    (folder / "ds_efficient_manifest.json").write_text('{"facts": {}}')
    assert "its manifest does not tell --num-layers" in refused(capsys, out, damaged, out)
    (folder / "ds_efficient_manifest.json").unlink()
    assert "has no ds_efficient_manifest.json" in refused(capsys, out, damaged, out)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"squared_relu": True, "disable_bias_linear": True}, "GPT-2, which has no counterpart of: --sq"),
        ({"position_embedding_type": "none"}, "no counterpart of: --position-embedding-type none"),
        ({"normalization": "RMSNorm", "num_query_groups": 2}, "RMSNorm; --num-query-groups 2"),
        ({"kv_channels": 16, "qk_layernorm": True}, "--qk-layernorm; --kv-channels 16"),
        (
            {"position_embedding_type": "rope"},
            "Llama, which has no counterpart of: --normalization LayerNorm; GELU (no --swiglu)",
        ),
        (
            {
                "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
                "rotary_percent": 0.5, "qk_layernorm": True,
            },
            "Qwen3, which has no counterpart of: --rotary-percent 0.5; biases together with --qk-layernorm",
        ),
    ],
)  # fmt: skip
def test_models_without_a_counterpart_are_named_by_their_arguments(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], facts: dict[str, Any], named: str
) -> None:
    change_facts(damaged, **facts)
    assert named in refused(capsys, tmp_path / "out", damaged, tmp_path / "out")


def test_files_with_foreign_objects_are_refused_and_run_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    class Harm:
        def __reduce__(self) -> Any:
            return pathlib.Path.touch, (tmp_path / "made",)

    torch.save({"module": Harm()}, path)
    with pytest.raises(CheckpointError, match=r"holds objects of .*pathlib.*which are not read"):
        load_file(path)
    assert not (tmp_path / "made").exists()
    with pytest.raises(CheckpointError, match="missing"):
        load_file(tmp_path / "y.pt")
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_file(path)


def test_the_loader_names_what_is_wrong(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    export_hf(saved, folder, format="sparse")

    def fails(match: str, model: Any = None) -> None:
        with torch.device("meta"):
            fresh = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(folder)
            )
        with pytest.raises(UserError, match=match):
            load_sparse(model or fresh, folder)

    fails("has no layer transformer.h.0", torch.nn.Linear(2, 2))
    with torch.device("meta"):
        wider = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=16)
        )
    fails("in GPT2LMHeadModel; make it from the export's config.json", wider)
    description = json.loads((folder / "slope.json").read_text())
    layer = "transformer.h.0.mlp.c_fc"

    def describe(**changes: Any) -> None:
        (folder / "slope.json").write_text(json.dumps({**description, **changes}))

    describe(format_version=2)
    fails("format_version 2; this package reads up to 1")
    describe(layers=[])
    fails("cannot be read")
    other = {**description["layers"][layer], "pattern": "1:2"}
    describe(layers={**description["layers"], layer: other})
    fails("the pattern 1:2 keeps 1 in every group")
    describe(files=["gone.safetensors"])
    fails("gone.safetensors: missing")
    describe()
    path = folder / "sparse.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    fails("cannot be read")
    (folder / "slope.json").unlink()
    fails("it is no sparse export")
