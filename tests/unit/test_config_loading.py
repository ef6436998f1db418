"""Loading: sources, unreadable files, duplicates, near-misses, what DeepSpeed gets, a sixth technique."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import subprocess
import sys

import pytest

from ds_efficient.config import EfficiencyConfig, load_config
from ds_efficient.config.base import TechniqueSection, rule
from ds_efficient.config.fields import Count
from ds_efficient.config.reference import render_reference
from ds_efficient.config.schema import build_schema
from ds_efficient.errors import ConfigError
from ds_efficient.registry import TECHNIQUES, TechniqueRow

LTD = {
    "enabled": True,
    "random_ltd_schedule": {"schedule_config": {"require_steps": 9}},
    "layer_token_lr_schedule": {"enabled": True, "decay_layer_tokens": 100},
}
FULL = {
    "$schema": "./ds_efficient.schema.json",
    "train_batch_size": 8,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "ds_efficient": {"seed": 7},
    "slope": {"enabled": True, "pattern": "1:4"},
    "rmm": {"enabled": False, "ratio": 0.5},
    "data_efficiency": {"seed": 5, "data_sampling": {"num_workers": 2}, "data_routing": {"random_ltd": LTD}},
}


@rule("dose")
def dose_is_even(section: SixthConfig) -> str | None:
    """dose is even."""
    return f"{section.dose} is odd" if section.dose % 2 else None


class SixthConfig(TechniqueSection):
    """A sixth technique."""

    rules = (dose_is_even,)

    dose: Count = 2
    """How much of it."""


SIXTH = TechniqueRow(
    "sixth", ("sixth",), f"{__name__}:SixthConfig", f"{__name__}:SixthConfig", "a sixth technique"
)


def problem_of(source, **options):
    with pytest.raises(ConfigError) as caught:
        load_config(source, **options)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_a_dict_a_file_and_base64_give_the_same(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(FULL))
    encoded = base64.urlsafe_b64encode(json.dumps(FULL).encode()).decode()
    loaded = [load_config(one, check_available=False) for one in (FULL, path, str(path), encoded)]
    assert loaded[0] == loaded[1] == loaded[2] == loaded[3]
    assert [one.source for one in loaded] == ["config", str(path), str(path), "config (base64)"]
    assert load_config(loaded[0]) is loaded[0]


def test_the_parts_of_a_configuration():
    config = load_config(FULL, check_available=False)
    assert list(config.sections) == [row.name for row in TECHNIQUES]
    assert config.slope is config.sections["slope"] and config.slope.pattern == "1:4"
    assert config.random_ltd.layer_token_lr_schedule.decay_layer_tokens == 100
    assert config.mkor.enabled is False
    assert [row.name for row in config.enabled()] == ["slope", "random_ltd"]
    assert config.general.seed == 7
    assert (config.precision, config.zero_stage) == ("bf16", 2)
    assert config.warnings == []
    assert (
        load_config({}).precision == "fp32" and load_config({"fp16": {"enabled": True}}).precision == "fp16"
    )
    with pytest.raises(AttributeError, match="no technique"):
        _ = config.banana


def test_comments_and_unquoted_keys_are_read_as_deepspeed_reads_them(tmp_path):
    path = tmp_path / "ds.hjson"
    path.write_text("\ufeff// note\n{\n  train_batch_size: 8  # eight\n  rmm: {ratio: 0.5}\n}\n")
    assert load_config(path).rmm.ratio == 0.5


def test_the_given_dict_is_neither_changed_nor_shared():
    given = copy.deepcopy(FULL)
    config = load_config(given, check_available=False)
    for_deepspeed = config.for_deepspeed()
    assert given == FULL
    given["zero_optimization"]["stage"] = 3
    config.deepspeed["zero_optimization"]["stage"] = 3
    for_deepspeed["zero_optimization"]["stage"] = 3
    assert config.zero_stage == 2 and config.deepspeed == FULL


def test_the_configuration_is_frozen():
    config = load_config(FULL, check_available=False)
    with pytest.raises(AttributeError, match="frozen"):
        config.general = None
    with pytest.raises(AttributeError, match="frozen"):
        config.slope = None
    with pytest.raises(TypeError):
        config.sections["slope"] = None
    config.warnings.append("x")
    assert config.warnings == []


def test_the_configuration_can_be_copied_and_sent_to_another_process():
    config = load_config(FULL, check_available=False)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_deepspeed_gets_everything_but_our_sections():
    config = load_config(FULL, check_available=False)
    result = config.for_deepspeed()
    assert set(result) == {"train_batch_size", "bf16", "zero_optimization", "data_efficiency"}
    efficiency = result["data_efficiency"]
    assert efficiency["seed"] == 5 and efficiency["data_sampling"] == {"num_workers": 2}
    ltd = efficiency["data_routing"]["random_ltd"]
    assert ltd["enabled"] is False and ltd["layer_token_lr_schedule"]["enabled"] is False
    assert ltd["random_ltd_schedule"] == LTD["random_ltd_schedule"]
    assert load_config({"train_batch_size": 1}).for_deepspeed() == {"train_batch_size": 1}


def test_the_resolved_sections_load_again():
    config = load_config(FULL, check_available=False)
    again = load_config(config.resolved(), check_available=False)
    assert again.sections == config.sections and again.general == config.general


BAD_FILES = [
    ("", "is empty"),
    (" \n", "is empty"),
    ("[1]", "must hold one JSON object {...}, not [1]"),
    ("hello", 'must hold one JSON object {...}, not "hello"'),
    ('{"a": 1,\n "b": }', "(line 2, column 7)"),
    ('{"a": 1', "is not valid JSON"),
    (
        '{"a": {"b": 1,\n "c": 0,\n "b": 2}}',
        "a.b: stands more than once in the same object; keep one (lines 1, 3)",
    ),
    ('{"l": [{"b": 1, "b": 1}]}', "l[0].b: stands more than once"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_unreadable_text_is_one_problem_that_names_the_file(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: 1 problem\n")
    assert message in caught.value.problems[0]


def test_every_duplicate_key_is_reported(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"fp16": {}, "fp16": {}, "zero_optimization": {"stage": 1, "stage": 1}}')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [line.split(":")[0] for line in caught.value.problems] == ["fp16", "zero_optimization.stage"]


def test_what_is_no_file_is_one_problem(tmp_path):
    assert "no such file" in problem_of(tmp_path / "absent.json")
    assert "no such file" in problem_of("absent.json")
    assert "is a directory" in problem_of(tmp_path)
    assert "cannot be read" in problem_of("a" * 5000)
    assert "cannot be read" in problem_of("a\0b")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe{}")
    assert "is not UTF-8 text (byte 0)" in problem_of(binary)
    assert "not int" in problem_of(3)
    assert "keys must be strings" in problem_of({1: 2})


NEAR = [
    ({"slpoe": {}}, 'slpoe: unknown top-level key, not read by ds_efficient; did you mean "slope"?'),
    ({"SLOPE": {}}, 'SLOPE: unknown top-level key, not read by ds_efficient; did you mean "slope"?'),
    ({"ds_eficient": {}}, 'did you mean "ds_efficient"?'),
    ({"gradient_clippng": 1}, 'not read by DeepSpeed; did you mean "gradient_clipping"?'),
    ({"zero_optimisation": {}}, 'did you mean "zero_optimization"?'),
    ({"train_micro_batch_size": 1}, 'did you mean "train_micro_batch_size_per_gpu"?'),
    ({"random_ltd": {"enabled": True}}, 'it belongs at "data_efficiency.data_routing.random_ltd"'),
    (
        {"optimizer": {"type": "AdmaW"}},
        'optimizer.type: "AdmaW" is not one of DeepSpeed\'s; did you mean "AdamW"?',
    ),
    ({"scheduler": {"type": "WarmupCosine"}}, 'did you mean "WarmupCosineLR"?'),
]


@pytest.mark.parametrize(("config", "text"), NEAR)
def test_near_misses_are_warnings_not_errors(config, text):
    warnings = load_config(config).warnings
    assert len(warnings) == 1 and text in warnings[0]


@pytest.mark.parametrize(
    "config",
    [
        {"my_tool": {"x": 1}},
        {"optimizer": {"type": "MyOptimizer"}},
        {"optimizer": {"type": "adamw"}},
        {"tokenizer": 1},
    ],
)
def test_what_belongs_to_others_is_no_near_miss(config):
    assert load_config(config).warnings == []


def test_a_sixth_technique_is_one_row():
    rows = (*TECHNIQUES, SIXTH)
    config = load_config({"sixth": {"enabled": True, "dose": 4}}, rows=rows)
    assert config.sixth.dose == 4 and [row.name for row in config.enabled()] == ["sixth"]
    assert config.for_deepspeed() == {}
    assert problem_of({"sixth": {"dos": 1}}, rows=rows).startswith(
        'sixth.dos: unknown key; did you mean "dose"?'
    )
    assert problem_of({"sixth": {"dose": 3}}, rows=rows) == "sixth.dose: 3 is odd"
    assert load_config({"sixht": {}}, rows=rows).warnings[0].endswith('did you mean "sixth"?')
    assert build_schema(rows)["properties"]["sixth"]["properties"]["dose"]["description"] == "How much of it."
    assert "| `dose` | an integer >= 1 | `2` | How much of it. |" in render_reference(rows)
    assert "sixth" not in load_config({}).sections


def test_a_config_loads_quickly_without_torch_or_deepspeed():
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "from ds_efficient.config import load_config\n"
        "load_config({'zero_optimization': {'stage': 1}, 'slope': {'pattern': '2:8'}})\n"
        "taken = time.perf_counter() - start\n"
        "heavy = sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules))\n"
        "print(taken, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(taken) < 5  # 0.3 s on an idle machine


def test_a_configuration_says_what_it_is():
    config = load_config(FULL, check_available=False)
    assert repr(config) == "EfficiencyConfig('config', enabled=['slope', 'random_ltd'])"
    assert config != load_config({}) and config != "config"
    assert isinstance(config, EfficiencyConfig)
