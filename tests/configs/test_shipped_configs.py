"""The shipped JSON files and their schema: complete, valid, accepted by DeepSpeed, fresh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_efficient.config import load_config
from ds_efficient.config.schema import build_schema, render_schema
from ds_efficient.registry import TECHNIQUES

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "ds_configs" / "ds_efficient.schema.json"
SHIPPED = sorted(path for path in (ROOT / "ds_configs").glob("*.json") if path != SCHEMA)
SECTIONS = sorted((Path(__file__).parent / "sections").glob("*.json"))


def by_name(path):
    return path.stem


@pytest.fixture(scope="module")
def validator():
    built = build_schema()
    jsonschema.Draft202012Validator.check_schema(built)
    return jsonschema.Draft202012Validator(built)


def test_the_shipped_schema_is_fresh():
    assert SCHEMA.read_text(encoding="utf-8") == render_schema(), (
        "run: python -m ds_efficient schema --output ds_configs/ds_efficient.schema.json"
    )


def test_the_files_that_the_documentation_names_are_there():
    names = {path.stem for path in SHIPPED}
    assert names >= {
        "cpu_quickstart",
        "baseline_fp32",
        "zero1_bf16",
        "zero2_bf16",
        "zero3_bf16",
        "zero1_fp16",
        "fused_bf16",
        "monitored",
        "slope",
        "rmm",
        "random_ltd",
        "mkor",
        "mkor_h",
        "lgreco",
    }


def test_one_key_of_the_quickstart_switches_slope_on():
    content = json.loads((ROOT / "ds_configs" / "cpu_quickstart.json").read_text(encoding="utf-8"))
    assert load_config(content).enabled() == []
    content["slope"]["enabled"] = True
    config = load_config(content)
    assert [row.name for row in config.enabled()] == ["slope"]
    assert config.warnings == []


@pytest.mark.parametrize("name", ["slope", "rmm", "random_ltd", "mkor", "lgreco"])
def test_the_file_of_a_technique_has_it_alone_switched_on(name):
    assert [row.name for row in load_config(ROOT / "ds_configs" / f"{name}.json").enabled()] == [name]


@pytest.mark.parametrize("path", SHIPPED, ids=by_name)
def test_shipped_files_are_strict_json_that_names_its_schema(path, validator):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["$schema"] == f"./{SCHEMA.name}"
    assert not list(validator.iter_errors(content))


@pytest.mark.parametrize("path", SHIPPED, ids=by_name)
def test_shipped_files_load_without_warnings_and_leave_sizes_to_the_command_line(path):
    config = load_config(path)
    assert config.warnings == []
    assert not {key for key in config.deepspeed if "batch_size" in key or "accumulation" in key}
    assert "lr" not in config.deepspeed["optimizer"]["params"]
    assert config.deepspeed["optimizer"]["params"]["torch_adam"] is True


@pytest.mark.parametrize("path", SHIPPED, ids=by_name)
def test_deepspeed_parses_the_shipped_files(path):
    runtime = pytest.importorskip("deepspeed.runtime.config")
    config = load_config(path)
    parsed = runtime.DeepSpeedConfig({**config.for_deepspeed(), "train_batch_size": 2})
    assert parsed.zero_optimization_stage == config.zero_stage
    assert parsed.bfloat16_config.enabled == (config.precision == "bf16")
    assert parsed.float16_config.enabled == (config.precision == "fp16")


def test_every_technique_has_a_full_section_here():
    assert {path.stem for path in SECTIONS} == {row.name for row in TECHNIQUES}


@pytest.mark.parametrize("path", SECTIONS, ids=by_name)
def test_full_sections_load_and_set_every_key(path, validator):
    config = load_config(path, check_available=False)
    assert [row.name for row in config.enabled()] == [path.stem]
    assert config.warnings == []
    assert not list(validator.iter_errors(config.deepspeed))
    row = config.enabled()[0]
    given = config.deepspeed
    for key in row.path:
        given = given[key]
    dumped = config.sections[row.name].model_dump(mode="json")
    assert set(given) == set(dumped)
    for key, value in given.items():
        if isinstance(value, dict):
            assert value.items() <= dumped[key].items(), key
        else:
            assert value == dumped[key]


@pytest.mark.parametrize(
    "config",
    [
        {"slope": {"patern": "2:4"}},
        {"slope": {"pattern": "24"}},
        {"slope": {"adapter": {"rank": -1}}},
        {"slope": {"backend": "cusparse"}},
        {"rmm": {"ratio": 0}},
        {"rmm": {"min_rows": "auto"}},
        {"mkor": {"stabilizer": {"zeta": 1}}},
        {"lgreco": {"range": [1, 2, 3]}},
        {"ds_efficient": {"seed": -1}},
        {"data_efficiency": {"data_routng": {}}},
        {"data_efficiency": {"data_routing": {"random_ltd": {"model_type": "both"}}}},
        {"zero_optimization": {"stage": 4}},
        {"zero_optimization": {"stge": 1}},
        {"bf16": {"enabled": "auto"}},
        {"train_batch_size": 0},
        [],
    ],
)
def test_the_schema_refuses_what_validation_refuses(config, validator):
    assert list(validator.iter_errors(config))


def test_the_schema_lets_other_tools_have_their_sections(validator):
    assert not list(
        validator.iter_errors({"another_tool": {"x": 1}, "activation_checkpointing": {"profile": True}})
    )
