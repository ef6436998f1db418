"""Counting of data tokens and layer tokens, once for each optimizer step, and the end of a run by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_efficient.errors import CheckpointError
from ds_efficient.random_ltd.schedule import TokenSchedule


class LayerTokens:
    """Tokens and layer tokens that the optimizer steps of a run have consumed: exact whole numbers.

    Args:
        schedule: with its numbers of layers and sequences.
    """

    def __init__(self, schedule: TokenSchedule) -> None:
        schedule.layer_tokens(0)  # raises where the layers are not known
        self.schedule = schedule
        self.consumed = 0
        self.tokens = 0
        self.steps = 0
        self.last = 0

    def count(self, step: int, length: int | None = None) -> int:
        """Count a step, unless it or a later one was counted before; return its layer tokens.

        However often a step is announced (micro-batches, hooks), it counts once.

        Args:
            step: optimizer steps done before, from 0; those that fp16 left out because of an overflow have
                read their tokens as well.
            length: tokens of its sequences; None: the schedule's.

        Raises:
            ValueError: a negative step.
        """
        tokens = self.schedule.batch_size * (self.schedule.length if length is None else length)
        before = self.consumed
        self.add(step, tokens, self.schedule.layer_tokens(step, length))
        return self.consumed - before

    def add(self, step: int, tokens: int, layer_tokens: int) -> None:
        """Count a step by what it really read, unless it or a later one was counted before.

        Args:
            step: optimizer steps done before, from 0.
            tokens, layer_tokens: of the step, over all data-parallel ranks and micro-batches.
        """
        if step < self.steps:
            return
        self.last = layer_tokens
        self.consumed += layer_tokens
        self.tokens += tokens
        self.steps = step + 1

    @property
    def dense(self) -> int:
        """Layer tokens that would have been consumed without dropping."""
        assert self.schedule.total_layer_num is not None
        return self.tokens * self.schedule.total_layer_num

    @property
    def saving(self) -> float:
        """Share of the layer tokens that was left out so far, 0 to 1."""
        return 1.0 - self.consumed / self.dense if self.tokens else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, plain whole numbers."""
        return {
            "consumed_layer_tokens": self.consumed,
            "consumed_tokens": self.tokens,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result.

        Raises:
            CheckpointError: a count is missing or not a whole number of at least 0.
        """
        found = {}
        for name in self.state_dict():
            value = state.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise CheckpointError(
                    f"random_ltd: {name} {value!r} in the checkpoint: a whole number, 0 or more, is needed; "
                    "load another checkpoint"
                )
            found[name] = value
        self.consumed = found["consumed_layer_tokens"]
        self.tokens = found["consumed_tokens"]
        self.steps = found["steps"]


def budget_reached(
    tokens: int, layer_tokens: int, *, token_budget: int | None = None, layer_token_budget: int | None = None
) -> str | None:
    """Return why a run ends after a step, or None where it goes on.

    A pure function of counts that are equal on all ranks, so that the ranks agree without asking.

    Args:
        tokens: data tokens consumed.
        layer_tokens: layer tokens consumed.
        token_budget, layer_token_budget: the run ends once one of them is reached; None: no such end.
    """
    for name, consumed, budget in (
        ("token_budget", tokens, token_budget),
        ("layer_token_budget", layer_tokens, layer_token_budget),
    ):
        if budget is not None and consumed >= budget:
            return f"{name} {budget} reached"
    return None
