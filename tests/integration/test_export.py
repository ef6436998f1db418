"""What is exported computes what the model in training computes, whatever layout saved it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from export_ranks import TOKENS, LogitsPool
from rank_pool import RankPool
from tiny_runs import deepspeed_json, train

from ds_efficient.cli import main
from ds_efficient.export import export_hf, load_sparse
from ds_efficient.slope.linear import SlopeLinear

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
LLAMA = "--position-embedding-type rope --normalization RMSNorm --swiglu --rotary-base 5000 "
GROUPS = "--group-query-attention --num-query-groups 2 "
NO_BIAS = "--disable-bias-linear "
UNTIED = "--untie-embeddings-and-output-weights "
SLOPE = {
    "enabled": True,
    "column_mask_interval": 1,
    "patterns": [{"layers": "2", "pattern": "1:4"}],
    "adapter": {"rank": 3, "start_step": 1},
}


@dataclass(frozen=True)
class Case:
    """A run to export.

    Attributes:
        arguments: of the model and the layout.
        size: ranks.
        stage: ZeRO stage.
        slope: whether layers are sparse.
        architecture: expected ``model_type``.
        tolerance: of logits, relative to the largest.
    """

    arguments: str
    size: int
    stage: int
    slope: bool
    architecture: str
    tolerance: float = 1e-5


CASES = {
    # 40 / 2 inputs a rank of linear_fc2: masks of shards end inside a byte
    "llama-tensor": Case(
        f"{LLAMA}{GROUPS}{NO_BIAS}{UNTIED}--ffn-hidden-size 40 --tensor-model-parallel-size 2",
        2, 1, True, "llama",
    ),
    "gpt2-tensor-zero3": Case("--tensor-model-parallel-size 2", 4, 3, True, "gpt2"),
    "gpt2-zero2-bf16": Case("--bf16", 2, 2, True, "gpt2", tolerance=2e-2),
    "llama-biases-pipeline": Case(
        f"{LLAMA}--kv-channels 12 --pipeline-model-parallel-size 2", 2, 1, True, "llama"
    ),
    "qwen2-pipeline": Case(
        f"{LLAMA}{GROUPS}{NO_BIAS}--add-qkv-bias --pipeline-model-parallel-size 2", 2, 0, False, "qwen2"
    ),
    "qwen3": Case(f"{LLAMA}{GROUPS}{NO_BIAS}--qk-layernorm", 1, 0, False, "qwen3"),
    "gpt2-untied": Case(UNTIED, 1, 0, False, "gpt2"),
}  # fmt: skip
SPARSE = [name for name, case in CASES.items() if case.slope]


@dataclass(frozen=True)
class Run:
    """A finished run and the logits of its model."""

    case: Case
    save: Path
    logits: torch.Tensor

    def compare(self, model: Any) -> None:
        """Fail unless a Hugging Face model gives these logits."""
        with torch.no_grad():
            found = model(TOKENS).logits.float()
        limit = self.case.tolerance * float(self.logits.abs().max())
        assert found.shape == self.logits.shape
        assert float((found - self.logits).abs().max()) <= limit


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Return the run of a case; each trains once."""
    known: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in known:
            case, folder = CASES[name], tmp_path_factory.mktemp(name)
            zero = {"stage": case.stage, **({"sub_group_size": 3000} if case.stage == 3 else {})}
            config = deepspeed_json(zero_optimization=zero, **({"slope": SLOPE} if case.slope else {}))
            pool = LogitsPool(ranks(case.size))
            arguments = f"{case.arguments} --lr-decay-style constant --save {folder / 'save'}"
            outcome = train(lambda size: pool, case.size, folder, arguments, config, steps=3)  # type: ignore[arg-type, return-value]
            assert outcome.status == [0] * case.size
            assert pool.logits is not None
            known[name] = Run(case, folder / "save", pool.logits)
        return known[name]

    return run


def from_dense(folder: Path) -> Any:
    """Load with transformers alone; every weight of the model must be in the folder."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


def empty_model(folder: Path, device: str = "meta") -> Any:
    """Return a model of the folder's config.json, on meta without any weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", CASES)
