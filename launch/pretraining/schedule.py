"""Learning rate with Megatron-LM's names: linear warm-up, then one of four decays."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_efficient.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step.

    Attributes:
        peak: largest learning rate.
        minimum: never below it after the warm-up.
        style: ``constant``, ``linear``, ``cosine`` or ``inverse-square-root``.
        warmup_steps: steps of the linear warm-up from `warmup_init`.
        decay_steps: step at which the decay ends, warm-up included.
        warmup_init: learning rate at step 0.
    """

    peak: float
    minimum: float
    style: str
    warmup_steps: int
    decay_steps: int
    warmup_init: float = 0.0

    def __call__(self, step: int) -> float:
        """Return the learning rate of the optimizer step with this number (0-based)."""
        if self.warmup_steps > 0 and step <= self.warmup_steps:
            return self.warmup_init + (self.peak - self.warmup_init) * step / self.warmup_steps
        if self.style == "constant":
            return self.peak
        if step > self.decay_steps:
            return self.minimum
        if self.style == "inverse-square-root":
            first = max(self.warmup_steps, 1)
            return max(self.minimum, self.peak * math.sqrt(first / max(step, 1)))
        done = (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps)
        share = 1.0 - done if self.style == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.minimum + (self.peak - self.minimum) * share


def schedule_from(args: argparse.Namespace, peak: float, train_iters: int) -> Schedule:
    """Build the schedule from the command line.

    Raises:
        UserError: minimum above the peak, or a warm-up longer than the decay.
    """
    decay = args.lr_decay_iters or max(1, train_iters)
    warmup = args.lr_warmup_iters
    if args.lr_warmup_fraction is not None:
        warmup = round(args.lr_warmup_fraction * decay)
    if args.min_lr > peak:
        raise UserError(f"--min-lr {args.min_lr}: must not be above the learning rate {peak}")
    if warmup > decay or (warmup == decay and decay > 1):
        raise UserError(
            f"--lr-warmup-iters {warmup}: must be below the decay's {decay} steps (--lr-decay-iters)"
        )
    return Schedule(peak, args.min_lr, args.lr_decay_style, warmup, decay, args.lr_warmup_init)


class LRScheduler:
    """Sets the learning rate of every parameter group; the object DeepSpeed steps and checkpoints.

    A group may carry ``lr_mult``, which multiplies its rate.
    """

    def __init__(self, optimizer: Any, schedule: Schedule) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.num_steps = 0
        self.apply()

    def apply(self) -> None:
        """Set the rate of every group."""
        rate = self.schedule(self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)

    def step(self, increment: int = 1) -> None:
        """Go on by `increment` optimizer steps."""
        self.num_steps += increment
        self.apply()

    def get_lr(self) -> list[float]:
        """Return the rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:
        """Return the rate of each parameter group."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return the step count; the schedule itself comes from the command line."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the step count and set the rates."""
        self.num_steps = int(state["num_steps"])
        self.apply()
