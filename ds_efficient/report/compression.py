"""Figure of a run's gradient compression: what each layer's gradient is sent as, step by step."""

from __future__ import annotations

import math
from typing import Any

from ds_efficient.report.runlog import Run
from ds_efficient.report.summary import flat_metrics

_BITS = "lgreco.bits/"
_LINES = (
    ("lgreco.ratio", "bytes: uncompressed / sent"),
    ("lgreco.ratio_to_default", "bytes: uniform default / plan"),
)
_NAMED_LAYERS = 60  # of more than these not every layer's name fits


def compressed(run: Run) -> bool:
    """Whether the run says what its gradients were sent as."""
    return any(name.startswith(_BITS) for line in run.train for name in flat_metrics(line))


def draw_compression(figure: Any, run: Run) -> None:
    """Draw bits an element by layer and step, and beside them the bytes saved and the error of the budget.

    Args:
        figure: of matplotlib, empty.
        run: for which `compressed` holds.
    """
    from matplotlib.colors import LogNorm

    lines = [(int(line["step"]), flat_metrics(line)) for line in run.train]
    lines = [(step, metrics) for step, metrics in lines if any(name.startswith(_BITS) for name in metrics)]
    layers = list(dict.fromkeys(name for _, metrics in lines for name in metrics if name.startswith(_BITS)))
    steps = [step for step, _ in lines]
    grid = [[metrics.get(layer, math.nan) for _, metrics in lines] for layer in layers]
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    image = left.pcolormesh(
        steps, range(len(layers)), grid, shading="nearest", norm=LogNorm(), cmap="viridis"
    )
    left.invert_yaxis()
    left.grid(visible=False)
    every = -(-len(layers) // _NAMED_LAYERS)
    names = [layer.removeprefix(_BITS).removesuffix(".weight") for layer in layers]
    left.set_yticks(range(0, len(layers), every), names[::every], fontsize=6)
    left.set_title("Bits a gradient element", loc="left")
    left.set_xlabel("optimizer step")
    figure.colorbar(image, ax=left, ticks=[2.0**i for i in range(-6, 6)], format="%g").minorticks_off()
    for name, label in _LINES:
        right.plot(steps, [metrics.get(name, math.nan) for _, metrics in lines], label=label)
    shares = [_share(metrics) for _, metrics in lines]
    right.plot(steps, shares, linestyle="--", label="error / budget")
    right.set_title("Bytes saved, error kept to", loc="left")
    right.set_xlabel("optimizer step")
    right.set_yscale("log")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value < 10 else "")
    right.legend()


def _share(metrics: dict[str, float]) -> float:
    """Error of the plan over its budget, NaN before there is one."""
    error, budget = (metrics.get(f"lgreco.{name}", math.nan) for name in ("error", "budget"))
    return error / budget if budget > 0 else math.nan


def height(run: Run) -> float:
    """Inches that the figure needs for its layers' names."""
    layers = {name for line in run.train for name in flat_metrics(line) if name.startswith(_BITS)}
    return max(4.2, 1.2 + 0.13 * min(len(layers), _NAMED_LAYERS))