def test_dense_export_gives_the_logits_of_the_model_in_training(
    runs: Callable[[str], Run], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(name)
    out = tmp_path / "out"
    assert main(["export", "hf", str(run.save), str(out), "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert ("weights of sparse layers are dense now" in said) == run.case.slope
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == run.case.architecture
    assert config.get("n_positions", config.get("max_position_embeddings")) == 16
    assert not (out / "slope.json").exists()
    run.compare(from_dense(out))


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_export_and_separate_adapters_give_the_logits_of_the_dense_one(
    runs: Callable[[str], Run], tmp_path: Path, name: str
) -> None:
    run = runs(name)
    sparse, separate, merged = tmp_path / "sparse", tmp_path / "separate", tmp_path / "merged"
    export_hf(run.save, sparse, format="sparse", dtype="fp32")
    export_hf(run.save, separate, merge_adapters=False, dtype="fp32")
    export_hf(run.save, merged, dtype="fp32")
    expected = from_dense(merged)(TOKENS).logits
    for folder in (sparse, separate):
        model = load_sparse(empty_model(folder), folder)
        assert torch.allclose(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-6)
        run.compare(model)
    description = json.loads((sparse / "slope.json").read_text())
    assert description["adapters"] == "active"
    patterns = {layer["pattern"] for layer in description["layers"].values()}
    assert patterns == {"2:4", "1:4"}
    # W^R alone, without what the adapters add
    alone = from_dense_ignoring(separate)
    assert not torch.allclose(alone(TOKENS).logits, expected, rtol=1e-3, atol=1e-4)


def from_dense_ignoring(folder: Path) -> Any:
    """Load with transformers alone, which does not see the adapters."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_sparse_files_hold_exactly_the_kept_values_of_the_dense_ones(
    runs: Callable[[str], Run], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run = runs("llama-tensor")
    export_hf(run.save, tmp_path / "sparse", format="sparse")
    export_hf(run.save, tmp_path / "dense", merge_adapters=False)
    stored, dense = (
        load_file(tmp_path / "sparse/sparse.safetensors"),
        load_file(tmp_path / "dense/model.safetensors"),
    )
    layers = json.loads((tmp_path / "sparse/slope.json").read_text())["layers"]
    assert len(layers) == 4 * 7
    model = load_sparse(empty_model(tmp_path / "sparse"), tmp_path / "sparse")
    for name, layer in layers.items():
        n, m = map(int, layer["pattern"].split(":"))
        values, mask = stored[f"{name}.weight.values"], stored[f"{name}.weight.mask"]
        assert values.shape == (layer["out_features"], layer["in_features"] * n // m)
        assert mask.shape == (layer["out_features"], 4 * -(-layer["in_features"] // 32))
        module = model.get_submodule(name)
        assert isinstance(module, SlopeLinear)
        assert torch.equal(module.dense_weight(), dense[f"{name}.weight"])
        kept = dense[f"{name}.weight"] != 0
        assert (kept.view(kept.shape[0], -1, m).sum(-1) <= n).all()
    others = {name for name in dense if not any(name == f"{layer}.weight" for layer in layers)}
    assert all(torch.equal(stored[name], dense[name]) for name in others)


def test_parts_and_a_model_on_a_real_device_load_too(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = runs("gpt2-tensor-zero3")
    for kind in ("dense", "sparse"):
        done = export_hf(run.save, tmp_path / kind, format=kind, max_file_bytes=20_000)
        assert len(done.files) > 3
        assert {path.name for path in (tmp_path / kind).iterdir() if path.suffix == ".safetensors"} == set(
            done.files
        )
    run.compare(from_dense(tmp_path / "dense"))
    state = torch.get_rng_state()
    run.compare(load_sparse(empty_model(tmp_path / "sparse", "cpu"), tmp_path / "sparse", backend="dense"))
    torch.set_rng_state(state)
    load_sparse(empty_model(tmp_path / "sparse"), tmp_path / "sparse")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_precision_is_the_runs_and_fp32_comes_from_the_optimizer(
    runs: Callable[[str], Run], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run = runs("gpt2-zero2-bf16")
    export_hf(run.save, tmp_path / "plain", merge_adapters=False)
    export_hf(run.save, tmp_path / "wide", merge_adapters=False, dtype="fp32")
    export_hf(run.save, tmp_path / "sparse", format="sparse")
    plain = load_file(tmp_path / "plain/model.safetensors")
    wide = load_file(tmp_path / "wide/model.safetensors")
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    assert all(torch.equal(wide[key].bfloat16(), plain[key]) for key in plain)
    assert any(not torch.equal(wide[key].bfloat16().float(), wide[key]) for key in wide)
    assert json.loads((tmp_path / "plain/config.json").read_text())["dtype"] == "bfloat16"
    for name in ("plain", "sparse"):
        model = load_sparse(empty_model(tmp_path / name), tmp_path / name)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        run.compare(model)
