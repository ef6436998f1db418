"""Every rule about combinations refuses what it names, accepts its neighbour, and never raises."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.core import parallelism
from ds_efficient.core.layout import ParallelLayout, optimizer_kind
from ds_efficient.core.parallelism import check, require, table, warnings
from ds_efficient.core.shape import ModelShape, Recompute
from ds_efficient.errors import UserError

TP2 = ParallelLayout(world_size=4, tensor=2, global_batch_size=8)
PP2 = ParallelLayout(world_size=4, pipeline=2, global_batch_size=8, zero_stage=1)

# rule, a layout it refuses, what the message must name, the changed fields that make it run
CASES = [
    (
        "sizes_are_positive",
        ParallelLayout(micro_batch_size=0),
        "micro_batch_size = 0",
        {"micro_batch_size": 1},
    ),
    ("stage_exists", ParallelLayout(zero_stage=4), "stage = 4", {"zero_stage": 3}),
    ("precision_exists", ParallelLayout(precision="fp8"), "'fp8'", {"precision": "bf16"}),
    ("world_holds_whole_models", ParallelLayout(world_size=6, tensor=4), "6 ranks", {"world_size": 8}),
    ("fp16_needs_a_gpu", ParallelLayout(precision="fp16", device="cpu"), "bf16 or fp32", {"device": "cuda"}),
    ("no_context_parallelism", ParallelLayout(world_size=2, context=2), "context", {"context": 1}),
    (
        "no_virtual_pipeline",
        replace(PP2, virtual_pipeline_layers=1),
        "interleaved",
        {"virtual_pipeline_layers": None},
    ),
    ("no_experts", ParallelLayout(num_experts=8), "num_experts = 8", {"num_experts": None}),
    (
        "sequence_parallel_needs_tensor_parallel",
        ParallelLayout(sequence_parallel=True),
        "drop --sequence-parallel",
        {"sequence_parallel": False},
    ),
    ("heads_divide", replace(TP2, heads=3), "num_attention_heads = 3", {"heads": 4}),
    ("query_groups_divide", replace(TP2, query_groups=3), "num_query_groups = 3", {"query_groups": 1}),
    ("mlp_divides", replace(TP2, ffn=33), "ffn_hidden_size = 33", {"ffn": 34}),
    ("vocabulary_divides", replace(TP2, vocab_size=101), "= 101", {"vocab_size": 128}),
    (
        "sequence_divides",
        replace(TP2, sequence_parallel=True, seq_length=15),
        "seq_length = 15",
        {"seq_length": 16},
    ),
    ("layers_divide", replace(PP2, num_layers=3), "num_layers = 3", {"num_layers": 4}),
    (
        "recomputed_layers_exist",
        replace(PP2, num_layers=4, recompute=Recompute("full", "block", 3)),
        "recompute_num_layers = 3",
        {"recompute": Recompute("full", "block", 2)},
    ),
    ("pipeline_needs_low_zero", replace(PP2, zero_stage=2), "stage 0 or 1", {"zero_stage": 1}),
    ("pipeline_needs_low_zero", replace(PP2, zero_stage=3), "stage = 3", {"zero_stage": 0}),
    ("pipeline_has_no_fp16", replace(PP2, precision="fp16"), "bf16 or fp32", {"precision": "bf16"}),
    (
        "tied_pipeline_needs_right_norm",
        replace(PP2, tied_embeddings=True, zero_stage=0, precision="bf16", optimizer="torch_adam"),
        "use stage 1",
        {"zero_stage": 1},
    ),
    (
        "tied_pipeline_needs_right_norm",
        replace(PP2, tied_embeddings=True, zero_stage=0, precision="bf16", optimizer="torch_adam"),
        "use stage 1",
        {"optimizer": "fused_adam"},
    ),
    (
        "half_precision_tensor_parallel_needs_right_norm",
        replace(TP2, precision="bf16", optimizer="torch_adam"),
        "torch_adam",
        {"optimizer": "fused_adam"},
    ),
    (
        "half_precision_tensor_parallel_needs_right_norm",
        replace(TP2, precision="fp16", optimizer="sgd"),
        "sgd",
        {"zero_stage": 1},
    ),
    (
        "no_gradient_accumulation_fusion",
        ParallelLayout(gradient_accumulation_fusion=True),
        "--no-gradient-accumulation-fusion",
        {"gradient_accumulation_fusion": False},
    ),
    (
        "norm_recomputation_needs_transformer_engine",
        ParallelLayout(recompute=Recompute("selective", modules=("layernorm",))),
        "layernorm",
        {"transformer_engine": True},
    ),
    ("no_deepcompile", ParallelLayout(deepcompile=True), "compile.deepcompile", {"deepcompile": False}),
    (
        "offload_needs_a_partition",
        ParallelLayout(offload_optimizer="cpu"),
        "offload_optimizer",
        {"zero_stage": 1},
    ),
    (
        "offload_needs_a_partition",
        ParallelLayout(offload_param="cpu", zero_stage=2),
        "offload_param",
        {"zero_stage": 3},
    ),
    (
        "batches_divide",
        ParallelLayout(world_size=2, micro_batch_size=3, global_batch_size=8),
        "global batch 8",
        {"global_batch_size": 12},
    ),
]


@pytest.mark.parametrize(("name", "layout", "words", "cure"), CASES, ids=[case[0] for case in CASES])
def test_rule_refuses_by_name_and_accepts_the_remedy(name, layout, words, cure):
    rule = getattr(parallelism, name)
    message = rule(layout)
    assert message is not None and words in message
    assert message in check(layout)
    cured = replace(layout, **cure)
    assert rule(cured) is None
    assert check(cured) == []


def test_every_rule_has_a_case():
    assert {rule.__name__ for rule in parallelism.RULES} == {case[0] for case in CASES}


def test_all_problems_are_reported_at_once():
    layout = replace(PP2, zero_stage=2, precision="fp16", device="cpu", context=2)
    with pytest.raises(UserError, match="4 problems") as refused:
        require(layout)
    assert all(
        word in str(refused.value) for word in ("stages 2 and 3", "no fp16", "scale the loss", "context")
    )
    require(PP2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_data_and_tensor_parallelism_run_with_every_stage(stage, precision):
    for layout in (ParallelLayout(world_size=4), TP2, replace(TP2, sequence_parallel=True)):
        assert check(replace(layout, zero_stage=stage, precision=precision)) == []


_sizes = st.integers(-1, 9)
_maybe = st.none() | st.integers(0, 40)


@settings(deadline=None, max_examples=300)
@given(
    st.builds(
        ParallelLayout,
        world_size=_sizes, tensor=_sizes, pipeline=_sizes, context=_sizes, expert=_sizes,
        virtual_pipeline_layers=_maybe, sequence_parallel=st.booleans(), zero_stage=st.integers(-1, 5),
        precision=st.sampled_from(["fp32", "bf16", "fp16", "fp8"]),
        optimizer=st.sampled_from(["fused_adam", "torch_adam", "sgd"]),
        offload_optimizer=st.sampled_from([None, "cpu"]), offload_param=st.sampled_from([None, "nvme"]),
        micro_batch_size=_sizes, global_batch_size=_maybe,
        recompute=st.builds(Recompute, st.sampled_from([None, "full", "selective"]),
                            num_layers=st.none() | st.integers(1, 9),
                            modules=st.sampled_from([("core_attn",), ("layernorm", "mlp")])),
        device=st.sampled_from([None, "cpu", "cuda"]), transformer_engine=st.booleans(),
        gradient_accumulation_fusion=st.booleans(), deepcompile=st.booleans(), num_layers=_maybe,
        heads=_maybe,
        query_groups=_maybe, ffn=_maybe, vocab_size=_maybe, seq_length=_maybe,
        tied_embeddings=st.sampled_from([None, True, False]), num_experts=_maybe,
    )
)  # fmt: skip
def test_checking_never_raises_and_gives_one_line_a_problem(layout):
    messages = check(layout)
    assert all(message and "\n" not in message for message in messages)
    assert len(messages) == len(parallelism.broken_rules(layout))
    warnings(layout)


def _row(section: str, name: str) -> list[str]:
    (line,) = (line for line in section.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip().partition(" ")[0] for cell in line.strip("|").split("|")[1:]]


def test_table_comes_from_the_rules():
    text = table()
    fp32, bf16, fp16 = text.split("### ")[1:]
    assert _row(fp32, "data parallel (DP)") == ["runs"] * 4
    assert _row(fp32, "PP, untied embeddings") == ["runs", "runs", "refused", "refused"]
    assert _row(bf16, "TP x DP") == ["FusedAdam", "runs", "runs", "runs"]
    assert _row(bf16, "PP x DP, tied") == ["FusedAdam", "runs", "refused", "refused"]
    assert _row(fp16, "PP, untied embeddings") == ["refused"] * 4
    for rule in parallelism.RULES:
        assert f"- {rule.__doc__}" in text
    notes = [line for line in text.splitlines() if line[:1].isdigit()]
    cells = {number for part in text.split("[")[1:] for number in part.split("]")[0].split(", ")}
    assert cells == {note.partition(".")[0] for note in notes}


def test_too_few_micro_batches_for_the_stages_are_warned_about():
    assert any("micro-batches" in line for line in warnings(replace(PP2, global_batch_size=2)))
    assert warnings(PP2) == []


def test_layout_is_read_from_the_json():
    shape = ModelShape(4, 32, 4, 128, 16)
    layout = ParallelLayout.from_config(
        {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 3,
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        },
        shape,
        world_size=8,
        tensor=2,
    )
    assert (layout.zero_stage, layout.precision, layout.optimizer) == (2, "bf16", "torch_adam")
    assert (layout.data, layout.global_batch, layout.num_microbatches) == (4, 24, 3)
    assert (layout.offload_optimizer, layout.tied_embeddings, layout.ffn) == ("cpu", True, 128)


def test_micro_batch_follows_from_the_global_batch():
    layout = ParallelLayout.from_config(
        {"train_batch_size": 32, "gradient_accumulation_steps": 4}, world_size=4
    )
    assert (layout.micro_batch_size, layout.num_microbatches) == (2, 4)


def test_contradictions_between_json_and_options_are_all_named():
    config = {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 8, "bf16": {"enabled": True},
              "fp16": {"enabled": True}}  # fmt: skip
    with pytest.raises(UserError) as refused:
        ParallelLayout.from_config(config, world_size=2, micro_batch_size=4, global_batch_size=16)
    message = str(refused.value)
    assert "train_micro_batch_size_per_gpu = 2" in message and "train_batch_size = 8" in message
    assert "bf16.enabled and fp16.enabled" in message
    with pytest.raises(UserError, match="gradient_accumulation_steps = 3"):
        ParallelLayout.from_config(
            {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 8, "gradient_accumulation_steps": 3}
        )


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ({"type": "AdamW"}, "fused_adam"),
        ({"type": "Adam", "params": {"torch_adam": True}}, "torch_adam"),
        ({"type": "Lion"}, "lion"),
        (None, "torch_adam"),
    ],
)
def test_optimizer_is_named_as_deepspeed_chooses_it(section, kind):
    assert optimizer_kind({} if section is None else {"optimizer": section}) == kind
