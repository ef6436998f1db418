"""What the tests of the documentation's tables share: a module reading an empty folder, files for it."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from house_rules import ROOT

COMMON = {"device": "Some GPU", "torch": "2.0", "cuda": "13.0", "python": "3.12", "commit": "abc",
          "command": "python x.py"}  # fmt: skip


def reading_from(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module of docs, which looks for measurements in `folder`."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = importlib.import_module(name)
    monkeypatch.setattr(importlib.import_module("result_tables"), "DATA", folder)
    return module


def names_its_command(module: ModuleType, part: str, folder: Path, start: str = "") -> None:
    """Check that a part without measurements says what to run, a script that exists, and draws nothing."""
    text = getattr(module, part)()
    script = text.split("python ")[1].split("`")[0].split()[0]
    assert text.startswith(f"Not measured yet; `python tests/perf/{start}")
    assert (ROOT / script).is_file()
    assert module.figures(folder) == []


def shows_every_measurement(technique: str) -> None:
    """Check that a technique's tables name the command of each of its files in the repository."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        parts = importlib.import_module("generate").PARTS
        text = "".join(render() for name, render in parts.items() if name.startswith(f"{technique}_"))
    finally:
        sys.path.remove(str(ROOT / "docs"))
    for path in (ROOT / "docs" / "results" / "data").glob(f"{technique}_*.csv"):
        with open(path, newline="") as stream:
            assert next(csv.DictReader(stream))["command"] in text, path.name


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write ``<name>_Some_GPU.csv``."""
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with open(folder / f"{name}_Some_GPU.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*fields, *COMMON])
        writer.writeheader()
        writer.writerows({**row, **COMMON} for row in rows)
