"""Tables and figures of MKOR's measurements, from the CSV files in docs/results/data.

`docs/generate.py` writes them. A measurement whose file is not there yet has a line with the command for it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from result_tables import (
    COLOURS,
    STYLE,
    Row,
    each,
    mebibytes,
    new_figure,
    number,
    percent,
    read,
    save,
    slug,
    spread,
    table,
    whole_steps,
)

ARMS = {
    "adamw": "AdamW",
    "sgd": "SGD",
    "lamb": "LAMB",
    "muon": "Muon",
    "kfac": "K-FAC + SGD",
    "kfac_adamw": "K-FAC + AdamW",
    "mkor": "MKOR + AdamW",
    "mkor_right": "MKOR right + AdamW",
    "mkor_right_f1": "MKOR right + AdamW, every step",
    "mkor_right_warm": "MKOR right + AdamW, gamma 0.5, first 30 steps",
    "mkor_right_r8": "MKOR right + AdamW, 8 vectors",
    "mkor_right_r8_warm": "MKOR right + AdamW, 8 vectors, gamma 0.5, first 30 steps",
    "mkor_r8": "MKOR + AdamW, 8 vectors",
    "mkor_right_gamma": "MKOR right + AdamW, gamma 0.5",
    "mkor_right_first": "MKOR right + AdamW, first 30 steps",
    "mkor_left": "MKOR left + AdamW",
    "mkor_sgd": "MKOR + SGD",
    "mkor_right_sgd": "MKOR right + SGD",
    "mkor_lamb": "MKOR + LAMB",
    "mkor_muon": "MKOR + Muon",
    "mkor_right_muon": "MKOR right + Muon",
    "mkor_right_muon_f1": "MKOR right + Muon, every step",
    "mkor_right_muon_warm": "MKOR right + Muon, gamma 0.5, first 30 steps",
    "mkor_right_r8_muon": "MKOR right + Muon, 8 vectors",
    "mkor_right_r8_muon_warm": "MKOR right + Muon, 8 vectors, gamma 0.5, first 30 steps",
    "mkor_h": "MKOR-H + AdamW",
    "mkor_right_h": "MKOR-H right + AdamW",
}
BASE = "adamw"
DRAWN = ("adamw", "muon", "mkor_right", "mkor_right_warm", "mkor_right_f1")
PROBLEMS = "python tests/perf/mkor_problems.py compare"
SETTINGS = "python tests/perf/mkor_problems.py settings"
FORMULA = "python tests/perf/mkor_problems.py formula"
QUALITY = "python tests/perf/mkor_quality.py run --size 125m"
KERNELS = "python tests/perf/mkor_kernels.py"
STEP = "python tests/perf/mkor_step.py"
WHOLE = "python tests/perf/training_step.py --cases 1.3b-fused 1.3b-mkor --name training_step_mkor_H100"


class Point(NamedTuple):
    """An evaluation: step, loss and seconds of training until then."""

    step: float
    loss: float
    seconds: float


Curve = list[Point]


def reached(curve: Curve, target: float) -> Point | None:
    """Return where a curve first comes down to a loss, in proportion between evaluations; None: nowhere."""
    for before, after in itertools.pairwise(curve):
        if before.loss > target >= after.loss:
            part = (before.loss - target) / (before.loss - after.loss)
            return Point(*(a + part * (b - a) for a, b in zip(before, after, strict=True)))
    return None


def mean_curve(rows: Iterable[Row], loss: str) -> Curve:
    """Return the mean over the seeds at each step that all of them have."""
    points: dict[int, list[Row]] = {}
    for row in rows:
        points.setdefault(int(row["step"]), []).append(row)
    seeds = max(map(len, points.values()))
    return [
        Point(step, *(statistics.mean(float(row[name]) for row in found) for name in (loss, "seconds")))
        for step, found in sorted(points.items())
        if len(found) == seeds
    ]


def of_each_seed(both: Mapping[str, Sequence[Row]], arm: str, seeds: Iterable[str], loss: str) -> str:
    """Return in how many times fewer steps an arm reaches the base's last loss, least and most of the seeds.

    Each seed has the base's loss with that seed as its target.
    """
    found = []
    for seed in seeds:
        base, own = (
            mean_curve([row for row in both[name] if row["seed"] == seed], loss) for name in (BASE, arm)
        )
        first, point = (reached(curve, base[-1].loss) for curve in (base, own))
        if point is None or first is None:
            return " (not with every seed)"
        found.append(first.step / point.step)
    return f" ({min(found):.2f} to {max(found):.2f})"


def finals(rows: Iterable[Row], loss: str) -> list[float]:
    """Return the last loss of each seed."""
    last = {row["seed"]: float(row[loss]) for row in rows}
    return list(last.values())


def against_base(best: Mapping[str, Sequence[Row]], rates: Mapping[str, str], loss: str) -> list[str]:
    """Return the table of tuned contestants: last loss, and steps and seconds to the base's, same seeds.

    Args:
        best: rows of each arm at its best learning rate.
        rates: that rate and what else was tried, as text.
        loss: column.
    """
    if BASE not in best:
        return [f"{ARMS[BASE]} is missing, which the others are compared with.", ""]

    def line(arm: str) -> list[str]:
        seeds = {row["seed"] for row in best[arm]} & {row["seed"] for row in best[BASE]}
        if not seeds:
            return [ARMS[arm], rates[arm], "0", *["-"] * 5]
        both = {name: [row for row in best[name] if row["seed"] in seeds] for name in (BASE, arm)}
        base, own = (mean_curve(both[name], loss) for name in (BASE, arm))
        target = base[-1].loss
        first, point = reached(base, target), reached(own, target)
        told = ["not reached", "-", "-"]
        if point is not None and first is not None:
            several = of_each_seed(both, arm, seeds, loss) if len(seeds) > 1 and arm != BASE else ""
            fewer = f"{first.step / point.step:.2f}x{several}"
            told = [f"{point.step:.0f}", fewer, f"{point.seconds:.2f}"]
        return [ARMS[arm], rates[arm], str(len(seeds)), spread(finals(both[arm], loss), ""), *told,
                f"{own[-1].seconds:.2f}"]  # fmt: skip

    header = ("optimizer", "learning rate", "seeds", "last loss", f"steps to {ARMS[BASE]}'s last loss",
              "fewer steps (each seed)", "seconds to it", "seconds of the run")  # fmt: skip
    return table(header, (line(arm) for arm in ARMS if arm in best))


def problems() -> str:
    """Return the tables of the small problems."""

    def render(rows: list[Row]) -> list[str]:
        lines = []
        for problem in dict.fromkeys(row["problem"] for row in rows):
            found = [row for row in rows if row["problem"] == problem]
            tuned = [row for row in found if row["tuned"] == "1"]
            arms = list(dict.fromkeys(row["arm"] for row in tuned))
            rates = {
                arm: f"{next(row['lr'] for row in tuned if row['arm'] == arm)} of "
                f"{len({row['lr'] for row in found if row['arm'] == arm})}"
                for arm in arms
            }
            lines += [f"{problem.capitalize()}, means over the seeds:", ""]
            lines += against_base(
                {arm: [row for row in tuned if row["arm"] == arm] for arm in arms}, rates, "loss"
            )
            lines += [f"![Loss, {problem}](../_generated/mkor_{problem}_{slug(rows)}.png)", ""]
        return lines

    return each("mkor_problems", render, PROBLEMS)


def settings() -> str:
    """Return the table of MKOR's settings: last losses at the best learning rate of each."""

    def render(rows: list[Row]) -> list[str]:
        names = list(dict.fromkeys(row["problem"] for row in rows))
        last = {(row["arm"], row["settings"], row["problem"]): row for row in rows if row["tuned"] == "1"}
        kinds = list(dict.fromkeys((arm, chosen) for arm, chosen, _ in last))
        return table(
            ("optimizer", "changed", *(f"{name}: last loss (learning rate)" for name in names)),
            (
                (ARMS[arm], f"`{chosen}`" if chosen else "nothing",
                 *(f"{number(last[arm, chosen, name], 'loss', 5)} ({last[arm, chosen, name]['lr']})"
                   for name in names))
                for arm, chosen in kinds
            ),
        )  # fmt: skip

    return each("mkor_settings", render, SETTINGS)


