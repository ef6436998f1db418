"""Tables and figures of RMM's measurements, from the CSV files in docs/results/data.

`docs/generate.py` writes them. A measurement whose file is not there yet has a line with the command for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from result_tables import (
    COLOURS,
    STYLE,
    Row,
    each,
    final_losses,
    loss_curves,
    mebibytes,
    new_figure,
    number,
    percent,
    read,
    save,
    slug,
    table,
)

ARMS = {
    "exact": "exact gradients",
    "ratio4": "ratio 1/4",
    "ratio8": "ratio 1/8",
    "ratio16": "ratio 1/16",
}
SKETCHES = ("gaussian", "rademacher", "srht", "count", "rows")
LAYER = "python tests/perf/rmm_layer.py"
KERNELS = "python tests/perf/rmm_kernels.py"
QUALITY = "python tests/perf/rmm_quality.py run --size 125m"
WAYS = ("gemm", "hadamard")  # on CUDA; for rows "fused" too
TRIED = ("gemm", "generated", "fused", "hadamard")
_PARTS = {"block": "GPT block, pass", "encoder": "encoder, step"}


def share(row: Row, name: str) -> str:
    """Return the sketched quantity in percent of the exact one, or a dash."""
    exact = row.get(f"exact_{name}")
    return f"{100 * float(row[f'rmm_{name}']) / float(exact):.1f}%" if exact else "-"


def layers() -> str:
    """Return the tables of the linear layer: whole passes, and their parts."""

    def render(rows: list[Row]) -> list[str]:
        found = [row for row in rows if row["part"] == "layer"]
        lines = table(
            ("tokens x in x out", "ratio", "sketch", "exact, ms", "RMM, ms", "speed-up", "saved bytes",
             "host: exact, RMM, ms"),
            (
                (row["shape"], ratio(row), row["sketch"], number(row, "exact_ms"), number(row, "rmm_ms"),
                 f"{number(row, 'speedup', 2)}x", share(row, "saved_bytes"),
                 f"{number(row, 'exact_host_ms', 2)}, {number(row, 'rmm_host_ms', 2)}")
                for row in found
            ),
        )  # fmt: skip
        if found:
            lines += [f"![Speed-up over the exact layer](../_generated/rmm_layer_{slug(rows)}.png)", ""]
        lines += table(
            ("tokens x in x out", "ratio", "sketch", "S^T X, ms", "S^T Y, ms", "their product, ms",
             "exact Y^T X, ms"),
            (
                (row["shape"], ratio(row), row["sketch"], number(row, "project_input_ms"),
                 number(row, "project_gradient_ms"), number(row, "product_ms"),
                 number(row, "exact_weight_gradient_ms"))
                for row in found
            ),
        )  # fmt: skip
        return lines

    return each("rmm_layer", render, LAYER)


def ratio(row: Row) -> str:
    """Return a ratio as 1/n where it is one."""
    value = float(row["ratio"])
    n = round(1 / value)
    return f"1/{n}" if abs(1 / value - n) < 1e-9 else f"{value:g}"


def memory() -> str:
    """Return the table of blocks and encoders: time, what is saved, peak memory."""

    def render(rows: list[Row]) -> list[str]:
        return table(
            ("what", "size", "tokens", "sketch, ratio", "exact, ms", "RMM, ms", "speed-up",
             "saved: exact, RMM, MiB", "of exact", "peak: exact, RMM, MiB", "of exact"),
            (
                (_PARTS[row["part"]], row["shape"], row["tokens"], f"{row['sketch']}, {ratio(row)}",
                 number(row, "exact_ms", 2), number(row, "rmm_ms", 2), f"{number(row, 'speedup', 2)}x",
                 _pair(row, "saved_bytes"), share(row, "saved_bytes"), _pair(row, "peak_bytes"),
                 share(row, "peak_bytes"))
                for row in rows if row["part"] in _PARTS
            ),
        )  # fmt: skip

    return each("rmm_layer", render, LAYER)


def _pair(row: Row, name: str) -> str:
    return f"{mebibytes(row, f'exact_{name}')}, {mebibytes(row, f'rmm_{name}')}"


def kernels() -> str:
    """Return the table of the projections by themselves.

    Before their own file is there, those lines of the comparison in `tried` whose code is still here.
    """
    name = "rmm_projections" if read("rmm_projections") else "rmm_kernels"

    def render(rows: list[Row]) -> list[str]:
        return table(
            ("sketch", "way", "X", "block to rows", "ms", "of the floor's speed",
             "over a product with S given", "plain torch, ms", "over plain torch"),
            (
                (row["sketch"], row["way"], row["shape"], f"{row['block']} to {row['projected']}",
                 number(row, "milliseconds", 4), percent(row, "fraction_of_floor"),
                 f"{number(row, 'speedup_over_given_sketch', 2)}x",
                 number(row, "plain_torch_milliseconds", 4),
                 f"{number(row, 'speedup_over_plain_torch', 2)}x" if row["speedup_over_plain_torch"] else "-")
                for row in rows if row["way"] in WAYS or (row["sketch"], row["way"]) == ("rows", "fused")
            ),
        )  # fmt: skip

    return each(name, render, KERNELS)


def tried() -> str:
    """Return the comparison of the ways to S^T X, those that are no longer in the tree included."""

    def render(rows: list[Row]) -> list[str]:
        groups: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in rows:
            what = (row["sketch"], row["shape"], f"{row['block']} to {row['projected']}")
            groups.setdefault(what, {})[row["way"]] = row
        return table(
            ("sketch", "X", "block to rows", "`gemm`, ms", "`generated`, ms", "`fused`, ms", "`hadamard`, ms",
             "floor, ms"),
            (
                (*what, *(number(ways.get(way, {}), "milliseconds", 4) for way in TRIED),
                 number(ways["gemm"], "floor_milliseconds", 4))
                for what, ways in groups.items() if "gemm" in ways
            ),
        )  # fmt: skip

    return each("rmm_kernels", render)


def quality() -> str:
    """Return the final losses of every comparison, and their curves."""
    return each("rmm_quality", lambda rows: final_losses("rmm_quality", rows, ARMS, "exact"), QUALITY)


def figures(folder: Path) -> list[Path]:
    """Draw a figure for every comparison of quality and of layers; returns their paths."""
    import matplotlib

    drawn = []
    with matplotlib.rc_context(STYLE):
        for rows in read("rmm_quality"):
            drawn.append(save(loss_curves(rows, ARMS), folder / f"rmm_quality_{slug(rows)}.png"))
        for rows in read("rmm_layer"):
            found = [row for row in rows if row["part"] == "layer"]
            if found:
                drawn.append(save(_bars(found), folder / f"rmm_layer_{slug(rows)}.png"))
    return drawn


def _bars(rows: list[Row]) -> Any:
    """Speed-up over the exact layer: a group for each shape and ratio, a bar for each sketch."""
    figure, axes = new_figure(8)
    groups = list(dict.fromkeys((row["shape"], ratio(row)) for row in rows))[::-1]
    sketches = [sketch for sketch in SKETCHES if any(row["sketch"] == sketch for row in rows)]
    height = 0.8 / len(sketches)
    for index, (sketch, colour) in enumerate(zip(sketches, COLOURS, strict=False)):
        values = {(r["shape"], ratio(r)): float(r["speedup"]) for r in rows if r["sketch"] == sketch}
        offset = 0.4 - height * (index + 0.5)
        axes.barh(
            [place + offset for place, group in enumerate(groups) if group in values],
            [values[group] for group in groups if group in values],
            height=height, color=colour, label=sketch,
        )  # fmt: skip
    axes.set_yticks(range(len(groups)), [f"{shape}, {share}" for shape, share in groups])
    axes.axvline(1.0, color="#000000", linewidth=1)
    axes.set_xlabel("exact time / time with RMM")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=len(sketches))
    return figure
