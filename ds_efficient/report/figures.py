"""Figures of a report: loss against tokens and against time, and throughput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_efficient.errors import UserError
from ds_efficient.report import compression
from ds_efficient.report.runlog import Run
from ds_efficient.report.summary import Curve, curve, eval_curve, steady

# Okabe and Ito's colours: told apart by colour-blind readers too; light yellow is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}
_MANY_POINTS = 60


def _library() -> Any:
    """Return matplotlib with a backend that needs no display.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "the report's figures need matplotlib: pip install 'ds_efficient[report]', or use --no-figures"
        ) from error
    matplotlib.use("Agg", force=False)
    return matplotlib


def _new_figure(width: float, panels: int) -> tuple[Any, list[Any]]:
    """Return a figure without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)
    return figure, list(axes[0])


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds > 300 else (1.0, "seconds")


def _token_unit(tokens: float) -> tuple[float, str]:
    for size, name in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
        if tokens >= size:
            return size, name
    return 1.0, ""


def _positions(points: Curve, axis: str, unit: float) -> list[float]:
    return [value / unit for value in getattr(points, axis)]


def _splits(runs: Sequence[Run]) -> list[str]:
    """Return the splits of which a curve is drawn: validation where there is one, else what there is."""
    names = sorted({split for run in runs for split in run.evals if len(eval_curve(run, split))})
    valid = [name for name in names if name.startswith("val")]
    return valid or names[:1]


def _draw_losses(axes: Any, runs: Sequence[Run], names: Sequence[str], axis: str, unit: float) -> None:
    splits = _splits(runs)
    several = len(runs) > 1
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        train = curve(run, "loss")
        if len(train):
            axes.plot(
                _positions(train, axis, unit),
                train.values,
                color=colour,
                linewidth=1.1,
                alpha=0.55 if splits else 1.0,
                marker="." if len(train) == 1 else None,
                label=f"{name}, training" if several else "training",
            )
        for split in splits:
            points = eval_curve(run, split)
            if len(points):
                title = "validation" if split.startswith("val") else split
                axes.plot(
                    _positions(points, axis, unit),
                    points.values,
                    color=colour if several else COLOURS[1],
                    linewidth=1.9,
                    marker="o" if len(points) < _MANY_POINTS else None,
                    markersize=4,
                    clip_on=False,
                    label=f"{name}, {title}" if several else title,
                )


def loss_figure(runs: Sequence[Run], names: Sequence[str]) -> Any:
    """Return the figure of losses against tokens (left) and against training time (right)."""
    figure, (left, right) = _new_figure(11, 2)
    curves = [curve(run, "loss") for run in runs]
    tokens = max((max(points.tokens) for points in curves if len(points)), default=1.0)
    seconds = max((max(points.seconds) for points in curves if len(points)), default=1.0)
    token_unit, token_name = _token_unit(tokens)
    time_unit, time_name = _time_unit(seconds)
    _draw_losses(left, runs, names, "tokens", token_unit)
    _draw_losses(right, runs, names, "seconds", time_unit)
    left.set_xlabel(f"training tokens ({token_name.strip()})" if token_name else "training tokens")
    right.set_xlabel(f"training time ({time_name})")
    for axes, title in ((left, "Loss against tokens"), (right, "Loss against time")):
        axes.set_ylabel("loss (nats a token)")
        axes.set_title(title, loc="left")
        axes.set_xlim(left=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def throughput_figure(runs: Sequence[Run], names: Sequence[str]) -> Any:
    """Return the figure of tokens/s over the steps, with the median after warm-up as a dashed line."""
    import statistics

    figure, (axes,) = _new_figure(7, 1)
    highest = 0.0
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        points = curve(run, "tokens_per_second")
        if not len(points):
            continue
        colour = COLOURS[index % len(COLOURS)]
        highest = max(highest, *points.values)
        median = statistics.median(steady(points.values))
        axes.plot(
            points.steps,
            points.values,
            color=colour,
            linewidth=1.4,
            marker="o" if len(points) < _MANY_POINTS else None,
            markersize=3.5,
            label=f"{name}, median {median:,.0f}",
        )
        axes.axhline(median, color=colour, linewidth=1.0, linestyle="--", alpha=0.7)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("throughput (tokens/s)")
    axes.set_title("Throughput", loc="left")
    axes.set_ylim(0, highest * 1.15 or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    return figure


def compression_figure(run: Run, name: str) -> Any:
    """Return the figure of what a run's gradients were sent as."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, compression.height(run)))
    FigureCanvasAgg(figure)
    compression.draw_compression(figure, run)
    figure.suptitle(name)
    return figure


def write_figures(runs: Sequence[Run], names: Sequence[str], folder: Path) -> list[Path]:
    """Write ``loss.png``, ``throughput.png`` and of compressed runs ``compression*.png``; return their paths.

    Raises:
        UserError: matplotlib is not installed.
    """
    library = _library()
    written = []
    with library.rc_context(_STYLE):
        for name, make in (("loss.png", loss_figure), ("throughput.png", throughput_figure)):
            path = folder / name
            make(runs, names).savefig(path)
            written.append(path)
        for index, run in enumerate(runs):
            if compression.compressed(run):
                path = folder / f"compression{f'_{index + 1}' if len(runs) > 1 else ''}.png"
                compression_figure(run, names[index]).savefig(path)
                written.append(path)
    return written
