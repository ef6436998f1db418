"""Command line and JSON become one truth, or are refused where they differ."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining.arguments import parse_args
from pretraining.settings import NEVER, Settings, reconcile

from ds_efficient.errors import UserError

BASE = (
    "--deepspeed_config ds.json --num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 4 "
    "--mock-data --train-iters 5"
)
OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
BATCH = "--micro-batch-size 2 --global-batch-size 8"


def settle(more: str = BATCH, config: dict[str, Any] | None = None, world: int = 1) -> Settings:
    return reconcile(parse_args(f"{BASE} {more}".split()), OPTIMIZER if config is None else config, world)


def refusal(more: str = BATCH, config: dict[str, Any] | None = None, world: int = 1) -> str:
    with pytest.raises(UserError) as raised:
        settle(more, config, world)
    return str(raised.value)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.data())
@settings(deadline=None)
def test_every_way_to_give_a_batch_gives_the_same_one(
    micro: int, passes: int, ranks: int, data: st.DataObject
) -> None:
    """Any two of the three numbers, each in the JSON, on the command line, or in both."""
    total = micro * passes * ranks
    keys = {
        "train_micro_batch_size_per_gpu": (micro, "--micro-batch-size"),
        "train_batch_size": (total, "--global-batch-size"),
        "gradient_accumulation_steps": (passes, None),
    }
    chosen = data.draw(st.sets(st.sampled_from(sorted(keys)), min_size=2))
    config, more = dict(OPTIMIZER), ""
    for key in chosen:
        value, flag = keys[key]
        where = data.draw(st.sampled_from(["json", "both", "line"])) if flag else "json"
        if where != "line":
            config[key] = value  # type: ignore[assignment]
        if where != "json":
            more += f" {flag} {value}"
    found = settle(more, config, ranks)
    assert (found.micro_batch_size, found.global_batch_size, found.num_microbatches) == (micro, total, passes)
    assert found.data_parallel_size == ranks
    written = found.deepspeed
    product = written["train_micro_batch_size_per_gpu"] * written["gradient_accumulation_steps"] * ranks
    assert product == written["train_batch_size"] == total


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64), st.integers(1, 8))
@settings(deadline=None)
def test_a_batch_is_divided_or_refused(micro: int, passes: int, total: int, ranks: int) -> None:
    config = {**OPTIMIZER, "gradient_accumulation_steps": passes}
    more = f"--micro-batch-size {micro} --global-batch-size {total}"
    if micro * passes * ranks == total:
        assert settle(more, config, ranks).num_microbatches == passes
    else:
        message = refusal(more, config, ranks)
        assert f"global batch {total}" in message and f"{ranks} data-parallel ranks" in message


def test_a_micro_batch_alone_is_one_pass() -> None:
    assert settle("--micro-batch-size 3", world=2).global_batch_size == 6
    assert "--micro-batch-size: needed" in refusal("")
    assert settle("--global-batch-size 6", world=2).micro_batch_size == 3


def test_pipeline_stages_get_the_batch_in_one_piece() -> None:
    found = settle(f"{BATCH} --pipeline-model-parallel-size 2", world=4)
    assert (found.micro_batch_size, found.num_microbatches, found.data_parallel_size) == (2, 2, 2)
    assert found.deepspeed["train_micro_batch_size_per_gpu"] == 4
    assert found.deepspeed["gradient_accumulation_steps"] == 1


def test_samples_become_steps() -> None:
    args = f"{BASE.replace('--train-iters 5', '--train-samples 20')} {BATCH}".split()
    assert reconcile(parse_args(args), OPTIMIZER, 1).train_iters == 2
    args[args.index("20")] = "7"
    with pytest.raises(UserError, match="--train-samples 7: fewer than one global batch of 8"):
        reconcile(parse_args(args), OPTIMIZER, 1)


@pytest.mark.parametrize(
    ("more", "config", "precision"),
    [
        ("", {}, "fp32"),
        ("--bf16", {}, "bf16"),
        ("", {"bf16": {"enabled": True}}, "bf16"),
        ("--bf16", {"bf16": {"enabled": True}}, "bf16"),
        ("--fp16", {"fp16": {"loss_scale": 128}}, "fp16"),
        ("", {"bf16": {"enabled": False}, "fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_precision(more: str, config: dict[str, Any], precision: str) -> None:
    found = settle(f"{BATCH} {more}", {**OPTIMIZER, **config})
    assert found.precision == precision
    for name in ("bf16", "fp16"):
        assert bool(found.deepspeed.get(name, {}).get("enabled")) == (name == precision)


CONTRADICTIONS = [
    ("--bf16", {"bf16": {"enabled": False}}, "bf16.enabled: False in the JSON, --bf16 True"),
    ("--bf16", {"fp16": {"enabled": True}}, "bf16 and fp16: both enabled"),
    ("--lr 0.5", {}, "optimizer.params.lr: 0.001 in the JSON, --lr 0.5"),
    ("--clip-grad 2", {"gradient_clipping": 1.0}, "gradient_clipping: 1.0 in the JSON, --clip-grad 2.0"),
    ("--seed 3", {"ds_efficient": {"seed": 4}}, "ds_efficient.seed: 4 in the JSON, --seed 3"),
    ("", {"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu: 4"),
    ("", {"train_batch_size": 4}, "train_batch_size: 4"),
    ("", {"gradient_accumulation_steps": 3}, "gradient_accumulation_steps: 3 in the JSON"),
    ("--min-lr 0.1", {"scheduler": {"type": "WarmupLR"}}, "scheduler: WarmupLR in the JSON and --min-lr"),
    (
        "--adam-beta2 0.9",
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}}},
        "optimizer.params.betas: [0.9, 0.95]",
    ),
    (
        "--weight-decay 0.5",
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}}},
        "optimizer.params.weight_decay: 0.1",
    ),
    ("--tensor-model-parallel-size 2", {}, "1 processes: must be a multiple"),
    ("--seed 4294967296", {}, "--seed 4294967296: must be below 2^32"),
]


@pytest.mark.parametrize(("more", "config", "text"), CONTRADICTIONS)
def test_contradictions_are_named(more: str, config: dict[str, Any], text: str) -> None:
    message = refusal(f"{BATCH} {more}", {**OPTIMIZER, **config})
    assert text in message and message.startswith("ds.json:\n")


def test_all_contradictions_are_told_at_once() -> None:
    message = refusal(
        f"{BATCH} --lr 0.5 --clip-grad 2", {**OPTIMIZER, "gradient_clipping": 1.0, "train_batch_size": 4}
    )
    assert all(text in message for text in ("--lr 0.5", "--clip-grad 2.0", "train_batch_size: 4"))


def test_equal_values_in_both_are_no_contradiction() -> None:
    config = {**OPTIMIZER, "gradient_clipping": 2, "train_batch_size": 8}
    found = settle(f"{BATCH} --lr 1e-3 --clip-grad 2.0", config)
    assert found.deepspeed["gradient_clipping"] == 2


def test_the_json_wins_over_defaults_and_is_left_alone() -> None:
    config = {**OPTIMIZER, "gradient_clipping": 0.25, "ds_efficient": {"seed": 7}, "steps_per_print": 5}
    args = parse_args(f"{BASE} {BATCH}".split())
    found = reconcile(args, config, 1)
    assert (found.deepspeed["gradient_clipping"], args.seed, found.deepspeed["steps_per_print"]) == (
        0.25,
        7,
        5,
    )
    assert (
        config["optimizer"] == {"type": "AdamW", "params": {"lr": 1e-3}} and "train_batch_size" not in config
    )


def test_the_command_line_fills_the_json() -> None:
    more = f"{BATCH} --lr 0.5 --weight-decay 0.3 --adam-beta1 0.8 --adam-eps 1e-6 --clip-grad 3 --seed 9"
    found = settle(more, {}).deepspeed
    params = found["optimizer"]["params"]
    assert (params["lr"], params["weight_decay"], params["betas"], params["eps"]) == (
        0.5,
        0.3,
        [0.8, 0.999],
        1e-6,
    )
    assert (found["gradient_clipping"], found["ds_efficient"]["seed"]) == (3.0, 9)
    assert found["steps_per_print"] == NEVER
    assert settle(f"{BATCH} --lr 1 --optimizer sgd", {}).deepspeed["optimizer"]["type"] == "SGD"


def test_a_learning_rate_is_needed_to_train_only() -> None:
    assert "--lr: needed" in refusal(BATCH, {})
    assert settle(f"{BATCH} --skip-train", {}).deepspeed["optimizer"]["params"]["lr"] == 0.0


def test_the_schedule_is_the_jsons_or_ours() -> None:
    assert settle().own_schedule
    assert not settle(BATCH, {**OPTIMIZER, "scheduler": {"type": "WarmupLR", "params": {}}}).own_schedule
