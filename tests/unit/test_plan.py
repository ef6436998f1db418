"""The plan says what happens to each layer and what a run needs, without torch, DeepSpeed or a device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from torch import nn

from ds_efficient.cli import main
from ds_efficient.config.base import TechniqueSection
from ds_efficient.core.inventory import Inventory, ModelShape, Recompute
from ds_efficient.core.memory import Activations
from ds_efficient.core.plan import build_plan
from ds_efficient.core.plan_text import fold, ranges, show_bytes, show_count
from ds_efficient.core.technique import Action, Evidence, Technique
from ds_efficient.errors import ConfigError, UserError
from ds_efficient.registry import TechniqueRow

SHAPE = ModelShape(4, 64, 4, 256, 32)
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW"},
}


class HalvingSection(TechniqueSection):
    """Section of a technique that exists in this test only."""

    first_layer: int = 1


class Halving(Technique[HalvingSection]):
    """Halves linear_fc2 from a layer on, and drops half the tokens of layer 1."""

    name = "halving"

    def plan(self, inventory: Inventory) -> Sequence[Action]:
        assert self.context.data_parallel_size == 2 and self.context.zero_stage == 1
        actions = [Action("decoder.layers.1", "drop tokens", options={"token_share": 0.5})]
        for module in inventory.linears:
            if module.leaf != "linear_fc2" or module.layer is None:
                continue
            if module.layer < self.config.first_layer:
                actions.append(Action(module.name, "skip", f"layer below {self.config.first_layer}"))
            else:
                actions.append(
                    Action(
                        module.name,
                        "halve",
                        parameters=module.parameters // 2,
                        saved_activation_fraction=0.5,
                        options={"matmul_share": {"forward": 0.5}},
                    )
                )
        return actions

    def apply(self, model, actions) -> None:
        raise AssertionError("a plan must not apply")

    def on_step(self, context):
        return {}

    def evidence(self) -> Evidence:
        return Evidence(True, "")


def _with_technique(**section):
    row = TechniqueRow(
        "halving", ("halving",), f"{__name__}:HalvingSection", "halving_for_test:Halving", "halves"
    )
    return SimpleNamespace(
        source="ds.json",
        deepspeed=dict(CONFIG),
        general=SimpleNamespace(seed=1),
        sections={"halving": HalvingSection(enabled=True, **section)},
        enabled=lambda: [row],
        warnings=["a doubtful key"],
    )


@pytest.fixture
def technique(monkeypatch):
    monkeypatch.setitem(sys.modules, "halving_for_test", SimpleNamespace(Halving=Halving))
    return _with_technique()


def test_plan_has_every_techniques_actions_and_their_effects(technique):
    plan = build_plan(technique, SHAPE, 2)
    plain = build_plan(CONFIG, SHAPE, 2)
    assert [action.action for action in plan.actions["halving"]] == ["drop tokens", "skip", *["halve"] * 3]
    fc2 = SHAPE.ffn * SHAPE.hidden_size + SHAPE.hidden_size
    assert plan.inventory.total_parameters - plan.parameters_after == 3 * (fc2 - fc2 // 2)
    assert plan.model_flops == plain.model_flops
    assert plan.executed_flops.total < plain.executed_flops.total
    assert plan.memory[1].activations < plain.memory[1].activations


def test_text_folds_equal_layers_and_names_skipped_ones(technique):
    text = build_plan(technique, SHAPE, 2).text()
    assert "decoder.layers.0-3.mlp.linear_fc1 " in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert rows["decoder.layers.0.mlp.linear_fc2"].endswith("skip: layer below 1")
    assert rows["decoder.layers.1-3.mlp.linear_fc2"].endswith("halve")
    assert rows["decoder.layers.1"].endswith("drop tokens")
    assert "halving: 4 of 5 modules (skipped: 1 layer below 1)" in text
    assert "warning: a doubtful key" in text
    assert "ZeRO 1 *" in text and "micro-batch 2 x 2 data-parallel ranks x 1 passes" in text


def test_json_holds_the_whole_plan(technique):
    data = json.loads(json.dumps(build_plan(technique, SHAPE, 2).to_json(), allow_nan=False))
    assert data["parameters"] == Inventory.from_shape(SHAPE).total_parameters
    assert len(data["modules"]) == len(Inventory.from_shape(SHAPE))
    assert set(data["memory"]) == {"0", "1", "2", "3"}
    assert data["memory"]["1"]["peak"] > data["memory"]["1"]["parameters"] == 2 * data["parameters_after"]
    assert data["techniques"]["halving"][2]["options"] == {"matmul_share": {"forward": 0.5}}
    assert data["tokens_per_step"] == 2 * 2 * 32
    assert data["model_flops_per_token"]["total"] > 0 and data["communication"]["gradients"] > 0
    assert data["layout"]["data"] == 2


def test_module_and_shape_give_the_same_plan():
    module = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "h": nn.ModuleList([nn.Linear(4, 4)])})
    plan = build_plan(CONFIG, module)
    assert plan.inventory.total_parameters == 40 + 20
    assert any("shape is not known" in line for line in plan.warnings)
    assert plan.memory[1].optimizer == 12 * 60
    assert "h.0" in plan.text()


def test_all_layout_problems_are_reported_at_once():
    with pytest.raises(UserError) as refused:
        build_plan(CONFIG, SHAPE, 6, tensor=4, pipeline=3, sequence_parallel=False, context=2)
    message = str(refused.value)
    assert "6 ranks" in message and "num_layers = 4" in message and "context_parallel_size = 2" in message


def test_configuration_problems_are_config_errors():
    with pytest.raises(ConfigError, match="did you mean"):
        build_plan({"slope": {"enabledd": True}}, SHAPE)


def test_stages_that_do_not_run_are_marked():
    plan = build_plan(CONFIG, SHAPE, 2, pipeline=2, global_batch_size=8)
    assert [bool(problems) for problems in plan.stage_problems] == [False, False, True, True]
    assert "ZeRO 3 does not run: " in plan.text()


def test_recomputation_and_attention_reach_the_numbers():
    plain = build_plan(CONFIG, SHAPE)
    full = build_plan(CONFIG, SHAPE, recompute=Recompute("full", "uniform", 1))
    assert full.memory[1].activations < plain.memory[1].activations
    assert full.executed_flops.total > plain.executed_flops.total
    assert "recomputation: full, uniform, layers 1" in full.text()
    unfused = build_plan(CONFIG, SHAPE, activations=Activations(attention="unfused"))
    assert unfused.memory[1].activations > plain.memory[1].activations


def test_layer_numbers_fold_into_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    rows = [(f"a.{n}.b", n, ("x" if n != 1 else "y",)) for n in range(4)] + [("head.0.w", None, ("x",))]
    assert fold(rows) == [("a.0,2-3.b", ("x",)), ("a.1.b", ("y",)), ("head.0.w", ("x",))]


def test_quantities_are_short():
    assert (show_bytes(0), show_bytes(1536), show_bytes(5 * 2**30)) == ("0 B", "1.5 KiB", "5 GiB")
    assert (show_count(354_000_000), show_count(12), show_count(3.77e18)) == ("354 M", "12", "3.77 E")


LLAMA_70B = (
    "--world-size 1024 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --sequence-parallel "
    "--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --group-query-attention "
    "--num-query-groups 8 --ffn-hidden-size 28672 --vocab-size 128256 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--global-batch-size 1024"
).split()


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**CONFIG, "train_micro_batch_size_per_gpu": 1}))
    return str(path)


def test_a_70b_shape_at_1024_ranks_is_planned_in_seconds_without_torch(config_file):
    program = (
        "import sys, time; from ds_efficient.cli import main; began = time.process_time()\n"
        "status = main(sys.argv[1:])\n"
        "heavy = sorted({'torch', 'megatron', 'deepspeed'} & set(sys.modules))\n"
        "print(status, heavy, time.process_time() - began, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", config_file, "--json", *LLAMA_70B],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    outcome, _, seconds = done.stderr.splitlines()[-1].rpartition(" ")
    assert outcome == "0 []", done.stderr
    assert float(seconds) < 3.0
    data = json.loads(done.stdout)
    assert data["parameters"] == 70_553_706_496
    assert data["layout"]["data"] == 32 and data["model"]["ffn_hidden_size"] == 28672


def test_command_prints_a_plan_for_an_example_and_says_so(config_file, capsys):
    assert main(["plan", config_file]) == 0
    printed = capsys.readouterr()
    assert "24 layers x 1024" in printed.out and "no model sizes given" in printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-layers", "4"], ["--hidden-size: needed", "--num-attention-heads: needed"]),
        (["--num-query-groups", "4"], ["has no effect without --group-query-attention"]),
        (["--world-size", "6", "--tensor-model-parallel-size", "4", "--sequence-parallel"], ["6 ranks"]),
        (["--world-size", "4", "--pipeline-model-parallel-size", "4", "--context-parallel-size", "2"],
         ["4 ranks", "context_parallel_size = 2"]),
        (["--micro-batch-size", "3"], ["train_micro_batch_size_per_gpu = 1 in the JSON"]),
        (["--hidden-dropout", "1.5", "--recompute-activations", "--recompute-granularity", "full"],
         ["--hidden-dropout 1.5", "contradicts"]),
        (["--num-layers", "4", "--hidden-size", "30", "--num-attention-heads", "4"], ["hidden_size = 30"]),
        (["--recompute-granularity", "selective", "--recompute-modules", "everything"], ["everything"]),
    ],
)  # fmt: skip
def test_command_refuses_what_cannot_be(config_file, capsys, arguments, words):
    assert main(["plan", config_file, *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error


def test_command_refuses_a_missing_file(capsys):
    assert main(["plan", "nowhere.json"]) == 2
    assert "nowhere.json" in capsys.readouterr().err