def formula() -> str:
    """Return the table of an inverse factor under the printed update and the right one."""

    def render(rows: list[Row]) -> list[str]:
        found = {(row["formula"], row["threshold"], row["dtype"], int(row["update"])): row for row in rows}
        right, printed = ("sherman_morrison", "inf"), ("printed", "inf")
        blended = ("printed", "10.0")

        def short(key: tuple[str, str], dtype: str, update: int, name: str) -> str:
            return f"{float(found[(*key, dtype, update)][name]):.2g}"

        return table(
            ("updates", "right: largest entry", "right: error of M F", "printed: largest entry",
             "printed: error of M F", "printed, fp32", "printed, fp32, with the stabiliser"),
            (
                (str(update), short(right, "float64", update, "largest"),
                 short(right, "float64", update, "residual"), short(printed, "float64", update, "largest"),
                 short(printed, "float64", update, "residual"),
                 short(printed, "float32", update, "largest"), short(blended, "float32", update, "largest"))
                for update in sorted({update for *_, update in found})
            ),
        )  # fmt: skip

    return each("mkor_formula", render, FORMULA)


def quality() -> str:
    """Return the tables of the GPTs, each arm at the best of its learning rates."""

    def render(rows: list[Row]) -> list[str]:
        tried, best = best_rates(rows)
        size, tokens = rows[0]["size"], max(int(row["tokens"]) for row in rows)
        steps, millions = max(int(row["step"]) for row in rows), int(rows[0]["parameters"]) / 1e6
        lines = [f"Size `{size}`, {millions:.1f} million parameters, {steps} steps, {tokens:,} tokens:", ""]
        rates = {
            arm: f"{float(found[0]['lr']):g} of {', '.join(f'{lr:g}' for lr in tried[arm])}"
            for arm, found in best.items()
        }
        lines += against_base(best, rates, "valid_loss")
        return [*lines, f"![Validation loss](../_generated/mkor_quality_{slug(rows)}.png)", ""]

    return each("mkor_quality", render, QUALITY)


