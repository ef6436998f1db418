"""The texts of configuration errors: path, value, what is allowed, did-you-mean, order."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_efficient.config import load_config
from ds_efficient.config.problems import MAX_SHOWN, closest, describe, join, show
from ds_efficient.errors import ConfigError


def problems_of(config, **options):
    with pytest.raises(ConfigError) as caught:
        load_config(config, **{"check_available": False, **options})
    return caught.value.problems


CASES = [
    (
        {"slope": {"adaptr": {}}},
        'slope.adaptr: unknown key; did you mean "adapter"? allowed here: adapter, backend',
    ),
    ({"slope": {"zzz": 1}}, "slope.zzz: unknown key; allowed here: adapter, backend, column_mask_interval"),
    (
        {"slope": {"adapter": {"rnk": 8}}},
        'slope.adapter.rnk: unknown key; did you mean "rank"? allowed here: last_fraction, rank, start_step',
    ),
    (
        {"slope": {"backend": "cusparse"}},
        'slope.backend: "cusparse" is not allowed; expected "auto", "cusparselt" or "dense"',
    ),
    ({"slope": {"pattern": "3:5"}}, 'slope.pattern: "3:5" is not allowed: M must be one of 2, 4, 8, 16, 32'),
    (
        {"slope": {"pattern": 24}},
        'slope.pattern: 24 is not allowed; expected "N:M" with N < M and M one of 2, 4, 8, 16, 32, for ex',
    ),
    (
        {"slope": {"patterns": [{"layers": "0-3"}]}},
        'slope.patterns[0].pattern: missing; expected "N:M" with N < M',
    ),
    (
        {"slope": {"patterns": [{"layers": "9-3", "pattern": "2:8"}]}},
        'slope.patterns[0].layers: "9-3" is not allowed: the range "9-3" runs backwards; write "3-9"',
    ),
    ({"slope": {"patterns": ["2:8"]}}, 'slope.patterns[0]: "2:8" is not allowed; expected an object {...}'),
    ({"slope": {"patterns": {}}}, "slope.patterns: {} is not allowed; expected a list of objects"),
    (
        {"slope": {"modules": "linear_qkv"}},
        'slope.modules: "linear_qkv" is not allowed; expected a list of module',
    ),
    ({"slope": {"modules": ["a", "a"]}}, 'slope.modules: ["a", "a"] is not allowed: "a" stands twice'),
    ({"slope": {"enabled": "yes"}}, 'slope.enabled: "yes" is not allowed; expected true or false'),
    ({"slope": {"adapter": 64}}, "slope.adapter: 64 is not allowed; expected an object {...}"),
    ({"slope": None}, "slope: null is not allowed; expected an object {...}"),
    ({"slope": [1]}, "slope: [1] is not allowed; expected an object {...}"),
    ({"rmm": {"ratio": 3}}, 'rmm.ratio: 3 is not allowed; expected a number > 0 and <= 1, or "auto"'),
    ({"rmm": {"ratio": 0}}, "rmm.ratio: 0 is not allowed; expected a number > 0 and <= 1"),
    ({"rmm": {"ratio": float("nan")}}, "rmm.ratio: NaN is not allowed; expected a number > 0 and <= 1"),
    (
        {"rmm": {"ratio": "Auto"}},
        'rmm.ratio: "Auto" is not allowed; expected a number > 0 and <= 1, or "auto"',
    ),
    (
        {"rmm": {"target_variance_ratio": 0}},
        "rmm.target_variance_ratio: 0 is not allowed; expected a number > 0",
    ),
    ({"rmm": {"min_rows": "64"}}, 'rmm.min_rows: "64" is not allowed; expected an integer >= 1'),
    (
        {"mkor": {"statistics_rank": 65}},
        "mkor.statistics_rank: 65 is not allowed; expected an integer >= 1 and <= 64",
    ),
    (
        {"mkor": {"stabilizer": {"zeta": 1}}},
        "mkor.stabilizer.zeta: 1 is not allowed; expected a number >= 0 and < 1",
    ),
    ({"lgreco": {"range": [8]}}, "lgreco.range: [8] is not allowed; expected a list of two positive numbers"),
    ({"lgreco": {"default": "32"}}, 'lgreco.default: "32" is not allowed; expected a number > 0'),
    ({"ds_efficient": {"sed": 1}}, 'ds_efficient.sed: unknown key; did you mean "seed"?'),
    (
        {"data_efficiency": {"data_routing": {"random_ltd": {"random_ltd_layer_id": [-1]}}}},
        "data_efficiency.data_routing.random_ltd.random_ltd_layer_id: [-1] is not allowed; "
        "expected a list of layer numbers, from 0 or null",
    ),
    (
        {"data_efficiency": {"data_routing": {"random_tld": {"enabled": True}}}},
        'data_efficiency.data_routing.random_tld: unknown key; did you mean "random_ltd"? allowed here: ena',
    ),
    (
        {"data_efficiency": {"data_routng": {}}},
        'data_efficiency.data_routng: unknown key; did you mean "data_routing"?',
    ),
    (
        {"data_efficiency": {"enabled": "no"}},
        'data_efficiency.enabled: "no" is not allowed; expected true or false',
    ),
    ({"data_efficiency": 3}, "data_efficiency: 3 is not allowed; expected an object {...}"),
    (
        {"data_efficiency": {"data_routing": []}},
        "data_efficiency.data_routing: [] is not allowed; expected an object {...}",
    ),
]


@pytest.mark.parametrize(("config", "text"), CASES)
def test_one_mistake_gives_one_exact_line(config, text):
    problems = problems_of(config)
    assert len(problems) == 1
    assert problems[0].startswith(text)
    assert "\n" not in problems[0]


AUTO = [
    (
        {"rmm": {"target_variance_ratio": "auto"}},
        "rmm.target_variance_ratio",
        "write a number > 0 (default 8), or leave the key out",
    ),
    (
        {"rmm": {"sketch": "auto"}},
        "rmm.sketch",
        '"count" or "rows" (default "gaussian"), or leave the key out',
    ),
    ({"slope": {"adapter": {"rank": "auto"}}}, "slope.adapter.rank", "write an integer >= 0 (default 64)"),
    ({"slope": {"adapter": "auto"}}, "slope.adapter", "write an object {...}, or leave the key out"),
    ({"slope": {"modules": ["auto"]}}, "slope.modules", "write a list of module names"),
    ({"slope": {"enabled": "auto"}}, "slope.enabled", "write true or false (default false)"),
    (
        {"slope": {"patterns": [{"layers": "auto", "pattern": "2:8"}]}},
        "slope.patterns[0].layers",
        "write layer numbers",
    ),
    ({"ds_efficient": {"run_dir": "auto"}}, "ds_efficient.run_dir", "write a string or null"),
    (
        {"data_efficiency": {"data_routing": {"random_ltd": {"total_layer_num": "auto"}}}},
        "data_efficiency.data_routing.random_ltd.total_layer_num",
        "write an integer >= 1 or null, or leave the key out",
    ),
    ({"train_batch_size": "auto"}, "train_batch_size", "write an integer >= 1, or leave the key out"),
    ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu", "write an integer >= 1"),
    ({"gradient_accumulation_steps": "auto"}, "gradient_accumulation_steps", "write an integer >= 1"),
    ({"gradient_clipping": "auto"}, "gradient_clipping", "write a number >= 0"),
    ({"bf16": {"enabled": "auto"}}, "bf16.enabled", "write true or false"),
    ({"fp16": {"loss_scale": "auto"}}, "fp16.loss_scale", "write a number"),
    ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage", "write 0, 1, 2 or 3"),
    (
        {"zero_optimization": {"reduce_bucket_size": "auto"}},
        "zero_optimization.reduce_bucket_size",
        "write an integer",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "auto"}}},
        "zero_optimization.offload_optimizer.device",
        'write "none", "cpu" or "nvme"',
    ),
    ({"zero_optimization": "auto"}, "zero_optimization", "write an object {...}"),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
        "optimizer.params.lr",
        "write the value itself",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, "auto"]}}},
        "optimizer.params.betas[1]",
        "write the value itself",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
        "scheduler.params.warmup_num_steps",
        "write the value itself, or leave the key out",
    ),
    ({"optimizer": "auto"}, "optimizer", "write an object {...}"),
]


@pytest.mark.parametrize(("config", "path", "remedy"), AUTO)
def test_auto_is_refused_with_what_to_write(config, path, remedy):
    problems = problems_of(config)
    assert len(problems) == 1
    assert problems[0].startswith(f'{path}: "auto" has no meaning here; ')
    assert remedy in problems[0]


def test_auto_is_accepted_where_it_means_something():
    config = load_config(
        {
            "slope": {"backend": "auto"},
            "lgreco": {"backend": "auto"},
            "pipeline": {"stages": "auto"},
            "data_types": {"keep_in_fp32_modules": "auto"},
            "autotuning": {"fast": "auto"},
            "another_tool": {"anything": "auto"},
        }
    )
    assert config.slope.backend == "auto" and config.warnings == []


def test_all_problems_come_at_once_unknown_keys_first():
    problems = problems_of(
        {
            "rmm": {"ratio": 3, "sktech": "rows"},
            "slope": {"pattern": "auto", "adapter": {"rank": -1, "start_step": 1, "last_fraction": 0.5}},
            "zero_optimization": {"stge": 1, "stage": 7},
            "fp16": {"enabled": True},
            "bf16": {"enabled": True},
            "train_batch_size": 0,
            "amp": {},
        }
    )
    paths = [line.split(": ")[0] for line in problems]
    assert paths[:2] == ["rmm.sktech", "zero_optimization.stge"]
    assert set(paths[2:]) == {
        "rmm.ratio",
        "slope.pattern",
        "slope.adapter.rank",
        "slope.adapter.start_step",
        "zero_optimization.stage",
        "fp16.enabled",
        "train_batch_size",
        "amp",
    }


def test_the_message_counts_the_problems_and_lists_each():
    with pytest.raises(ConfigError) as caught:
        load_config({"rmm": {"ratio": 3, "min_rows": 0}})
    assert str(caught.value).splitlines() == [
        "config: 2 problems",
        '  rmm.ratio: 3 is not allowed; expected a number > 0 and <= 1, or "auto"',
        "  rmm.min_rows: 0 is not allowed; expected an integer >= 1",
    ]


def test_an_enabled_technique_that_is_not_there_is_refused_by_name():
    ltd = {"enabled": True, "random_ltd_schedule": {"schedule_config": {"require_steps": 9}}}
    config = {"slope": {"enabled": True}, "data_efficiency": {"data_routing": {"random_ltd": ltd}}}
    name = "data_efficiency.data_routing.random_ltd"
    text = "this version does not have the technique yet; set"
    # Rows without a technique, whatever this version has by now.
    from dataclasses import replace

    from ds_efficient.registry import TECHNIQUES

    rows = [replace(row, technique=None) for row in TECHNIQUES]
    assert problems_of(config, check_available=True, rows=rows) == [
        f"slope: {text} slope.enabled to false or remove the section",
        f"{name}: {text} {name}.enabled to false or remove the section",
    ]
    assert [row.name for row in load_config(config, check_available=False).enabled()] == [
        "slope",
        "random_ltd",
    ]


@pytest.mark.parametrize("outer", ["data_efficiency", "data_efficiency.data_routing"])
def test_outer_sections_switched_off_contradict_an_enabled_inner_one(outer):
    ltd = {"enabled": True, "random_ltd_schedule": {"schedule_config": {"require_steps": 9}}}
    config = {"data_efficiency": {"enabled": True, "data_routing": {"enabled": True, "random_ltd": ltd}}}
    load_config(config, check_available=False)
    inner = config["data_efficiency"]
    (inner["data_routing"] if outer.endswith("routing") else inner)["enabled"] = False
    expected = f"{outer}.enabled: false contradicts data_efficiency.data_routing.random_ltd.enabled true; "
    assert problems_of(config) == [f"{expected}set both to the same value"]
    ltd["enabled"] = False
    load_config(config, check_available=False)


def test_deepcompile_is_refused_with_a_technique():
    config = {"rmm": {"enabled": True}, "compile": {"deepcompile": True}}
    assert problems_of(config) == [
        "compile.deepcompile: DeepCompile goes round the hooks that rmm needs; set it to false"
    ]
    load_config({"compile": {"deepcompile": True}})


def test_values_are_shown_shortened():
    line = problems_of({"rmm": {"ratio": "x" * 500}})[0]
    assert len(show("x" * 500)) == MAX_SHOWN and show("x" * 500) in line


def test_paths_and_schemas_in_words():
    assert join(("a", "b", 0, "c")) == "a.b[0].c"
    assert join(("a", "b\nc")) == 'a."b\\nc"'
    assert describe({"type": ["integer", "null"], "minimum": 1}) == "an integer >= 1 or null"
    assert describe({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}) == '"a" or "b" or null'
    assert describe({"const": "a"}) == '"a"'
    assert closest("Slopee", ["slope", "rmm"]) == "slope"
    assert closest("banana", ["slope", "rmm"]) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("auto"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "enabled", "pattern", "patterns", "modules", "adapter", "rank", "ratio", "sketch", "range", "default",
        "compressor", "accordion", "hybrid", "stabilizer", "random_ltd_schedule", "schedule_config", "stage",
        "layer_token_lr_schedule", "random_ltd_layer_id", "data_routing", "random_ltd", "params", "type",
        "low", "layers", "block_size", "offload_param", "betas",
    ]
)  # fmt: skip
TOP = st.sampled_from(
    ["slope", "rmm", "mkor", "lgreco", "data_efficiency", "ds_efficient", "zero_optimization", "fp16", "bf16",
     "optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps", "compile", "data_types",
     "gradient_clipping", "zero_optimisation", "steps_per_print"]
)  # fmt: skip
NESTED = st.recursive(JSON, lambda inner: st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(TOP, NESTED, max_size=5))
def test_whatever_stands_in_the_file_ends_in_a_config_or_a_config_error(config):
    try:
        loaded = load_config(config)
    except ConfigError as error:
        assert error.problems and all("\n" not in line for line in error.problems)
    else:
        assert load_config(loaded.deepspeed) == loaded
        assert isinstance(loaded.zero_stage, int)
