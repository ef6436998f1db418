"""Tables and figures of L-GreCo's measurements, from the CSV files in docs/results/data.

`docs/generate.py` writes them. A measurement whose file is not there yet has a line with the command for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from result_tables import (
    STYLE,
    Row,
    each,
    final_losses,
    loss_curves,
    new_figure,
    number,
    read,
    save,
    slug,
    table,
    with_bases,
)

ARMS = {
    "none": "no compression",
    "ddp_powersgd": "torch's PowerSGD hook",
    "powersgd": "PowerSGD, uniform",
    "lgreco_powersgd": "L-GreCo on PowerSGD",
    "qsgd": "QSGD, uniform",
    "lgreco_qsgd": "L-GreCo on QSGD",
    "topk": "TopK, uniform",
    "lgreco_topk": "L-GreCo on TopK",
    "lgreco_mixed": "L-GreCo, mixed",
}
_CURVES = ("none", "lgreco_powersgd", "lgreco_qsgd", "lgreco_topk", "lgreco_mixed")
PLANNER = "python tests/perf/lgreco_planner.py"
HOSTS = "python tests/perf/lgreco_hosts.py"
QUALITY = "python tests/perf/lgreco_quality.py run"
KERNELS = "python tests/perf/lgreco_kernels.py"
STEPS = "python tests/perf/training_step.py --gpus 2 --cases 1.3b-fused 1.3b-lgreco 1.3b-lgreco-qsgd"


def planner() -> str:
    """Return the table of the planner's times."""

    def render(rows: list[Row]) -> list[str]:
        return table(
            ("instance", "layers x options", "buckets", "plan, ms", "of it in C++, ms", "plain torch, ms",
             "gain over the default", "of the budget used"),
            (
                (row["instance"], f"{row['layers']} x {row['options']}", row["buckets"],
                 number(row, "plan_ms", 1), number(row, "solve_ms", 1), number(row, "reference_ms", 0),
                 f"{number(row, 'gain', 2)}x", f"{100 * float(row['budget_used']):.2f}%")
                for row in rows
            ),
        )  # fmt: skip

    return each("lgreco_planner", render, PLANNER)


def hosts() -> str:
    """Return the tables of training over two hosts, one a rate."""

    def render(rows: list[Row]) -> list[str]:
        lines = []
        for rate in dict.fromkeys(row["rate"] for row in rows):
            found = {row["arm"]: row for row in rows if row["rate"] == rate}
            first = next(iter(found.values()))
            lines += [
                f"{int(first['parameters']):,} parameters, {first['tokens']} tokens a rank and step, "
                f"{rate}, medians of {first['steps']} steps:",
                "",
            ]
            lines += table(
                ("arm", "bytes a step, MB", "fewer bytes", "bytes: default / plan", "error / budget",
                 "own work, ms", "work + transfer, ms", "faster", "measured step, ms", "faster"),
                (_host(arm, found[arm], found.get("none")) for arm in ARMS if arm in found),
            )  # fmt: skip
        return lines

    return each("lgreco_hosts", render, HOSTS)


def _host(arm: str, row: Row, none: Row | None) -> tuple[str, ...]:
    def against(value: float, base: float | None, digits: int) -> str:
        return "-" if base is None else f"{base / value:.{digits}f}x"

    planned = arm.startswith("lgreco_")
    gain = _quotient(row, "planned_default", "planned", planned) + "x" * planned
    modelled = _modelled_ms(row)
    size, step = float(row["bytes"]), float(row["ms"])
    return (
        ARMS[arm], f"{size / 1e6:.2f}", against(size, none and float(none["bytes"]), 1), gain,
        _quotient(row, "error", "budget", planned), number(row, "processor_ms", 0), f"{modelled:.0f}",
        against(modelled, none and _modelled_ms(none), 2), f"{step:.0f}",
        against(step, none and float(none["ms"]), 2),
    )  # fmt: skip


def _modelled_ms(row: Row) -> float:
    """The rank's own work, and then the transfer of its bytes at the rate."""
    for unit, bits in (("gbit", 1e9), ("mbit", 1e6)):
        if row["rate"].endswith(unit):
            rate = float(row["rate"].removesuffix(unit)) * bits
            return float(row["processor_ms"]) + 8e3 * float(row["bytes"]) / rate
    raise ValueError(f"rate {row['rate']!r} is neither in gbit nor in mbit")


