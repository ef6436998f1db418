"""What the tables and figures of measurements share: CSV files of docs/results/data, Markdown, matplotlib."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]

DATA = Path(__file__).resolve().parent / "results" / "data"
# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#CC79A7", "#009E73")
STYLE: dict[str, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}  # fmt: skip


def read(name: str) -> list[list[Row]]:
    """Return the rows of every ``<name>_*.csv``, one list a file."""
    found = []
    for path in sorted(DATA.glob(f"{name}_*.csv")):
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        if rows:
            found.append(rows)
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table, closed by an empty one."""
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def number(row: Row, name: str, digits: int = 3) -> str:
    """Return a number of a row, or a dash."""
    return f"{float(row[name]):.{digits}f}" if row.get(name) else "-"


def percent(row: Row, name: str) -> str:
    """Return a share of a row in percent, or a dash."""
    return f"{100 * float(row[name]):.1f}%" if row.get(name) else "-"


def mebibytes(row: Row, name: str) -> str:
    """Return bytes of a row in MiB, or a dash."""
    return f"{float(row[name]) / 2**20:,.1f}" if row.get(name) else "-"


def with_bases(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return training steps, each with the first case of the same model."""
    first: dict[str, Row] = {}
    return [(row, first.setdefault(row["case"].partition("-")[0], row)) for row in rows]


def whole_steps(rows: Sequence[Row]) -> list[str]:
    """Return the table of training steps, each beside the first case with the same model."""
    return table(
        ("case", "ms a step", "tokens/s", "over dense", "model TFLOP/s", "peak memory, GiB", "of dense"),
        (
            (row["case"], number(row, "ms_per_step", 1), number(row, "tokens_per_second", 0),
             f"{float(row['tokens_per_second']) / float(base['tokens_per_second']):.3f}x",
             number(row, "model_tflops", 0), f"{float(row['peak_memory']) / 2**30:.1f}",
             f"{float(row['peak_memory']) / float(base['peak_memory']):.3f}")
            for row, base in with_bases(rows)
        ),
    )  # fmt: skip


def conditions(rows: Sequence[Row]) -> list[str]:
    """Return a line with device, versions, commit and command."""
    parts = []
    for name in (
        "device",
        "gpu",
        "torch",
        "cuda",
        "cusparselt",
        "deepspeed",
        "megatron-core",
        "python",
        "commit",
    ):
        values = list(dict.fromkeys(row[name] for row in rows if row.get(name)))
        if values:
            found = ", ".join(values)
            parts.append(found if name in ("device", "gpu") else f"{name} {found}")
    threads = rows[0].get("threads")
    if threads:
        parts.insert(1, f"{threads} thread(s)")
    commands = dict.fromkeys(row["command"] for row in rows)
    return [f"{', '.join(parts)}; {'; '.join(f'`{command}`' for command in commands)}.", ""]


def each(name: str, render: Callable[[list[Row]], list[str]], command: str = "") -> str:
    """Return what `render` makes of every file of a measurement, or that there is none.

    Args:
        name: files ``<name>_*.csv``.
        render: makes lines of a file's rows.
        command: what writes the file, to be named where there is none.
    """
    lines = [line for rows in read(name) for line in [*render(rows), *conditions(rows)]]
    absent = f"Not measured yet; `{command}` does it." if command else "Not measured yet."
    return "\n".join(lines or [absent, ""])


def spread(values: Sequence[float], sign: str) -> str:
    """Return mean and, of several, standard deviation."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.4f}"
    return f"{mean} +- {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def slug(rows: Sequence[Row]) -> str:
    """Return a file name's part for a measurement."""
    return "_".join([*([rows[0]["size"]] if rows[0].get("size") else []), *rows[0]["device"].split()])


def save(figure: Any, path: Path) -> Path:
    """Write a figure without what changes from run to run; returns `path`."""
    figure.savefig(path, metadata={"Software": None})
    return path


def new_figure(width: float) -> tuple[Any, Any]:
    """Return a figure and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2))
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def final_losses(name: str, rows: list[Row], arms: Mapping[str, str], base: str) -> list[str]:
    """Return the lines of a comparison of quality: its last losses, and where the curves are.

    Args:
        name: of the measurement.
        rows: of its file.
        arms: titles.
        base: the arm that gaps are to, with the same seed.
    """
    final = {(row["arm"], row["seed"]): row for row in rows}  # the last row of each
    tokens = max(int(row["tokens"]) for row in rows)
    lines = [f"Size `{rows[0]['size']}`, {tokens:,} tokens an arm:", ""]
    lines += table(
        ("arm", "parameters", "seeds", "validation loss", f"gap to {arms[base]}"),
        (_arm(arm, final, arms, base) for arm in arms if any(found == arm for found, _ in final)),
    )
    return [*lines, f"![Validation loss](../_generated/{name}_{slug(rows)}.png)", ""]


def _arm(
    arm: str, final: Mapping[tuple[str, str], Row], arms: Mapping[str, str], base: str
) -> tuple[str, ...]:
    chosen = {seed: row for (name, seed), row in final.items() if name == arm}
    losses = [float(row["valid_loss"]) for row in chosen.values()]
    gaps = [
        float(row["valid_loss"]) - float(final[base, seed]["valid_loss"])
        for seed, row in chosen.items()
        if (base, seed) in final
    ]
    parameters = int(next(iter(chosen.values()))["parameters"])
    gap = "-" if arm == base else spread(gaps, "+")
    return arms[arm], f"{parameters:,}", str(len(losses)), spread(losses, ""), gap


def loss_curves(rows: Sequence[Row], arms: Mapping[str, str]) -> Any:
    """Validation loss against tokens, the mean over the seeds."""
    figure, axes = new_figure(7.5)
    unit = 1e6 if max(int(row["tokens"]) for row in rows) >= 1e6 else 1e3
    for colour, (arm, title) in zip(COLOURS, arms.items(), strict=False):
        points: dict[int, list[float]] = {}
        for row in rows:
            if row["arm"] == arm and int(row["step"]):
                points.setdefault(int(row["tokens"]), []).append(float(row["valid_loss"]))
        if points:
            axes.plot(
                [tokens / unit for tokens in points],
                [statistics.mean(losses) for losses in points.values()],
                color=colour, marker="o", markersize=3, linewidth=1.4, label=title,
            )  # fmt: skip
    axes.set_xlabel(f"training tokens ({'million' if unit == 1e6 else 'thousand'})")
    axes.set_ylabel("validation loss (nats a token)")
    axes.legend()
    return figure
