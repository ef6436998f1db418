"""MKOR-H: when to leave the second order for the first.

The paper says that MKOR-H watches how the loss falls and goes back to the first-order optimizer once the
second order no longer pays, and gives no formula. The rule here is that of a knee in the loss curve:

    r_t = moving average over k steps of (loss[t-1] - loss[t])       what a step gains now
    R_t = (loss[0] - loss[t]) / t                                    what a step gained on average

After `min_steps` steps, switch once and for good where ``r_t < beta R_t``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ds_efficient.errors import CheckpointError, UserError


class HybridSwitch:
    """Decides from the loss of each step when MKOR ends.

    On several ranks give it the mean loss of all of them: then every rank switches at the same step.

    Attributes:
        switched_at: the step that switched, counted from 0; None before.

    Args:
        beta: part of the average gain below which the present gain is too little, in (0, 1).
        ema: steps that the moving average covers: weight 2 / (ema + 1) for the newest, and the weights of the
            first steps add up to 1.
        min_steps: fewest steps before the switch.

    Raises:
        UserError: values outside of these ranges.
    """

    def __init__(self, beta: float = 0.1, ema: int = 100, min_steps: int = 200) -> None:
        if not 0 < beta < 1:
            raise UserError(f"hybrid.beta={beta}; allowed: between 0 and 1, for example 0.1")
        if ema < 1:
            raise UserError(f"hybrid.ema={ema}; allowed: 1 and more steps")
        if min_steps < 0:
            raise UserError(f"hybrid.min_steps={min_steps}; allowed: 0 and more steps")
        self.beta, self.ema, self.min_steps = beta, ema, min_steps
        self.switched_at: int | None = None
        self._step = 0
        self._first: float | None = None
        self._first_step = 0
        self._last = math.nan
        self._average = self._weight = 0.0

    @property
    def switched(self) -> bool:
        """Whether the first order has taken over."""
        return self.switched_at is not None

    @property
    def gain(self) -> float:
        """r_t; NaN before two losses were seen."""
        return self._average / self._weight if self._weight else math.nan

    @property
    def average_gain(self) -> float:
        """R_t; NaN before two losses were seen."""
        if self._first is None or not self._weight:
            return math.nan
        return (self._first - self._last) / (self._step - 1 - self._first_step)

    def observe(self, loss: float) -> bool:
        """Take in the loss of a step; return whether the first order has taken over.

        A loss that is not finite, as of a step that overflowed, is a step without news.
        """
        step = self._step
        self._step += 1
        if self.switched or not math.isfinite(loss):
            return self.switched
        if self._first is None:
            self._first, self._first_step = loss, step
        else:
            keep = 1 - 2 / (self.ema + 1)
            self._average = keep * self._average + (1 - keep) * (self._last - loss)
            self._weight = keep * self._weight + (1 - keep)
        self._last = loss
        if self._step > self.min_steps and self._weight and self.gain < self.beta * self.average_gain:
            self.switched_at = step
        return self.switched

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far, as plain values."""
        return {
            "switched_at": self.switched_at,
            "step": self._step,
            "first": self._first,
            "first_step": self._first_step,
            "last": self._last,
            "average": self._average,
            "weight": self._weight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: a value is missing.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise CheckpointError(f"state of MKOR-H: {', '.join(sorted(missing))} missing")
        self.switched_at = state["switched_at"]
        self._step, self._first, self._first_step = state["step"], state["first"], state["first_step"]
        self._last, self._average, self._weight = state["last"], state["average"], state["weight"]
