"""Writes the report of one or several runs into a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ds_efficient.errors import UserError
from ds_efficient.report.figures import write_figures
from ds_efficient.report.runlog import Run, read_run
from ds_efficient.report.summary import unique_names
from ds_efficient.report.tables import csv_text, markdown_report

REPORT = "report.md"


def default_output(runs: Sequence[Run]) -> Path:
    """Return ``report`` beside the log of one run, or in the working directory for several."""
    return runs[0].path.parent / "report" if len(runs) == 1 else Path("report")


def write_report(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    figures: bool = True,
) -> tuple[list[Run], list[str], list[Path]]:
    """Read runs and write ``report.md``, one CSV a run, and the figures of `write_figures`.

    Args:
        paths: folders that hold a run.jsonl, or such files.
        output: folder; made when missing, files of an earlier report in it are replaced. None:
            `default_output`.
        figures: whether to draw.

    Returns:
        (runs, their names in the report, files written).

    Raises:
        UserError: a run cannot be read, the folder cannot be written, or matplotlib is missing.
    """
    runs = [read_run(path) for path in paths]
    names = unique_names(runs)
    folder = Path(output) if output is not None else default_output(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = write_figures(runs, names, folder) if figures else []
        report = folder / REPORT
        report.write_text(markdown_report(runs, names, [path.name for path in drawn]), encoding="utf-8")
        written = [report, *drawn]
        for run, name in zip(runs, names, strict=True):
            path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name) or 'run'}.csv"
            path.write_text(csv_text(run), encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise UserError(
            f"report folder {folder}: cannot be written ({error.strerror}); choose another with --output"
        ) from error
    return runs, names, written
