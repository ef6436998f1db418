"""What a schedule will save: layer tokens exactly, time by FLOPs or by measured steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ds_efficient.core.shape import ModelShape
from ds_efficient.errors import UserError
from ds_efficient.random_ltd.schedule import TokenSchedule

_ATTENTION_PRODUCTS = 7  # two forward, five backward with the scores computed again, as flash kernels do


@dataclass(frozen=True)
class Savings:
    """What a run with dropped tokens saves against one of as many steps without.

    Attributes:
        steps: optimizer steps.
        layer_tokens, dense_layer_tokens: consumed with and without dropping.
        time: share of the time saved, 0 to 1; negative where it takes longer.
    """

    steps: int
    layer_tokens: int
    dense_layer_tokens: int
    time: float

    @property
    def share(self) -> float:
        """Share of the layer tokens saved, 0 to 1."""
        return 1.0 - self.layer_tokens / self.dense_layer_tokens if self.dense_layer_tokens else 0.0


def relative_step_cost(
    schedule: TokenSchedule, model: ModelShape, *, causal: bool = True, fixed_share: float = 0.0
) -> Callable[[int], float]:
    """Return a function from kept tokens to the time of a step relative to one that keeps all.

    It counts the matrix products of forward and backward pass, attention quadratic in the kept tokens; a
    causal attention computes the lower triangle only.

    Args:
        schedule: with its numbers of layers.
        model: shape; the schedule says how long sequences are.
        causal: whether attention is.
        fixed_share: share of the dense step that does not shrink with the tokens of the dropping layers
            beside other layers and logits, 0 to 1: the optimizer, communication.
    """
    if not 0.0 <= fixed_share <= 1.0:
        raise ValueError(f"fixed_share {fixed_share}: must be from 0 to 1")
    hidden, query = model.hidden_size, model.query_size
    projections = 2 * query + 2 * model.kv_size  # query and output, key and value
    weights = hidden * (projections + (3 if model.swiglu else 2) * model.ffn)
    length, dropping = schedule.length, schedule.dropping_layers
    others = model.num_layers - dropping
    logits = 6.0 * length * hidden * model.vocab_size

    def layer(tokens: int) -> float:
        scores = 2.0 * query * tokens * tokens * (0.5 if causal else 1.0)
        return 6.0 * weights * tokens + _ATTENTION_PRODUCTS * scores

    dense = model.num_layers * layer(length) + logits

    def cost(kept: int) -> float:
        products = (dropping * layer(kept) + others * layer(length) + logits) / dense
        return fixed_share + (1.0 - fixed_share) * products

    return cost


def interpolated_step_cost(milliseconds: Mapping[int, float], dense: float) -> Callable[[int], float]:
    """Return a function from kept tokens to the time of a step relative to a dense one, from measurements.

    Between measured lengths it runs in straight lines.

    Args:
        milliseconds: of a step, by kept tokens.
        dense: milliseconds of a step of the same model without random-LTD.

    Raises:
        UserError: asked for a length outside of the measured ones.
    """
    lengths = sorted(milliseconds)

    def cost(kept: int) -> float:
        if not lengths or not lengths[0] <= kept <= lengths[-1]:
            raise UserError(f"{kept} kept tokens: steps were measured at {lengths}; measure a wider range")
        above = bisect_right(lengths, kept)
        low = lengths[above - 1]
        if low == kept:
            return milliseconds[low] / dense
        high = lengths[above]
        share = (kept - low) / (high - low)
        return ((1.0 - share) * milliseconds[low] + share * milliseconds[high]) / dense

    return cost


def predict(schedule: TokenSchedule, steps: int, step_cost: Callable[[int], float]) -> Savings:
    """Return what a run saves.

    Args:
        schedule: with its numbers of layers and sequences.
        steps: optimizer steps of the run.
        step_cost: time of a step relative to a dense one, by kept tokens: `relative_step_cost`,
            `interpolated_step_cost`.

    Raises:
        UserError: the number of layers is not known, or no step.
    """
    if steps < 1:
        raise UserError(f"{steps} steps: must be at least 1")
    time = 0.0
    for first, last, kept in schedule.plateaus(steps):
        assert last is not None
        time += (last - first) * step_cost(kept)
    return Savings(
        steps,
        schedule.consumed_layer_tokens(steps),
        schedule.dense_layer_tokens(steps),
        1.0 - time / steps,
    )


def describe(
    schedule: TokenSchedule, model: ModelShape, steps: int | None, *, causal: bool = True
) -> tuple[str, dict[str, float]]:
    """Say what a schedule saves: layer tokens exactly, time by the matrix products.

    Args:
        schedule: with its numbers of layers.
        model: shape.
        steps: optimizer steps of the run; None: up to full length, or one step where it is never reached.
        causal: whether attention is.

    Returns:
        A line of text, and the numbers: ``steps``, ``layer_tokens_saved`` and ``time_saved`` as shares.
    """
    full = schedule.full_from
    counted = steps or full or 1
    found = predict(schedule, counted, relative_step_cost(schedule, model, causal=causal))
    over = f"in {counted:,} steps" if steps or full else "in every step"
    when = "never all tokens" if full is None else f"all tokens from step {full:,}"
    text = (
        f"{schedule.kept(0):,} of {schedule.length:,} tokens at first, {when}; {over} "
        f"{100 * found.share:.1f} % of the layer tokens saved, and {100 * found.time:.1f} % of the time, if "
        "it follows the matrix products"
    )
    return text, {"steps": counted, "layer_tokens_saved": found.share, "time_saved": found.time}
