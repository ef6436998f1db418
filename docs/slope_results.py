"""Tables and figures of SLoPe's measurements, from the CSV files in docs/results/data.

`docs/generate.py` writes them. A measurement whose file is not there yet has a line that says so.
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
    whole_steps,
)

ARMS = {
    "dense": "dense",
    "slope": "SLoPe",
    "slope_adapters": "SLoPe, adapters in the last 1 %",
    "slope_adapters10": "SLoPe, adapters in the last 10 %",
    "srste": "SR-STE (mask chosen in each step)",
}


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
_PLACES = {
    "memory": "alone, operands kept",
    "memory, flat": "in a flat buffer, operands kept",
    "memory, rewritten": "in a flat buffer, operands rewritten",
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
                    (row["shape"], _PLACES[row["part"]],
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
    return each("slope_quality", lambda rows: final_losses("slope_quality", rows, ARMS, "dense"))


def learning_rates() -> str:
    """Return the last losses at the learning rates tried."""

    def render(rows: list[Row]) -> list[str]:
        final = {(float(row["lr"]), row["arm"]): row for row in rows}  # the last row of each
        arms = dict.fromkeys(row["arm"] for row in rows)
        return table(
            (f"learning rate, size {rows[0]['size']}", *(ARMS[arm] for arm in arms)),
            (
                (f"{lr:g}", *(number(final.get((lr, arm), {}), "valid_loss", 4) for arm in arms))
                for lr in sorted({lr for lr, _ in final})
            ),
        )

    return each("slope_learning_rates", render)


def steps() -> str:
    """Return the table of whole training steps."""
    return each("training_step_slope", whole_steps)


def figures(folder: Path) -> list[Path]:
    """Draw a figure for every comparison of quality and of layers; returns their paths."""
    import matplotlib

    drawn = []
    with matplotlib.rc_context(STYLE):
        for rows in read("slope_quality"):
            drawn.append(save(loss_curves(rows, ARMS), folder / f"slope_quality_{slug(rows)}.png"))
        for rows in read("slope_layer"):
            drawn.append(save(_bars(rows), folder / f"slope_layer_{slug(rows)}.png"))
    return drawn


def _bars(rows: list[Row]) -> Any:
    """Speed-up over dense of every timed case."""
    figure, axes = new_figure(8)
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
