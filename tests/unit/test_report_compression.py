"""The report's figure of compressed gradients shows what each layer was sent as, step by step."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ds_efficient.report.compression import compressed, draw_compression
from ds_efficient.report.runlog import Run, RunLog, read_run
from ds_efficient.report.write import write_report


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two layers, three logged steps, the plan after the first one."""
    with RunLog(tmp_path / "run" / "run.jsonl") as log:
        log.write("run", world_size=2)
        for step in (1, 2, 3):
            planned = {"error": 3.0, "budget": 4.0} if step > 1 else {}
            log.write(
                "train", step=step, loss=3.0 / step, tokens=step, seconds=float(step), tokens_per_second=9.0,
                lgreco={"ratio": 4.0 * step, "ratio_to_default": 1.0, "bits/a.weight": 2.0 * step,
                        "bits/b.weight": 4.0, **planned},
            )  # fmt: skip
    return read_run(tmp_path / "run")


def test_every_layer_and_step_is_drawn_and_the_error_stands_against_its_budget(run: Run) -> None:
    figure = Figure()
    draw_compression(figure, run)
    left, right, _ = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b"]
    assert left.collections[0].get_array().tolist() == [[2.0, 4.0, 6.0], [4.0, 4.0, 4.0]]
    lines = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    assert lines["bytes: uncompressed / sent"] == [4.0, 8.0, 12.0]
    share = lines["error / budget"]
    assert math.isnan(share[0]) and share[1:] == [0.75, 0.75]


def test_report_has_the_figure_of_compressed_runs_only(run: Run, tmp_path: Path) -> None:
    assert compressed(run) and not compressed(Run(tmp_path, "plain"))
    _, _, written = write_report([run.path], tmp_path / "report")
    assert "compression.png" in {path.name for path in written}
    assert "![compression](compression.png)" in (tmp_path / "report" / "report.md").read_text()
