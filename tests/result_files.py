"""What the tests of the documentation's tables share: a module reading an empty folder, files for it."""

from __future__ import annotations

import csv
import importlib
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


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write ``<name>_Some_GPU.csv``."""
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with open(folder / f"{name}_Some_GPU.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*fields, *COMMON])
        writer.writeheader()
        writer.writerows({**row, **COMMON} for row in rows)
