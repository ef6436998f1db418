"""Tables and figures of random-LTD: the paper's schedules, and measurements from docs/results/data.

`docs/generate.py` writes them. A measurement whose file is not there yet has a line with the command for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from result_tables import (
    COLOURS,
    STYLE,
    Row,
    conditions,
    each,
    loss_curves,
    new_figure,
    number,
    percent,
    read,
    save,
    slug,
    spread,
    table,
)

ARMS = {
    "dense": "dense",
    "constant": "constant length",
    "growing": "growing length",
    "growing_lr": "growing, LayerToken LR, equal tokens",
    "growing_lr_equal": "growing, LayerToken LR, equal layer tokens",
}
LONGER = "dense, more steps"
STEPS = "python tests/perf/random_ltd_steps.py"
KERNELS = "python tests/perf/random_ltd_kernels.py"
QUALITY = "python tests/perf/random_ltd_quality.py run --size 125m"
_CONDITIONS = ("device", "threads", "torch", "cuda", "python", "commit", "command")
_BILLION = 10**9
# Of the paper: name, kept at first, length, data tokens an increase, sequences a step, steps, claimed saving.
_PAPER = (
    ("GPT-3 350M and 1.3B", 128, 2048, 1_750_000_000, 512, 300 * _BILLION // (512 * 2048), "33.3%"),
    ("BERT-large, 2 M steps", 200, 512, 48 * _BILLION, 1024, 2_000_000, "26.2%"),
    ("BERT-large, 2 M steps", 128, 512, 38 * _BILLION, 1024, 2_000_000, "31.1%"),
    ("BERT-large, 200 k steps", 256, 512, 3_800_000_000, 1024, 200_000, "14.1%"),
    ("BERT-large, 200 k steps", 256, 512, 6 * _BILLION, 1024, 200_000, "22.3%"),
)


def schedules() -> str:
    """Return the table of the paper's schedules, computed."""
    from ds_efficient.random_ltd.schedule import schedule_by_tokens

    def line(name: str, low: int, length: int, each_: int, batch: int, steps: int, claimed: str) -> list[str]:
        schedule = schedule_by_tokens(low, length, 16, each_, batch_size=batch, total_layer_num=24)
        saved = 1 - schedule.consumed_layer_tokens(steps) / schedule.dense_layer_tokens(steps)
        full = schedule.full_from or 0
        growth = f"{low} to {length}, +16 each {each_ / _BILLION:g} G tokens"
        return [name, growth, f"{full:,} of {steps:,}", claimed, f"{100 * saved:.2f}%"]

    header = ("model", "kept tokens", "steps to full length", "paper", "computed, 22 of 24 layers")
    return "\n".join(table(header, (line(*row) for row in _PAPER)))


def _run(row: Row) -> tuple[str, str]:
    return row["model"], row["passes"]


def steps() -> str:
    """Return the tables of step times and of the time that the paper's schedule saves."""

    def render(rows: list[Row]) -> list[str]:
        dense = {_run(row): row for row in rows if row["part"] == "dense"}
        lines = table(
            ("model", "GPUs", "micro-batch", "passes a step", "dense step, ms",
             "time saved over the schedule", "layer tokens saved", "matrix products saved"),
            (
                (row["model"], row["gpus"], row["micro_batch"], row["passes"],
                 number(dense[_run(row)], "milliseconds", 1), percent(row, "time_saved"),
                 percent(row, "layer_tokens_saved"), percent(row, "products_saved"))
                for row in rows if row["part"] == "schedule"
            ),
        )  # fmt: skip
        lines += [
            f"![Time of a step over the dense one](../_generated/random_ltd_steps_{slug(rows)}.png)",
            "",
        ]
        return lines + table(
            ("model", "passes a step", "kept tokens", "step, ms", "of the dense step", "tokens/s",
             "peak memory, GiB"),
            (
                (row["model"], row["passes"], row["kept"], number(row, "milliseconds", 1),
                 percent(row, "relative"), number(row, "tokens_per_second", 0),
                 f"{float(row['peak_memory']) / 2**30:.1f}")
                for row in rows if row["part"] == "step"
            ),
        )  # fmt: skip

    return each("random_ltd_steps", render, STEPS)


def kernels() -> str:
    """Return the table of the kernels, with the columns that its file has."""

    def render(rows: list[Row]) -> list[str]:
        names = [name for name in rows[0] if name not in _CONDITIONS]
        return table(
            [name.replace("_milliseconds", ", ms").replace("_", " ") for name in names],
            ([_cell(row, name) for name in names] for row in rows),
        )

    return each("random_ltd_kernels", render, KERNELS)


