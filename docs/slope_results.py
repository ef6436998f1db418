"""Tables and figures of SLoPe's measurements, from the CSV files in docs/results/data.

`docs/generate.py` writes them. A measurement whose file is not there yet has a line that says so.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]

DATA = Path(__file__).resolve().parent / "results" / "data"
# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#CC79A7", "#009E73")
ARMS = {
    "dense": "dense",
    "slope": "SLoPe",
    "slope_adapters": "SLoPe, adapters in the last 1 %",
    "slope_adapters10": "SLoPe, adapters in the last 10 %",
    "srste": "SR-STE (mask chosen in each step)",
}


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


def conditions(rows: Sequence[Row]) -> list[str]:
    """Return a line with device, versions, commit and command."""
    parts = []
    for name in ("device", "torch", "cuda", "cusparselt", "python", "commit"):
        value = rows[0].get(name)
        if value:
            parts.append(value if name == "device" else f"{name} {value}")
    threads = rows[0].get("threads")
    if threads:
        parts.insert(1, f"{threads} thread(s)")
    commands = dict.fromkeys(row["command"] for row in rows)
    return [f"{', '.join(parts)}; {'; '.join(f'`{command}`' for command in commands)}.", ""]


def each(name: str, render: Callable[[list[Row]], list[str]]) -> str:
    """Return what `render` makes of every file of a measurement, or that there is none."""
    lines = [line for rows in read(name) for line in [*render(rows), *conditions(rows)]]
    return "\n".join(lines or ["Not measured yet.", ""])


def kernels() -> str:
    """Return the table of the memory-bound kernels."""

    def render(rows: list[Row]) -> list[str]:
        header = ("op", "pattern", "type", "out x in", "ms", "GB/s", "of the floor's speed",
                  "plain torch, ms", "gather, ms")  # fmt: skip
        return table(
            header,
            (
                (row["op"], row["pattern"], row["dtype"], row["shape"], number(row, "milliseconds", 4),
                 number(row, "gigabytes_per_second", 0), percent(row, "fraction_of_floor"),
                 number(row, "reference_milliseconds"), number(row, "gather_milliseconds", 4))
                for row in rows
            ),
        )  # fmt: skip

    return each("slope_kernels", render)


def products() -> str:
    """Return the table of the sparse products."""

    def render(rows: list[Row]) -> list[str]:
        header = ("product", "rows x k", "tokens", "dense, ms", "cuSPARSELt alone, ms", "ours, ms",
                  "over dense", "ours / cuSPARSELt", "`auto` takes", "tiles, token splits")  # fmt: skip
        return table(
            header,
            (
                (row["op"], f"{row['rows']} x {row['k']}", row["tokens"],
                 number(row, "dense_milliseconds", 4), number(row, "bare_milliseconds", 4),
                 number(row, "milliseconds", 4), f"{number(row, 'speedup', 2)}x", number(row, "over_bare"),
                 row["choice"], f"{row['tiles']}, {row['token_splits']}")
                for row in rows
            ),
        )  # fmt: skip

    return each("slope_gemm", render)


def adapters() -> str:
    """Return the table of the sparse product with an adapter."""

    def render(rows: list[Row]) -> list[str]:
        return table(
            ("out x in", "tokens", "rank", "product alone, ms", "with adapter, ms", "joined, ms"),
            (
                (f"{row['out']}x{row['in']}", row["tokens"], row["rank"], number(row, "product"),
                 number(row, "apart"), number(row, "joined"))
                for row in rows
            ),
        )  # fmt: skip

    return each("slope_adapter", render)


_PARTS = {
    "layer": "linear layer, training",
    "block": "GPT block, training",
    "inference": "GPT block, forward",
}
_SPLIT = ("forward", "input_gradient", "weight_gradient")


def layers() -> str:
    """Return the tables of layers and blocks: whole passes, parts, memory."""

    def render(rows: list[Row]) -> list[str]:
        timed = [row for row in rows if row["part"] in _PARTS]
        lines = table(
            ("what", "size", "tokens", "dense, ms", "sparse, ms", "speed-up", "host: dense, sparse, ms"),
            (
                (_PARTS[row["part"]], row["shape"], row["tokens"], number(row, "dense_ms"),
                 number(row, "slope_ms"), f"{number(row, 'ratio', 2)}x",
                 f"{number(row, 'dense_host_ms', 2)}, {number(row, 'slope_host_ms', 2)}")
                for row in timed
            ),
        )  # fmt: skip
        lines += [f"![Speed-up over the dense layer](../_generated/slope_layer_{slug(rows)}.png)", ""]
        lines += table(
            ("out x in", *(f"{name.replace('_', ' ')}: dense, sparse, ms" for name in _SPLIT),
             "both operands, ms", "column pass, ms"),
            (
                (row["shape"],
                 *(_pair(row, part) for part in _SPLIT),
                 number(row, "refresh_ms", 4), number(row, "select_columns_ms", 4))
                for row in rows if row["part"] == "layer"
            ),
        )  # fmt: skip
        held = [row for row in rows if row["part"].startswith("memory")]
        if held:
            lines += table(
                ("out x in", "weight stands", "dense, MiB", "sparse, MiB", "sparse / dense",
                 "without operands", "read from"),
                (
                    (row["shape"], "in a flat buffer" if "flat" in row["part"] else "alone",
                     mebibytes(row, "dense_bytes"), mebibytes(row, "slope_bytes"), number(row, "ratio"),
                     number(row, "states_and_masks_ratio"), row["measured"])
                    for row in held
                ),
            )  # fmt: skip
        return lines

    return each("slope_layer", render)


def _pair(row: Row, part: str) -> str:
    return f"{number(row, f'dense_{part}_ms')}, {number(row, f'slope_{part}_ms')}"


def on_the_cpu() -> str:
    """Return the table of the layer on the CPU."""

    def render(rows: list[Row]) -> list[str]:
        return table(
            ("type", "out x in", "tokens", "dense, ms", "sparse, ms", "sparse / dense", "forward alone"),
            (
                (row["dtype"], row["shape"], row["tokens"], number(row, "dense_ms", 1),
                 number(row, "slope_ms", 1), number(row, "overhead", 2), number(row, "forward_overhead", 2))
                for row in rows
            ),
        )  # fmt: skip

    return each("slope_cpu", render)


def quality() -> str:
    """Return the final losses of every comparison, and their curves."""

    def render(rows: list[Row]) -> list[str]:
        final = {(row["arm"], row["seed"]): row for row in rows}  # the last row of each
        tokens = max(int(row["tokens"]) for row in rows)
        lines = [f"Size `{rows[0]['size']}`, {tokens:,} tokens an arm:", ""]
        lines += table(
            ("arm", "parameters", "seeds", "validation loss", "gap to dense"),
            (_arm(arm, final) for arm in ARMS if any(name == arm for name, _ in final)),
        )
        return [*lines, f"![Validation loss](../_generated/slope_quality_{slug(rows)}.png)", ""]

    return each("slope_quality", render)


def _arm(arm: str, final: dict[tuple[str, str], Row]) -> tuple[str, ...]:
    chosen = {seed: row for (name, seed), row in final.items() if name == arm}
    losses = [float(row["valid_loss"]) for row in chosen.values()]
    gaps = [
        float(row["valid_loss"]) - float(final["dense", seed]["valid_loss"])
        for seed, row in chosen.items()
        if ("dense", seed) in final
    ]
    parameters = int(next(iter(chosen.values()))["parameters"])
    gap = "-" if arm == "dense" else spread(gaps, "+")
    return ARMS[arm], f"{parameters:,}", str(len(losses)), spread(losses, ""), gap


def spread(values: Sequence[float], sign: str) -> str:
    """Return mean and, of several, standard deviation."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.4f}"
    return f"{mean} +- {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def slug(rows: Sequence[Row]) -> str:
    """Return a file name's part for a measurement."""
    return "_".join([*([rows[0]["size"]] if rows[0].get("size") else []), *rows[0]["device"].split()])