def _quotient(row: Row, above: str, below: str, wanted: bool) -> str:
    if not (wanted and row.get(above) and row.get(below) and float(row[below]) > 0):
        return "-"
    value = float(row[above]) / float(row[below])
    return "-" if math.isnan(value) else f"{value:.3f}" if above == "error" else f"{value:.2f}"


def plan_costs() -> str:
    """Return the table of what a plan costs over two hosts."""

    def render(rows: list[Row]) -> list[str]:
        return table(
            ("arm", "rate", "plan, ms", "bytes for it, MB", "of training at interval 1000"),
            (
                (ARMS[row["arm"]], row["rate"], number(row, "plan_ms", 0),
                 f"{float(row['plan_bytes']) / 1e6:.1f}",
                 f"{100 * float(row['plan_ms']) / (1000 * float(row['ms'])):.2f}%")
                for row in rows if row["arm"].startswith("lgreco_")
            ),
        )  # fmt: skip

    return each("lgreco_hosts", render, HOSTS)


def quality() -> str:
    """Return the final losses of every comparison, and their curves."""

    def render(rows: list[Row]) -> list[str]:
        lines = final_losses("lgreco_quality", rows, ARMS, "none")
        last = {row["arm"]: row for row in rows}
        return lines + table(
            ("arm", "loss against exact gradients", "bytes: exact / sent", "time of all plans, s"),
            (
                (title, _relative_loss(rows, arm), f"{number(last[arm], 'ratio', 1)}x",
                 number(last[arm], "plan_seconds", 1))
                for arm, title in ARMS.items() if arm in last
            ),
        )  # fmt: skip

    return each("lgreco_quality", render, QUALITY)


def _relative_loss(rows: list[Row], arm: str) -> str:
    """Mean over the seeds that both have of the arm's final loss over that without compression, less 1."""
    final = {(row["arm"], row["seed"]): float(row["valid_loss"]) for row in rows}
    gaps = [
        loss / final["none", seed] - 1
        for (name, seed), loss in final.items()
        if name == arm and ("none", seed) in final
    ]
    return f"{100 * sum(gaps) / len(gaps):+.2f}%" if gaps and arm != "none" else "-"


def choices() -> str:
    """Return what the plans of the comparisons of quality chose, and the figures of it."""

    def render(rows: list[Row]) -> list[str]:
        lines: list[str] = []
        for arm in dict.fromkeys(row["arm"] for row in rows):
            found = [row for row in rows if row["arm"] == arm]
            plans = {int(row["step"]): row for row in found}
            lines += [f"{ARMS[arm]}, size `{rows[0]['size']}`:", ""]
            lines += table(
                ("from step", "exact / plan, bytes", "default / plan, bytes", "error / budget",
                 "smallest and largest bits an element", "compressors"),
                (_plan(plan, [row for row in found if int(row["step"]) == step])
                 for step, plan in plans.items()),
            )  # fmt: skip
            lines += [f"![Bits an element by layer and step](../_generated/{_choices_name(arm, rows)})", ""]
        return lines

    return each("lgreco_choices", render, QUALITY)


def _plan(plan: Row, layers: list[Row]) -> tuple[str, ...]:
    bits = [float(row["bits"]) for row in layers]
    counts: dict[str, int] = {}
    for row in layers:
        counts[row["compressor"]] = counts.get(row["compressor"], 0) + 1
    return (
        plan["step"], f"{float(plan['raw_bytes']) / float(plan['plan_bytes']):.1f}x",
        f"{float(plan['default_bytes']) / float(plan['plan_bytes']):.2f}x",
        _quotient(plan, "error", "budget", True), f"{min(bits):.2f}, {max(bits):.2f}",
        ", ".join(f"{name} {count}" for name, count in counts.items()),
    )  # fmt: skip