def best_rates(rows: Sequence[Row]) -> tuple[dict[str, list[float]], dict[str, list[Row]]]:
    """Return by arm the learning rates tried, and the rows of the best over their common seeds."""
    runs: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        runs.setdefault(row["arm"], {}).setdefault(float(row["lr"]), []).append(row)
    best = {}
    for arm, by_rate in runs.items():
        common = set.intersection(*({row["seed"] for row in found} for found in by_rate.values()))
        best[arm] = min(
            by_rate.values(),
            key=lambda found: statistics.mean(
                finals([row for row in found if row["seed"] in common], "valid_loss")
            ),
        )
    return {arm: sorted(by_rate) for arm, by_rate in runs.items()}, best


def updates() -> str:
    """Return the table of the rank-1 updates."""

    def render(rows: list[Row]) -> list[str]:
        return table(
            ("factors", "d", "type", "ms", "of the floor's time", "plain torch, ms", "speed-up",
             "inverse of one, ms", "speed-up over an inverse"),
            (
                (row["factors"], row["size"], row["dtype"], number(row, "milliseconds", 4),
                 f"{number(row, 'times_the_floor', 2)}x", number(row, "plain_torch_milliseconds", 4),
                 f"{number(row, 'speedup_over_plain_torch', 1)}x", number(row, "inverse_milliseconds", 2),
                 f"{number(row, 'speedup_over_inverse', 0)}x" if row["speedup_over_inverse"] else "-")
                for row in rows
            ),
        )  # fmt: skip

    return each("mkor_updates", render, KERNELS)