def _cell(row: Row, name: str) -> str:
    text = row[name]
    if name.startswith("fraction"):
        return percent(row, name)
    try:
        return text if text.lstrip("-").isdigit() else f"{float(text):.4g}"
    except ValueError:
        return text or "-"


def quality() -> str:
    """Return the final losses of every comparison, and their curves; a longer dense run is its last row."""

    def render(rows: list[Row]) -> list[str]:
        control = _longer(rows)
        final = {(row["arm"], row["seed"]): row for row in rows}  # the last row of each
        rates = ", ".join(dict.fromkeys(f"{float(row['lr']):g}" for row in rows))
        lines = [f"Size `{rows[0]['size']}`, learning rate {rates}:", ""]
        cells = [_arm(arm, final) for arm in ARMS if any(found == arm for found, _ in final)]
        if control:
            ends = {("longer", row["seed"]): row for row in control}
            cells.append(_arm("longer", {**final, **ends}))
        lines += table(
            ("arm", "tokens", "layer tokens", "seeds", "validation loss", "gap to dense"),
            cells,
        )
        name = f"random_ltd_quality_{slug(rows)}"
        lines += [f"![Validation loss by tokens](../_generated/{name}.png)", ""]
        lines += [f"![Validation loss by layer tokens](../_generated/{name}_layer_tokens.png)", ""]
        return lines + (["The dense run with more steps:", "", *conditions(control)] if control else [])

    return each("random_ltd_quality", render, QUALITY)


def _longer(rows: list[Row]) -> list[Row]:
    """Return the rows of the longer dense run that goes with a comparison, or none."""
    return next((found for found in read("random_ltd_longer") if slug(found) == slug(rows)), [])


def _arm(arm: str, final: dict[tuple[str, str], Row]) -> tuple[str, ...]:
    chosen = {seed: row for (name, seed), row in final.items() if name == arm}
    gaps = [
        float(row["valid_loss"]) - float(final["dense", seed]["valid_loss"])
        for seed, row in chosen.items()
        if ("dense", seed) in final
    ]
    losses = [float(row["valid_loss"]) for row in chosen.values()]
    one = next(iter(chosen.values()))
    gap = "-" if arm == "dense" else spread(gaps, "+")
    counts = (f"{int(one['tokens']):,}", f"{int(one['layer_tokens']):,}", str(len(losses)))
    return ARMS.get(arm, LONGER), *counts, spread(losses, ""), gap


def figures(folder: Path) -> list[Path]:
    """Draw the figures of step times and of quality; returns their paths."""
    import matplotlib

    drawn = []
    with matplotlib.rc_context(STYLE):
        for rows in read("random_ltd_steps"):
            drawn.append(save(_step_curves(rows), folder / f"random_ltd_steps_{slug(rows)}.png"))
        for rows in read("random_ltd_quality"):
            name = f"random_ltd_quality_{slug(rows)}"
            drawn.append(save(_loss_curves(rows, "tokens"), folder / f"{name}.png"))
            layers = _loss_curves(rows, "layer_tokens")
            drawn.append(save(layers, folder / f"{name}_layer_tokens.png"))
    return drawn


def _loss_curves(rows: list[Row], clock: str) -> Any:
    """Validation loss by tokens or layer tokens; a longer dense run is a dashed grey line."""
    figure = loss_curves([{**row, "tokens": row[clock]} for row in rows], ARMS)
    axes = figure.axes[0]
    if clock == "layer_tokens":
        axes.set_xlabel(axes.get_xlabel().replace("training tokens", "layer tokens"))
    control = [row for row in _longer(rows) if int(row["step"])]
    if control:
        unit = 1e6 if "million" in axes.get_xlabel() else 1e3
        axes.plot(
            [int(row[clock]) / unit for row in control],
            [float(row["valid_loss"]) for row in control],
            color="#777777", linestyle="--", marker="o", markersize=3, linewidth=1.4, label=LONGER,
        )  # fmt: skip
        axes.legend()
    return figure


def _step_curves(rows: list[Row]) -> Any:
    """Time of a step over the dense step, by kept tokens."""
    figure, axes = new_figure(7.5)
    found = [row for row in rows if row["part"] == "step"]
    for colour, run in zip(COLOURS[1:], dict.fromkeys(_run(row) for row in found), strict=False):
        points = [(int(row["kept"]), float(row["relative"])) for row in found if _run(row) == run]
        label = f"{run[0]}, {run[1]} micro-batches a step"
        axes.plot(
            *zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.4, label=label
        )
    axes.axhline(1.0, color="#000000", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("kept tokens of a sequence")
    axes.set_ylabel("time of a step / dense step")
    if found:
        axes.legend()
    return figure