def figures(folder: Path) -> list[Path]:
    """Draw a figure for every comparison of quality and of layers; returns their paths."""
    import matplotlib

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.color": "#dddddd", "axes.axisbelow": True, "legend.frameon": False,
             "figure.constrained_layout.use": True, "savefig.dpi": 150}  # fmt: skip
    drawn = []
    with matplotlib.rc_context(style):
        for rows in read("slope_quality"):
            drawn.append(_save(_curves(rows), folder / f"slope_quality_{slug(rows)}.png"))
        for rows in read("slope_layer"):
            drawn.append(_save(_bars(rows), folder / f"slope_layer_{slug(rows)}.png"))
    return drawn


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Software": None})
    return path


def _new_figure(width: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2))
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _curves(rows: list[Row]) -> Any:
    """Validation loss against tokens, the mean over the seeds."""
    figure, axes = _new_figure(7.5)
    unit = 1e6 if max(int(row["tokens"]) for row in rows) >= 1e6 else 1e3
    for colour, (arm, title) in zip(COLOURS, ARMS.items(), strict=True):
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


def _bars(rows: list[Row]) -> Any:
    """Speed-up over dense of every timed case."""
    figure, axes = _new_figure(8)
    timed = [row for row in rows if row["part"] in _PARTS][::-1]
    colours = dict(zip(_PARTS, COLOURS[1:], strict=False))
    axes.barh(
        [f"{row['part']} {row['shape']}" for row in timed],
        [float(row["ratio"]) for row in timed],
        color=[colours[row["part"]] for row in timed],
    )
    axes.axvline(1.0, color="#000000", linewidth=1)
    axes.set_xlabel("dense time / sparse time")
    axes.grid(axis="y", visible=False)
    return figure
