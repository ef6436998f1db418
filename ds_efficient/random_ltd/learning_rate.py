"""LayerToken learning rate: a torch scheduler whose clock is the layer tokens consumed, not the steps.

random-LTD, arXiv 2211.11586, section 3.3: while tokens are dropped, layers learn from fewer of them, and an
ordinary schedule decays too early.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ds_efficient.errors import UserError
from ds_efficient.random_ltd.accounting import LayerTokens
from ds_efficient.random_ltd.schedule import TokenSchedule

DECAY_STYLES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class LayerTokenCurve:
    """Learning rate by layer tokens: a straight warm-up from 0, then a decay.

    Attributes:
        warmup_layer_tokens: layer tokens at which the peak is reached; 0: no warm-up.
        decay_layer_tokens: layer tokens, from the start of the run, at which the minimum is reached.
        decay_style: ``"cosine"``, ``"linear"`` or ``"constant"``.
        min_lr: the minimum.

    Raises:
        UserError: values that contradict one another.
    """

    warmup_layer_tokens: int = 0
    decay_layer_tokens: int | None = None
    decay_style: str = "cosine"
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        warmup, decay, style = self.warmup_layer_tokens, self.decay_layer_tokens, self.decay_style
        problems = []
        if warmup < 0:
            problems.append(f"warmup_layer_tokens {warmup}: must be at least 0")
        if style not in DECAY_STYLES:
            problems.append(f'decay_style "{style}": allowed are {", ".join(DECAY_STYLES)}')
        elif style != "constant" and decay is None:
            problems.append(f'decay_layer_tokens: needed with decay_style "{style}"')
        if decay is not None and decay <= warmup:
            problems.append(
                f"decay_layer_tokens {decay}: must be larger than warmup_layer_tokens {warmup}; both count "
                "from the start of the run"
            )
        if not 0.0 <= self.min_lr < math.inf:
            problems.append(f"min_lr {self.min_lr}: must be a number of at least 0")
        if problems:
            raise UserError("layer_token_lr_schedule: " + "; ".join(problems))

    def __call__(self, layer_tokens: int, peak: float) -> float:
        """Return the learning rate after so many layer tokens.

        Args:
            layer_tokens: consumed so far.
            peak: largest learning rate; where it is below the minimum, it is the minimum.
        """
        warmup, decay = self.warmup_layer_tokens, self.decay_layer_tokens
        if layer_tokens < warmup:
            return peak * (layer_tokens / warmup)
        if self.decay_style == "constant" or decay is None:
            return peak
        minimum = min(self.min_lr, peak)
        if layer_tokens >= decay:
            return minimum
        done = (layer_tokens - warmup) / (decay - warmup)
        share = 1.0 - done if self.decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return minimum + (peak - minimum) * share


class LayerTokenLR(LRScheduler):
    """Sets the learning rate of every parameter group by the layer tokens consumed.

    A group's learning rate at the start is its peak; ``lr_mult`` of a group multiplies its rate. Without
    dropping it is the ordinary schedule in tokens; with dropping it lags behind that one.

    Args:
        optimizer: any torch optimizer.
        tokens: a counter that somebody else counts with, before `step`; or a schedule, of which each call of
            `step` then counts one step.
        warmup_layer_tokens: layer tokens until the peak is reached, from a rate of 0.
        decay_layer_tokens: layer tokens, from the start of the run, at which `min_lr` is reached.
        decay_style: ``"cosine"``, ``"linear"`` or ``"constant"``.
        min_lr: learning rate at the end of the decay.

    Raises:
        UserError: values that contradict one another, or `min_lr` above every peak.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tokens: LayerTokens | TokenSchedule,
        *,
        warmup_layer_tokens: int = 0,
        decay_layer_tokens: int | None = None,
        decay_style: str = "cosine",
        min_lr: float = 0.0,
    ) -> None:
        self.curve = LayerTokenCurve(warmup_layer_tokens, decay_layer_tokens, decay_style, min_lr)
        self._counts = isinstance(tokens, TokenSchedule)
        self.tokens = LayerTokens(tokens) if isinstance(tokens, TokenSchedule) else tokens
        peak = max(float(group["lr"]) for group in optimizer.param_groups)
        if 0.0 < peak < min_lr:
            raise UserError(
                f"layer_token_lr_schedule.min_lr {min_lr}: must not be above the optimizer's lr {peak}"
            )
        self._ready = False  # the base class takes a first step
        super().__init__(optimizer)
        self._ready = True

    def get_lr(self) -> list[Any]:
        """Return the rate of each parameter group at the layer tokens consumed."""
        return [
            self.curve(self.tokens.consumed, float(base)) * group.get("lr_mult", 1.0)
            for base, group in zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        ]

    def step(self, epoch: int | None = None) -> None:
        """Go on after an optimizer step."""
        if self._counts and self._ready:
            self.tokens.count(self.tokens.steps)
        super().step(epoch)

    def apply(self) -> None:
        """Set the rates again, as after a change of the counter or of the optimizer's state."""
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):  # of a capturable optimizer
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; the shape of the schedule comes from the configuration."""
        return {"last_epoch": self.last_epoch, **self.tokens.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the counts, the counter's too, and set the rates.

        Raises:
            CheckpointError: a count is missing or not a whole number.
        """
        self.tokens.load_state_dict(state_dict)
        self.last_epoch = int(state_dict.get("last_epoch", self.tokens.steps))
        self.apply()
