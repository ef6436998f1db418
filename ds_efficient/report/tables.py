"""The written part of a report: Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from ds_efficient.report.runlog import Run
from ds_efficient.report.summary import STANDARD_FIELDS, Summary, eval_curve, flat_metrics, summarize

NOT_KNOWN = "N/A"


def _number(value: float | None, pattern: str, unit: str = "") -> str:
    return NOT_KNOWN if value is None else format(value, pattern) + unit


def _from_to(ends: tuple[float, float] | None, pattern: str) -> str:
    return NOT_KNOWN if ends is None else f"{ends[0]:{pattern}} to {ends[1]:{pattern}}"


def _seconds(value: float | None) -> str:
    if value is None:
        return NOT_KNOWN
    minutes, seconds = divmod(value, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{value:,.0f} s ({hours} h {minutes} min)"
    return f"{value:,.0f} s ({minutes} min {seconds:.0f} s)" if minutes else f"{value:.1f} s"


def _rows(runs: Sequence[Run], summaries: Sequence[Summary]) -> list[tuple[str, list[str]]]:
    """Return the lines of the table: title and one cell a run."""
    splits = sorted(
        {split for found in summaries for split in found.eval_loss}, key=lambda name: name != "valid"
    )

    def cells(make: Callable[[Summary], str]) -> list[str]:
        return [make(found) for found in summaries]

    rows = []
    for split in splits:
        title = "validation" if split == "valid" else split
        rows.append((f"{title} loss", [_from_to(found.eval_loss.get(split), ".4f") for found in summaries]))
        rows.append(
            (
                f"{title} perplexity",
                [_from_to(found.eval_perplexity.get(split), ",.2f") for found in summaries],
            )
        )
    rows += [
        ("training loss", cells(lambda s: _from_to(s.train_loss, ".4f"))),
        ("steps", cells(lambda s: _number(s.steps, ",d"))),
        ("tokens", cells(lambda s: _number(s.tokens, ",.0f"))),
        ("training time", cells(lambda s: _seconds(s.seconds))),
        ("tokens/s, median after warm-up", cells(lambda s: _number(s.tokens_per_second, ",.0f"))),
        ("model TFLOP/s a device", cells(lambda s: _number(s.model_tflops, ".3g"))),
        ("executed TFLOP/s a device", cells(lambda s: _number(s.executed_tflops, ".3g"))),
        ("MFU", cells(lambda s: NOT_KNOWN if s.mfu is None else f"{100 * s.mfu:.1f} %")),
        (
            "peak memory of a rank",
            cells(lambda s: NOT_KNOWN if s.peak_memory is None else f"{s.peak_memory / 2**30:.2f} GiB"),
        ),
        ("parameters", [_number(run.start.get("parameters"), ",d") for run in runs]),
        ("device", [_device(run) for run in runs]),
        ("precision", [str(run.start.get("precision") or NOT_KNOWN) for run in runs]),
        ("ended", [_ending(run) for run in runs]),
    ]
    return rows


def _device(run: Run) -> str:
    if not run.start:
        return NOT_KNOWN
    name = run.start.get("gpu") or "CPU"
    ranks = run.start.get("world_size")
    return f"{name}, {ranks} rank{'' if ranks == 1 else 's'}" if ranks else str(name)


def _ending(run: Run) -> str:
    if run.end is None:
        return "not ended: the run goes on, or was killed"
    return f"step {run.end.get('step', '?')}: {run.end.get('reason', '?')}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(map(_escape, heads)) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]


def result_rows(runs: Sequence[Run], names: Sequence[str]) -> list[list[str]]:
    """Return the rows of the result table: title, then one cell a run."""
    summaries = [summarize(run, name) for run, name in zip(runs, names, strict=True)]
    return [[title, *cells] for title, cells in _rows(runs, summaries)]


def _evidence(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    rows = []
    for run, name in zip(runs, names, strict=True):
        for technique, proof in run.evidence.items():
            proof = proof if isinstance(proof, dict) else {"summary": str(proof)}
            acted = {True: "yes", False: "no"}.get(proof.get("acted"), NOT_KNOWN)  # type: ignore[arg-type]
            rows.append([name, technique, acted, str(proof.get("summary", ""))])
    if not rows:
        return ["No technique was enabled, or the run has not proved one yet."]
    return markdown_table(["run", "technique", "acted", "evidence"], rows)


def _versions(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    keys = list(dict.fromkeys(key for run in runs for key in _mapping(run.start.get("versions"))))
    if not keys:
        return ["The log holds no versions."]
    rows = [[key, *(str(_mapping(run.start.get("versions")).get(key, "")) for run in runs)] for key in keys]
    return markdown_table(["", *names], rows)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _settings(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for run, name in zip(runs, names, strict=True):
        command = run.start.get("command")
        if isinstance(command, list):
            lines += [f"Command of {name}:", "", "```", " ".join(map(str, command)), "```", ""]
        if run.start.get("config"):
            text = json.dumps(run.start["config"], indent=2, ensure_ascii=False)
            lines += [f"DeepSpeed configuration of {name}:", "", "```json", text, "```", ""]
    return lines or ["The log holds no settings.", ""]


def markdown_report(runs: Sequence[Run], names: Sequence[str], figures: Sequence[str]) -> str:
    """Return the whole report.

    Args:
        runs: as read.
        names: how the report calls them.
        figures: file names of the figures, beside the report.
    """
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    lines = [f"# Training report: {title}", "", *markdown_table(["", *names], result_rows(runs, names)), ""]
    notes = [f"- {name}: {note}" for run, name in zip(runs, names, strict=True) for note in run.notes]
    notes += [
        f"- {name}: resumed at step {', '.join(map(str, run.resumes))}"
        for run, name in zip(runs, names, strict=True)
        if run.resumes
    ]
    if notes:
        lines += [*notes, ""]
    for figure in figures:
        lines += [f"![{figure.partition('.')[0]}]({figure})", ""]
    lines += ["## Evidence", "", *_evidence(runs, names), ""]
    lines += ["## Versions", "", *_versions(runs, names), ""]
    lines += ["## Settings", "", *_settings(runs, names)]
    lines.append(
        "Model FLOPs are those of the dense model, forward and backward, causal attention counted half; "
        "executed FLOPs add recomputation and leave out what techniques skip. MFU is model FLOPs "
        "over the dense peak."
    )
    return "\n".join(lines) + "\n"


def csv_text(run: Run) -> str:
    """Return the run as CSV: one row a logged step, validation losses and techniques' metrics as columns."""
    splits = {split: dict(zip(*_steps_and_values(run, split), strict=True)) for split in sorted(run.evals)}
    by_step: dict[int, dict[str, Any]] = {int(line["step"]): line for line in run.train}
    metrics = sorted({name for line in run.train for name in flat_metrics(line)})
    heads = [*STANDARD_FIELDS, *(f"{split}_loss" for split in splits), *metrics]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for step in sorted(set(by_step) | {step for losses in splits.values() for step in losses}):
        line = by_step.get(step, {"step": step})
        flat = flat_metrics(line)
        row = [line.get(name) for name in STANDARD_FIELDS]
        row += [losses.get(step) for losses in splits.values()] + [flat.get(name) for name in metrics]
        writer.writerow(["" if cell is None else cell for cell in row])
    return out.getvalue()


def _steps_and_values(run: Run, split: str) -> tuple[list[int], list[float]]:
    found = eval_curve(run, split)
    return found.steps, found.values
