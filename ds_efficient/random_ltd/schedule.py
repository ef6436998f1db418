"""How many tokens the layers keep, over the steps, and the layer tokens that follow: exact arithmetic.

random-LTD, arXiv 2211.11586, section 3.2 (MSLG). A *layer token* is one token that one layer processed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from ds_efficient.errors import UserError

FIXED_LINEAR = "fixed_linear"
CONSTANT = "constant"
SCHEDULE_TYPES = (FIXED_LINEAR, CONSTANT)


@dataclass(frozen=True)
class TokenSchedule:
    """Tokens that the dropping layers keep of each sequence, by step, and the layer tokens of a step.

    ``fixed_linear`` starts at `min_value` and grows by `seq_per_step` tokens at equal intervals, in rational
    arithmetic: ``min + seq_per_step * floor(step * (max - min) / (seq_per_step * require_steps))``, and
    `max_value` from step `require_steps` on, also where `seq_per_step` does not divide ``max - min``.
    ``constant`` keeps `min_value`, up to step `require_steps` where that is given.

    The names are those of DeepSpeed's keys.

    Attributes:
        min_value: tokens kept at step 0; never fewer.
        max_value: tokens kept at the end.
        require_steps: step from which `max_value` tokens are kept; may be a fraction.
        seq_per_step: tokens of one increase.
        schedule_type: ``"fixed_linear"`` or ``"constant"``.
        interval: steps between two increases, in place of `require_steps`; the last increase may be smaller,
            and `max_value` is reached after ``ceil((max - min) / seq_per_step)`` of them.
        total_layer_num: transformer layers of the model; needed for layer tokens.
        random_ltd_layer_num: layers that drop tokens; None: all but the first and the last.
        batch_size: sequences of one optimizer step, over all ranks and micro-batches.
        seq_length: tokens of a sequence, which the other layers see; None: `max_value`.
        multiple_of: kept tokens are rounded up to a multiple, so that each sequence-parallel rank can keep
            as many as the others; it divides `max_value`.

    Raises:
        UserError: values that contradict one another.
    """

    min_value: int
    max_value: int
    require_steps: int | Fraction | None = None
    seq_per_step: int = 16
    schedule_type: str = FIXED_LINEAR
    interval: Fraction | None = None
    total_layer_num: int | None = None
    random_ltd_layer_num: int | None = None
    batch_size: int = 1
    seq_length: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"{name} {getattr(self, name)}: must be at least 1"
            for name in ("min_value", "max_value", "seq_per_step", "batch_size", "multiple_of")
            if getattr(self, name) < 1
        ]
        if not problems:
            problems = list(self._contradictions())
        if problems:
            raise UserError("random_ltd_schedule: " + "; ".join(problems))

    def _contradictions(self) -> Iterator[str]:
        if self.min_value > self.max_value:
            yield f"min_value {self.min_value} is larger than max_value {self.max_value}; lower it"
        if self.schedule_type not in SCHEDULE_TYPES:
            yield f'schedule_type "{self.schedule_type}": allowed are {" and ".join(SCHEDULE_TYPES)}'
        if self.require_steps is not None and self.require_steps < 0:
            yield f"require_steps {self.require_steps}: must be at least 0"
        if self.interval is not None and (self.require_steps is not None or self.interval <= 0):
            yield f"interval {self.interval}: must be above 0, and stands in place of require_steps"
        if self.schedule_type == FIXED_LINEAR and self.require_steps is None and self.interval is None:
            yield 'require_steps: needed with schedule_type "fixed_linear"'
        if self.schedule_type == CONSTANT and self.interval is not None:
            yield 'interval: nothing grows with schedule_type "constant"; leave it out'
        if self.max_value % self.multiple_of:
            yield f"max_value {self.max_value}: must be a multiple of {self.multiple_of}"
        if self.seq_length is not None and self.seq_length < 1:
            yield f"seq_length {self.seq_length}: must be at least 1"
        total, dropping = self.total_layer_num, self.random_ltd_layer_num
        if total is not None and total < 1:
            yield f"total_layer_num {total}: must be at least 1"
        if dropping is not None and (dropping < 0 or (total is not None and dropping > total)):
            yield f"random_ltd_layer_num {dropping}: must be from 0 to total_layer_num {total}"

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.max_value if self.seq_length is None else self.seq_length

    @property
    def dropping_layers(self) -> int:
        """Layers that drop tokens, default resolved.

        Raises:
            UserError: the number of layers is not known.
        """
        if self.total_layer_num is None:
            raise UserError("total_layer_num: needed to count layer tokens; give the number of layers")
        if self.random_ltd_layer_num is not None:
            return self.random_ltd_layer_num
        return max(0, self.total_layer_num - 2)

    @property
    def full_from(self) -> int | None:
        """First step that keeps `max_value` tokens; None: no step ever does."""
        if self.min_value == self.max_value:
            return 0
        if self.require_steps is not None:
            return math.ceil(self.require_steps)
        if self.interval is None:
            return None
        return math.ceil(self.interval * -(-(self.max_value - self.min_value) // self.seq_per_step))

    def _steps_per_increase(self) -> Fraction:
        if self.interval is not None:
            return Fraction(self.interval)
        assert self.require_steps is not None
        return Fraction(self.require_steps) * self.seq_per_step / (self.max_value - self.min_value)

    def kept(self, step: int, length: int | None = None) -> int:
        """Return the tokens that a dropping layer keeps.

        Args:
            step: optimizer steps done before, from 0.
            length: tokens of the sequences at hand; None: `length` of the schedule.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step {step}: must be at least 0")
        available = self.length if length is None else length
        return min(self._scheduled(step), available)

    def _scheduled(self, step: int) -> int:
        if self.full_from is not None and step >= self.full_from:
            return self.max_value
        growth = 0
        if self.schedule_type == FIXED_LINEAR:
            growth = self.seq_per_step * (step // self._steps_per_increase())
        value = min(self.max_value, self.min_value + growth)
        return -(-value // self.multiple_of) * self.multiple_of

    def layer_tokens(self, step: int, length: int | None = None) -> int:
        """Return the layer tokens that one optimizer step processes, with `batch_size` sequences.

        Args:
            step: optimizer steps done before, from 0.
            length: tokens of the sequences at hand; None: `length` of the schedule.

        Raises:
            UserError: the number of layers is not known.
            ValueError: a negative step.
        """
        return self._step_total(self.kept(step, length), self.length if length is None else length)

    def _step_total(self, kept: int, length: int) -> int:
        dropping = self.dropping_layers
        assert self.total_layer_num is not None
        return self.batch_size * (dropping * kept + (self.total_layer_num - dropping) * length)

    def plateaus(self, steps: int | None = None) -> Iterator[tuple[int, int | None, int]]:
        """Yield (first step, step after the last, kept tokens) for each stretch of equal length.

        Args:
            steps: end of the run; None: without end, the last stretch has None.
        """
        first, end = 0, self.full_from
        increases = 0
        while steps is None or first < steps:
            following = end if end is None or first < end else None
            if self.schedule_type == FIXED_LINEAR and end is not None and first < end:
                increases += 1
                following = min(end, math.ceil(self._steps_per_increase() * increases))
            last = following is None or (steps is not None and following >= steps)
            if following is None or following > first:
                yield first, steps if last else following, self.kept(first)
            if last:
                return
            assert following is not None
            first = following

    def consumed_layer_tokens(self, steps: int) -> int:
        """Return the layer tokens of the first `steps` optimizer steps."""
        total = 0
        for first, last, kept in self.plateaus(steps):
            assert last is not None
            total += (last - first) * self._step_total(kept, self.length)
        return total

    def dense_layer_tokens(self, steps: int) -> int:
        """Return the layer tokens of `steps` steps in which nothing is dropped."""
        return steps * self._step_total(self.length, self.length)

    def steps_to(self, layer_tokens: int) -> int:
        """Return the number of steps after which at least so many layer tokens are consumed."""
        left = layer_tokens
        for first, last, kept in self.plateaus():
            each = self._step_total(kept, self.length)
            steps = -(-left // each)
            if left <= 0 or last is None or steps <= last - first:
                return first + max(0, steps)
            left -= (last - first) * each
        raise AssertionError("the last stretch has no end")


def schedule_by_tokens(
    min_value: int,
    max_value: int,
    seq_per_step: int,
    tokens_per_increase: int,
    *,
    batch_size: int,
    total_layer_num: int | None = None,
    random_ltd_layer_num: int | None = None,
) -> TokenSchedule:
    """Return the schedule that the paper writes as "+16 tokens every 1.75 billion tokens".

    Args:
        min_value, max_value: tokens kept at the beginning and the end; `max_value` is the sequence length.
        seq_per_step: tokens of one increase.
        tokens_per_increase: tokens of the data between two increases.
        batch_size: sequences of one optimizer step.
        total_layer_num, random_ltd_layer_num: of the model.

    Raises:
        UserError: values that contradict one another.
    """
    return TokenSchedule(
        min_value,
        max_value,
        seq_per_step=seq_per_step,
        interval=Fraction(tokens_per_increase, batch_size * max_value),
        total_layer_num=total_layer_num,
        random_ltd_layer_num=random_ltd_layer_num,
        batch_size=batch_size,
    )
