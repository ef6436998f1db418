"""DeepSpeed's own keys: the checks on them, and the checked-in tables against the installed DeepSpeed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.config import deepspeed_facts, deepspeed_keys, load_config
from ds_efficient.core import deepspeed_schema
from ds_efficient.errors import ConfigError


def problems_of(config, **options):
    try:
        load_config(config, **options)
    except ConfigError as error:
        return error.problems
    return []


def adamw(**params):
    return {"optimizer": {"type": "AdamW", "params": params}}


CASES = [
    ({"train_batch_size": 0}, "train_batch_size: 0 is not allowed; expected an integer >= 1"),
    ({"train_batch_size": True}, "train_batch_size: true is not allowed; expected an integer >= 1"),
    ({"train_batch_size": 1.5}, "train_batch_size: 1.5 is not allowed; expected an integer >= 1"),
    ({"train_micro_batch_size_per_gpu": "4"}, 'train_micro_batch_size_per_gpu: "4" is not allowed'),
    (
        {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3},
        "train_batch_size: 8 is no multiple of train_micro_batch_size_per_gpu 3",
    ),
    (
        {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4},
        "train_batch_size: 8 is no multiple of train_micro_batch_size_per_gpu 4 x "
        "gradient_accumulation_steps 4 = 16",
    ),
    ({"gradient_clipping": -1}, "gradient_clipping: -1 is not allowed; expected a number >= 0"),
    ({"gradient_clipping": float("inf")}, "gradient_clipping: Infinity is not allowed"),
    (
        {"communication_data_type": "fp8"},
        'communication_data_type: "fp8" is not allowed; expected "fp16", "bf16", ',
    ),
    ({"wall_clock_breakdown": 1}, "wall_clock_breakdown: 1 is not allowed; expected true or false"),
    ({"bf16": True}, "bf16: true is not allowed; expected an object {...}"),
    ({"bf16": {"enable": True}}, 'bf16.enable: unknown key; did you mean "enabled"?'),
    ({"bf16": {"enabled": 1}}, "bf16.enabled: 1 is not allowed; expected true or false"),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled: fp16 and bf16 are both enabled"),
    ({"bf16": {}, "bfloat16": {}}, "bfloat16: DeepSpeed ignores it beside bf16"),
    ({"fp16": {"loss_scale": "0"}}, 'fp16.loss_scale: "0" is not allowed; expected a number'),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: 4 is not allowed; expected 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: true is not allowed"),
    ({"zero_optimization": {"stage": None}}, "zero_optimization.stage: null is not allowed"),
    ({"zero_optimization": {"stge": 1}}, 'zero_optimization.stge: unknown key; did you mean "stage"?'),
    (
        {"zero_optimization": {"stage3_max_live_parametrs": 1}},
        'zero_optimization.stage3_max_live_parametrs: unknown key; did you mean "stage3_max_live_',
    ),
    (
        {"zero_optimization": {"overlap_comm": "yes"}},
        'zero_optimization.overlap_comm: "yes" is not allowed; ',
    ),
    (
        {"zero_optimization": {"mics_shard_size": 2}},
        "zero_optimization.mics_shard_size: DeepSpeed 0.19.8 removed it",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
        'zero_optimization.offload_optimizer.device: "gpu" is not allowed; expected "none", "cpu" or "nvme"',
    ),
    (
        {"zero_optimization": True},
        'zero_optimization: true is not allowed; expected an object such as {"stage": 1}',
    ),
    (
        {"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"},
        'gradient_allreduce_op: "sum" does not work',
    ),
    ({"optimizer": {"params": {"lr": 1}}}, "optimizer.type: missing; DeepSpeed ignores optimizer without it"),
    ({"optimizer": {"type": 3}}, "optimizer.type: 3 is not allowed; expected a name"),
    ({"optimizer": {"type": "Adam", "param": {}}}, 'optimizer.param: unknown key; did you mean "params"?'),
    (
        {"optimizer": {"type": "Adam", "params": 1}},
        "optimizer.params: 1 is not allowed; expected an object {...}",
    ),
    ({"optimizer": {"type": "OneBitAdam"}}, 'optimizer.type: DeepSpeed 0.19.8 removed "OneBitAdam"'),
    (
        adamw(max_grad_norm=1.0),
        'optimizer.params.max_grad_norm: DeepSpeed takes it at top level: write "gradient_cl',
    ),
    ({"scheduler": {"params": {}}}, "scheduler.type: missing; DeepSpeed ignores scheduler without it"),
    ({"csv_monitor": {"path": "x"}}, "csv_monitor.path: unknown key; "),
    (
        {"data_types": {"grad_accum_dtype": "float"}},
        'data_types.grad_accum_dtype: "float" is not allowed; expected "',
    ),
    *[({key: {}}, f"{key}: DeepSpeed 0.19.8 removed it") for key in deepspeed_facts.REMOVED],
]


@pytest.mark.parametrize(("config", "text"), CASES)
def test_one_mistake_in_deepspeeds_keys_gives_one_line(config, text):
    problems = problems_of(config)
    assert len(problems) == 1
    assert problems[0].startswith(text)


GOOD = [
    {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 7},
    {"train_batch_size": 8.0},
    {"bf16": {"enabled": True}, "fp16": {"enabled": False}},
    {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": None,
            "reduce_bucket_size": 5e8,
            "sub_group_size": 10**9,
        }
    },
    {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
    {"zero_optimization": {"stage": 3, "leaf_module": {"classes": "Block"}, "prefetch_bucket_size": 1}},
    {**adamw(lr=1e-3, betas=[0.9, 0.95], torch_adam=True), "scheduler": {"type": "WarmupLR"}},
    {"optimizer": {}, "scheduler": {}, "steps_per_print": None, "communication_data_type": None},
    {"data_types": {"grad_accum_dtype": "fp32"}, "timers": {"throughput": {"enabled": False}}},
    {"tensorboard": {"enabled": True, "output_path": "x", "job_name": "y"}, "wandb": {"group": None}},
]


@pytest.mark.parametrize("config", GOOD)
def test_right_configurations_of_deepspeed_pass_without_a_word(config):
    assert problems_of(config) == []
    assert load_config(config).warnings == []


@settings(deadline=None)
@given(*[st.integers(1, 12)] * 4)
def test_batch_sizes_fit_exactly_when_deepspeed_can_divide_them(total, micro, steps, ranks):
    sizes = {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro}
    assert (not problems_of(sizes)) == (total % micro == 0)
    assert (not problems_of(sizes, world_size=ranks)) == (total % (micro * ranks) == 0)
    sizes["gradient_accumulation_steps"] = steps
    assert (not problems_of(sizes)) == (total % (micro * steps) == 0)
    assert (not problems_of(sizes, world_size=ranks)) == (total == micro * steps * ranks)


def test_the_batch_triangle_says_what_does_not_fit():
    sizes = {"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert problems_of(sizes, world_size=2) == [
        "train_batch_size: 9 is not train_micro_batch_size_per_gpu 2 x gradient_accumulation_steps 2 x ranks "
        "2 = 8; change one of them or leave train_batch_size out"
    ]


def test_the_table_of_keys_is_that_of_the_installed_deepspeed():
    if deepspeed_schema.installed_version() != deepspeed_keys.VERSION:
        pytest.skip(f"the table is of DeepSpeed {deepspeed_keys.VERSION}")
    assert deepspeed_schema.closed_sections() == deepspeed_keys.CLOSED
    assert tuple(sorted(deepspeed_schema.top_level_keys())) == deepspeed_keys.TOP_LEVEL
    namespace: dict[str, object] = {}
    exec(deepspeed_schema.render_table(), namespace)
    assert namespace["CLOSED"] == deepspeed_keys.CLOSED and namespace["TOP_LEVEL"] == deepspeed_keys.TOP_LEVEL


def test_what_deepspeed_removed_is_refused_and_the_rest_is_described():
    top, zero = deepspeed_schema.removed_keys()
    assert top <= set(deepspeed_facts.REMOVED) and zero <= set(deepspeed_facts.REMOVED_ZERO)
    described = set(deepspeed_facts.TOP_LEVEL) - deepspeed_facts.RARE_TOP_LEVEL
    assert set(deepspeed_keys.TOP_LEVEL) <= described
    assert described == set(deepspeed_keys.TOP_LEVEL)


def test_a_key_in_doubt_is_asked_of_a_deepspeed_of_another_version(monkeypatch):
    config = {"zero_optimization": {"stage": 1, "key_of_tomorrow": 3}}
    assert problems_of(config)[0].startswith("zero_optimization.key_of_tomorrow: unknown key;")
    monkeypatch.setattr(deepspeed_schema, "installed_version", lambda: "99.0")
    sections = {"zero_optimization": {"stage": "integer", "key_of_tomorrow": "integer"}}
    monkeypatch.setattr(deepspeed_schema, "closed_sections", lambda: sections)
    assert problems_of(config) == []
    assert len(problems_of({"bf16": {"key_of_tomorrow": 3}})) == 1


def test_deepspeed_accepts_what_we_pass_on():
    runtime = pytest.importorskip("deepspeed.runtime.config")
    config = load_config(
        {"train_batch_size": 4, "zero_optimization": {"stage": 2}, "slope": {}, "ds_efficient": {}}
    )
    parsed = runtime.DeepSpeedConfig(config.for_deepspeed())
    assert parsed.zero_optimization_stage == 2 and parsed.train_batch_size == 4
