"""The commands ``validate`` and ``schema``, and the generated reference."""

from __future__ import annotations

import argparse
import json

import pytest

from ds_efficient.commands import schema, validate
from ds_efficient.config.base import Section
from ds_efficient.config.efficiency import GeneralConfig
from ds_efficient.config.reference import render_reference
from ds_efficient.config.schema import build_schema, render_schema
from ds_efficient.errors import UserError
from ds_efficient.registry import TECHNIQUES, resolve


def run(*arguments):
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for command in (schema, validate):
        command.add_parser(subparsers)
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.run(args)


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_valid_files_give_one_line_each(file, capsys):
    paths = [file("a.json", {"bf16": {"enabled": True}}), file("b.json", {"zero_optimization": {"stage": 3}})]
    assert run("validate", *paths) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        f"{paths[0]}: valid; no technique enabled; bf16, ZeRO stage 0",
        f"{paths[1]}: valid; no technique enabled; fp32, ZeRO stage 3",
    ]


def test_every_problem_of_every_file_is_printed_and_the_status_is_2(file, capsys):
    good = file("good.json", {})
    bad = file("bad.json", {"rmm": {"ratio": 3, "rows": 1}, "gradient_cliping": 1})
    broken = file("broken.json", "{")
    assert run("validate", good, bad, broken, "absent.json") == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{good}: valid; no technique enabled; fp32, ZeRO stage 0"]
    lines = err.splitlines()
    assert lines[0].startswith(f"{bad}: warning: gradient_cliping: unknown top-level key")
    assert lines[1] == f"{bad}: 2 problems"
    assert lines[2].startswith("  rmm.rows: unknown key") and lines[3].startswith("  rmm.ratio: 3")
    assert lines[4] == f"{broken}: 1 problem" and "is not valid JSON" in lines[5]
    assert lines[6] == "absent.json: 1 problem" and "no such file" in lines[7]


def test_show_defaults_prints_json_and_nothing_else(file, capsys):
    path = file("a.json", {"slope": {"pattern": "1:4"}})
    assert run("validate", "--show-defaults", path) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["slope"]["pattern"] == "1:4" and shown["slope"]["adapter"]["rank"] == 64
    assert shown["data_efficiency"]["data_routing"]["random_ltd"]["enabled"] is False
    assert shown["ds_efficient"]["seed"] == 1234
    assert "valid" in err


def test_the_world_size_is_checked(file, capsys):
    path = file("a.json", {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 2})
    assert run("validate", path, "--world-size", 3) == 0
    assert run("validate", path, "--world-size", 2) == 2
    assert "6 is no multiple of train_micro_batch_size_per_gpu 2 x ranks 2 = 4" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        run("validate", path, "--world-size", 0)
    assert caught.value.code == 2


def test_the_schema_is_printed_or_written(tmp_path, capsys):
    assert run("schema") == 0
    printed = capsys.readouterr().out
    path = tmp_path / "schema.json"
    assert run("schema", "--output", path) == 0
    assert path.read_text() == printed == render_schema()
    with pytest.raises(UserError, match="cannot be written"):
        run("schema", "--output", tmp_path / "absent" / "schema.json")


def sections():
    def inside(model, path):
        yield model, path
        for key, field in model.model_fields.items():
            if isinstance(field.default, Section):
                yield from inside(type(field.default), (*path, key))

    for model, path in [
        (GeneralConfig, ("ds_efficient",)),
        *((resolve(row.config), row.path) for row in TECHNIQUES),
    ]:
        yield from inside(model, path)


def test_every_key_has_a_description_in_the_schema_and_in_the_reference():
    text = render_reference()
    built = build_schema()
    for model, path in sections():
        assert model.__doc__
        properties = model.model_json_schema()["properties"]
        heading = text.index(f"`{'.'.join(path)}`")
        for key, entry in properties.items():
            described = entry.get("description")
            assert described, f"{path}.{key}"
            assert text.find(f"| `{key}` | ", heading) > heading
            assert " ".join(described.split()) in text
    assert all(entry.get("description") for entry in built["properties"].values() if "$ref" not in entry)


def test_the_reference_is_one_table_row_a_key():
    lines = render_reference().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert all(line.count(" | ") == 3 and line.endswith(" |") for line in rows)
    nested = 2  # keys of slope.patterns[0]
    assert len(rows) == sum(len(model.model_fields) for model, _ in sections()) + nested