def step() -> str:
    """Return the table of what MKOR adds to a step of a large model."""

    def render(rows: list[Row]) -> list[str]:
        first = rows[0]
        lines = [
            f"{int(first['parameters']):,} parameters in {first['layers']} layers, "
            f"{int(first['tokens']):,} tokens a step, an update every {first['interval']} steps, one rank:",
            "",
        ]
        lines += table(
            ("form", "sides", "type", "products, ms", "update, ms", "statistics, ms",
             "host: products, update, ms", "adds to a step, ms", f"of {number(first, 'step_ms', 0)} ms",
             "factors, GiB", "of Adam's states",
             "scratch, MiB"),
            (
                (f"factored, rank {row['rank']}" if row["rank"] else row["form"], row["sides"],
                 row["state_dtype"], number(row, "precondition_ms", 2), number(row, "update_ms", 2),
                 number(row, "statistics_ms", 2),
                 f"{number(row, 'precondition_host_ms', 2)}, {number(row, 'update_host_ms', 2)}",
                 number(row, "added_ms", 2), percent(row, "added_share"),
                 f"{float(row['state_bytes']) / 2**30:.2f}", percent(row, "memory_share"),
                 mebibytes(row, "scratch_bytes"))
                for row in rows
            ),
        )  # fmt: skip
        return lines

    return each("mkor_step", render, STEP)


def steps() -> str:
    """Return the table of whole training steps."""
    return each("training_step_mkor", whole_steps, WHOLE)


def figures(folder: Path) -> list[Path]:
    """Draw the curves of every comparison of GPTs and of the small problems; returns the paths."""
    import matplotlib

    drawn = []
    with matplotlib.rc_context(STYLE):
        for rows in read("mkor_quality"):
            figure = _curves(best_rates(rows)[1], "valid_loss", "validation loss (nats a token)")
            drawn.append(save(figure, folder / f"mkor_quality_{slug(rows)}.png"))
        for rows in read("mkor_problems"):
            for problem in dict.fromkeys(row["problem"] for row in rows):
                best: dict[str, list[Row]] = {}
                for row in rows:
                    if row["problem"] == problem and row["tuned"] == "1":
                        best.setdefault(row["arm"], []).append(row)
                figure = _curves(best, "loss", "mean squared error", "log")
                drawn.append(save(figure, folder / f"mkor_{problem}_{slug(rows)}.png"))
    return drawn


def _curves(best: Mapping[str, Sequence[Row]], loss: str, label: str, scale: str = "linear") -> Any:
    """Loss against steps, the means over the seeds, without the loss before training."""
    figure, axes = new_figure(7.5)
    for colour, arm in zip(COLOURS, DRAWN, strict=True):
        if arm in best:
            curve = mean_curve(best[arm], loss)[1:]
            axes.plot(
                [point.step for point in curve], [point.loss for point in curve],
                color=colour, marker="o", markersize=3, linewidth=1.4,
                label=f"{ARMS[arm]}, {float(best[arm][0]['lr']):g}",
            )  # fmt: skip
    axes.set_xlabel("steps")
    axes.set_ylabel(label)
    axes.set_yscale(scale)
    if scale == "log":  # plain numbers, less than two decades
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    return figure


PARTS: dict[str, Callable[[], str]] = {
    "mkor_formula.md": formula,
    "mkor_problems.md": problems,
    "mkor_settings.md": settings,
    "mkor_quality.md": quality,
    "mkor_updates.md": updates,
    "mkor_step.md": step,
    "mkor_steps.md": steps,
}
