"""The two-host benchmark of gradient compression: what it sends is what the plans say."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import two_hosts

PERF = Path(__file__).resolve().parents[1] / "perf"
TRIAL = "--size trial --synthetic --steps 3 --warm 2 --rates 1gbit --arms none qsgd powersgd".split()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark as a module, with its command line set."""
    monkeypatch.syspath_prepend(str(PERF))
    monkeypatch.setattr(sys, "argv", ["tests/perf/lgreco_hosts.py", *TRIAL, "--output", str(tmp_path)])
    return importlib.import_module("lgreco_hosts")


@pytest.mark.distributed
@pytest.mark.skipif(two_hosts.why_not() is not None, reason=str(two_hosts.why_not()))
def test_interface_counts_the_bytes_of_the_plan_and_no_host_is_left(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = script.main()
    out, err = capfd.readouterr()
    assert status == 0, err
    if "tc cannot shape" in out:
        pytest.skip(out)
    (path,) = tmp_path.glob("lgreco_hosts_*.csv")
    rows = {row["arm"]: row for row in csv.DictReader(path.open(newline=""))}
    assert list(rows) == ["none", "qsgd", "powersgd"]
    raw = 4 * int(rows["none"]["parameters"])
    assert raw <= float(rows["none"]["bytes"]) < 1.15 * raw
    for arm, least in (("qsgd", 6.0), ("powersgd", 2.0)):
        row = rows[arm]
        # Beside the plan: headers, acknowledgements, and the vectors, which are sent raw.
        vectors = raw - int(row["planned_raw"])
        planned = int(row["planned"]) + vectors
        assert planned <= float(row["bytes"]) < 1.15 * planned + 10_000
        assert float(rows["none"]["bytes"]) > least * float(row["bytes"])
        assert row["planned"] == row["planned_default"]
        # Without a start of the compression in which the runs would part, the losses are close.
        assert float(row["loss"]) == pytest.approx(float(rows["none"]["loss"]), rel=0.02)
    assert not [name for name in two_hosts.namespaces() if not _alive(name)]


def _alive(namespace: str) -> bool:
    """Whether the process that a namespace is named after runs."""
    pid, start = (int(part) for part in namespace.split("-")[1:3])
    return two_hosts._start_time(pid) == start


def test_where_hosts_cannot_be_made_the_reason_is_printed(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(tools=lambda: "no bridge") == 0
    assert capsys.readouterr().out == "skipped: two hosts cannot be made here: no bridge\n"
    assert not list(tmp_path.iterdir())
