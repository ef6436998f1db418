"""README command 1, without its installation and with few steps: it learns, goes on and starts over."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from house_rules import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]


def quickstart(folder: Path, *arguments: str) -> str:
    """Run the script with this Python; return its output."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", "--no-install", "--folder", str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "run.jsonl").read_text().splitlines()]


def test_it_learns_reports_and_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("of an earlier run")

    first = quickstart(folder, "--steps", "20", "--fresh")
    found = re.search(r"validation loss +([\d.]+) to ([\d.]+)", first)
    assert found is not None
    before, after = float(found[1]), float(found[2])
    assert after < before - 0.5
    assert "resuming" not in first
    evaluated = [record["step"] for record in records(folder) if record["kind"] == "eval"]
    assert evaluated == [0, 20]
    made = (folder / "corpus" / "train_text_document.bin").stat().st_mtime_ns
    assert (folder / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{found[1]} to {found[2]}" in (folder / "report" / "report.md").read_text()

    second = quickstart(folder, "--steps", "24")
    assert "resuming from" in second
    assert (folder / "corpus" / "train_text_document.bin").stat().st_mtime_ns == made
    assert [record["step"] for record in records(folder) if record["kind"] == "resume"] == [20]
    assert [record["step"] for record in records(folder) if record["kind"] == "eval"] == [0, 20, 24]
    assert (folder / "checkpoints" / "latest").read_text() == "global_step24"


def test_an_occupied_folder_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text("somebody's work\n")
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "launch/quickstart.sh", "--no-install", "--folder", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": search}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--fresh" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "corpus" / "train.jsonl").read_text() == "somebody's work\n"