def steps() -> str:
    """Return the table of whole training steps on GPUs, each beside the first case with the same model."""

    def render(rows: list[Row]) -> list[str]:
        return table(
            ("case", "GPUs", "ms a step", "speed against dense", "tokens/s", "bytes a step, MB",
             "without compression, MB", "fewer bytes", "as fast as dense at, Gbit/s", "peak memory, GiB"),
            (
                (row["case"], row["gpus"], number(row, "ms_per_step", 1),
                 f"{float(base['ms_per_step']) / float(row['ms_per_step']):.2f}x",
                 f"{float(row['tokens_per_second']):,.0f}", *_sent(row, base),
                 f"{float(row['peak_memory']) / 2**30:.1f}")
                for row, base in with_bases(rows)
            ),
        )  # fmt: skip

    return each("training_step_lgreco", render, STEPS)


def _sent(row: Row, base: Row) -> tuple[str, ...]:
    """Bytes, and the rate at which bytes saved take as long as the step has become longer, nothing hidden."""
    if not row.get("bytes"):
        return "-", "-", "-", "-"
    sent, raw = float(row["bytes"]), float(row["raw_bytes"])
    longer = float(row["ms_per_step"]) - float(base["ms_per_step"])
    even = f"{8 * (raw - sent) / (1e6 * longer):,.0f}" if longer > 0 else "any"
    return f"{sent / 1e6:,.1f}", f"{raw / 1e6:,.1f}", f"{raw / sent:.1f}x", even


def kernels() -> str:
    """Return the table of the kernels."""

    def render(rows: list[Row]) -> list[str]:
        return table(
            ("kernel", "elements", "dtype", "ms", "floor, ms", "times the floor", "plain torch, ms",
             "against it", "rival", "rival, ms"),
            (
                (f"{row['kernel']} {row['detail']}".strip(), f"{int(row['elements']):,}", row["dtype"],
                 number(row, "milliseconds", 3), number(row, "floor_milliseconds", 3),
                 _times(row, "times_the_floor"), number(row, "plain_torch_milliseconds", 3),
                 _times(row, "speedup_over_plain_torch"), f"`{row['rival']}`" if row["rival"] else "-",
                 number(row, "rival_milliseconds", 3))
                for row in rows
            ),
        )  # fmt: skip

    return each("lgreco_kernels", render, KERNELS)


def _times(row: Row, name: str) -> str:
    return f"{float(row[name]):.2f}x" if row.get(name) else "-"


PARTS: dict[str, Callable[[], str]] = {
    "lgreco_planner.md": planner,
    "lgreco_hosts.md": hosts,
    "lgreco_plan_costs.md": plan_costs,
    "lgreco_quality.md": quality,
    "lgreco_choices.md": choices,
    "lgreco_steps.md": steps,
    "lgreco_kernels.md": kernels,
}


def figures(folder: Path) -> list[Path]:
    """Draw the curves of every comparison of quality and the choices of its plans; returns their paths."""
    import matplotlib

    drawn = []
    with matplotlib.rc_context(STYLE):
        for rows in read("lgreco_quality"):
            arms = {arm: ARMS[arm] for arm in _CURVES}
            drawn.append(save(loss_curves(rows, arms), folder / f"lgreco_quality_{slug(rows)}.png"))
        for rows in read("lgreco_choices"):
            for arm in dict.fromkeys(row["arm"] for row in rows):
                found = [row for row in rows if row["arm"] == arm]
                drawn.append(save(_heat(found), folder / _choices_name(arm, rows)))
    return drawn


def _choices_name(arm: str, rows: list[Row]) -> str:
    return f"lgreco_choices_{arm}_{slug(rows)}.png"


def _heat(rows: list[Row]) -> Any:
    """Bits an element of each layer, plan by plan; the scale is logarithmic."""
    from matplotlib.colors import LogNorm

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    steps = sorted({int(row["step"]) for row in rows})
    places = {(row["layer"], int(row["step"])): float(row["bits"]) for row in rows}
    grid = [[places[layer, step] for step in steps] for layer in layers]
    figure, axes = new_figure(8)
    figure.set_size_inches(8, 1.5 + 0.16 * len(layers))
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis", norm=LogNorm())
    axes.set_yticks(range(len(layers)), [layer.removesuffix(".weight") for layer in layers], fontsize=6)
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set_xlabel("from step")
    axes.grid(visible=False)
    bar = figure.colorbar(image, label="bits an element", ticks=[2.0**i for i in range(-6, 6)], format="%g")
    bar.minorticks_off()
    return figure
