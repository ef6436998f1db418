"""The numbers of a report, worked out from a run's log."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_efficient.report.runlog import Run

WARM_UP_SHARE = 0.1
STANDARD_FIELDS = (
    "step",
    "tokens",
    "layer_tokens",
    "seconds",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "model_tflops",
    "executed_tflops",
    "mfu",
    "peak_memory",
)


@dataclass(frozen=True)
class Curve:
    """Values over the course of a run; points without a value are left out.

    Attributes:
        steps, tokens, seconds: of the points, cumulative.
        values: one a point.
    """

    steps: list[int] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)


def is_number(value: Any) -> bool:
    """Whether a logged value is a number (null and absent ones are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def curve(run: Run, name: str) -> Curve:
    """Return a field of the ``train`` lines over the run."""
    found = Curve()
    for line in run.train:
        if is_number(line.get(name)):
            found.steps.append(int(line["step"]))
            found.tokens.append(_number(line.get("tokens"), 0.0))
            found.seconds.append(_number(line.get("seconds"), 0.0))
            found.values.append(float(line[name]))
    return found


def eval_curve(run: Run, split: str) -> Curve:
    """Return the losses of a split, placed on the training tokens and seconds of their steps."""
    found = Curve()
    for line in run.evals.get(split, []):
        if not is_number(line.get("loss")):
            continue
        step = int(line["step"])
        tokens, seconds = _place(run, step)
        found.steps.append(step)
        found.tokens.append(_number(line.get("train_tokens"), tokens))
        found.seconds.append(_number(line.get("train_seconds"), seconds))
        found.values.append(float(line["loss"]))
    return found


def _number(value: Any, default: float) -> float:
    return float(value) if is_number(value) else default


def _place(run: Run, step: int) -> tuple[float, float]:
    """Return the (tokens, seconds) of a step: of its ``train`` line, or between the lines around it."""
    before = {"step": 0, "tokens": 0.0, "seconds": 0.0}
    for line in run.train:
        if not (is_number(line.get("tokens")) and is_number(line.get("seconds"))):
            continue
        if line["step"] >= step:
            span = line["step"] - before["step"]
            share = (step - before["step"]) / span if span else 1.0
            return (
                before["tokens"] + share * (line["tokens"] - before["tokens"]),
                before["seconds"] + share * (line["seconds"] - before["seconds"]),
            )
        before = line
    return before["tokens"], before["seconds"]


def steady(values: Sequence[float]) -> list[float]:
    """Return the values without the first tenth (at least one), while caches and allocators fill."""
    if len(values) < 3:
        return list(values)
    return list(values[max(1, round(len(values) * WARM_UP_SHARE)) :])


@dataclass(frozen=True)
class Summary:
    """One run in numbers; None where the log does not have it.

    Attributes:
        name: of the run.
        steps, tokens, seconds: at the last ``train`` line.
        train_loss: (first, last) logged training loss.
        eval_loss: (first, last) loss of each split.
        eval_perplexity: the same for the perplexity.
        tokens_per_second, model_tflops, executed_tflops, mfu: medians after warm-up (`steady`).
        peak_memory: highest bytes.
    """

    name: str
    steps: int | None
    tokens: float | None
    seconds: float | None
    train_loss: tuple[float, float] | None
    eval_loss: dict[str, tuple[float, float]]
    eval_perplexity: dict[str, tuple[float, float]]
    tokens_per_second: float | None
    model_tflops: float | None
    executed_tflops: float | None
    mfu: float | None
    peak_memory: float | None


def _ends(values: Iterable[float]) -> tuple[float, float] | None:
    found = list(values)
    return (found[0], found[-1]) if found else None


def _median(run: Run, name: str) -> float | None:
    values = curve(run, name).values
    return statistics.median(steady(values)) if values else None


def summarize(run: Run, name: str | None = None) -> Summary:
    """Return the numbers of a run.

    Args:
        run: as read.
        name: how the report calls it; None: the run's own name.
    """
    losses, perplexities = {}, {}
    for split, lines in run.evals.items():
        ends = _ends(eval_curve(run, split).values)
        if ends is not None:
            losses[split] = ends
        ends = _ends(float(line["perplexity"]) for line in lines if is_number(line.get("perplexity")))
        if ends is not None:
            perplexities[split] = ends
    last = run.train[-1] if run.train else {}
    memory = curve(run, "peak_memory").values
    return Summary(
        name=name or run.name,
        steps=last.get("step"),
        tokens=last.get("tokens"),
        seconds=last.get("seconds"),
        train_loss=_ends(curve(run, "loss").values),
        eval_loss=losses,
        eval_perplexity=perplexities,
        tokens_per_second=_median(run, "tokens_per_second"),
        model_tflops=_median(run, "model_tflops"),
        executed_tflops=_median(run, "executed_tflops"),
        mfu=_median(run, "mfu"),
        peak_memory=max(memory) if memory else None,
    )


def flat_metrics(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of the techniques' objects in a ``train`` line as ``technique.metric``."""
    return {
        f"{technique}.{metric}": value
        for technique, values in line.items()
        if isinstance(values, dict)
        for metric, value in values.items()
        if is_number(value)
    }


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run, longer by its parent folders, or numbered, where names repeat."""
    names = [run.name for run in runs]
    for depth in (2, 3):
        if len(set(names)) == len(names):
            return names
        folders = [run.path.resolve().parent.parts for run in runs]
        names = [
            "-".join(parts[-depth:]) if names.count(name) > 1 else name
            for name, parts in zip(names, folders, strict=True)
        ]
    if len(set(names)) == len(names):
        return names
    return [f"{number}-{name}" for number, name in enumerate(names, 1)]
