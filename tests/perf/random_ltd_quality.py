"""Validation loss with random-LTD against the dense model, at equal data tokens and at equal layer tokens.

    python tests/perf/slope_quality.py prepare --train TRAIN.jsonl.xz --valid VALID.jsonl.xz --size 125m
    python tests/perf/random_ltd_quality.py run --size 125m --seeds 0 1 2 --arms dense growing_lr_equal
    python tests/perf/random_ltd_quality.py run --size 125m --seeds 0 --append

The tokens are those of ``slope_quality.py``, in ``runs/slope_quality``. ``run`` writes
``random_ltd_quality_<size>_<device name>.csv``, or ``random_ltd_learning_rates_...`` with several ``--lr``,
one row an evaluation, after each arm that is complete; a seed's arms start from the same weights and see the
same tokens in the same order. All layers but the first and the last drop tokens, an evaluation none. Arms:

- dense
- growing: from a sixteenth of the sequence to all of it over 70 % of the steps, as the paper's GPT
- constant: in every step as many tokens as `growing` keeps on average
- growing_lr: `growing`, with the learning rate by layer tokens: the same warm-up and decay, over the layer
  tokens that the run consumes
- growing_lr_equal: `growing_lr` with more steps, in which it consumes the layer tokens of the dense run

How arms are trained: `quality_runs`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from quality_model import Block, Size
from quality_runs import Comparison, Run, main
from torch import Tensor, nn

from ds_efficient.core.keys import Key
from ds_efficient.ops.random_ltd import apply_to_kept, sample_tokens
from ds_efficient.random_ltd.accounting import LayerTokens
from ds_efficient.random_ltd.learning_rate import LayerTokenCurve
from ds_efficient.random_ltd.schedule import TokenSchedule

ARMS = ("dense", "constant", "growing", "growing_lr", "growing_lr_equal")
WARM_UP, FULL_FROM, FINAL_SHARE = 0.05, 0.7, 0.1


def growing(size: Size) -> TokenSchedule:
    """The schedule of the arms with growing lengths."""
    return TokenSchedule(
        max(1, size.sequence // 16),
        size.sequence,
        max(1, round(FULL_FROM * size.steps)),
        max(1, size.sequence // 32),
        total_layer_num=size.layers,
        random_ltd_layer_num=max(1, size.layers - 2),
        batch_size=size.batch,
    )


def schedule_of(arm: str, size: Size) -> TokenSchedule:
    """The schedule of an arm."""
    schedule = growing(size)
    if arm == "dense":
        return dataclasses.replace(schedule, min_value=size.sequence)
    if arm != "constant":
        return schedule
    mean = sum(schedule.kept(step) for step in range(size.steps)) / size.steps
    return dataclasses.replace(schedule, min_value=round(mean), require_steps=None, schedule_type="constant")


def steps_for_equal_layer_tokens(size: Size) -> int:
    """Steps after which a growing run of that length has consumed the layer tokens of the dense run."""
    wanted = growing(size).dense_layer_tokens(size.steps)
    steps = size.steps
    while growing(dataclasses.replace(size, steps=steps)).consumed_layer_tokens(steps) < wanted:
        steps += 1
    return steps


class DroppingBlock(nn.Module):
    """A block that runs on the kept tokens in training."""

    def __init__(self, block: Block, key: Key) -> None:
        super().__init__()
        self.block, self.key = block, key
        self.step, self.keep = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden) to the same."""
        batch, length, _ = x.shape
        if not self.training or self.keep >= length:
            return self.block(x)
        index = sample_tokens(length, self.keep, batch, key=self.key.fold(self.step), device=x.device)
        return apply_to_kept(self.block, x, index, batch_first=True)


class LtdRun(Run):
    """One arm with one seed."""

    size: Size

    def change_model(self) -> None:
        """Let the blocks drop tokens."""
        if self.arm == "growing_lr_equal":
            self.size = dataclasses.replace(self.size, steps=steps_for_equal_layer_tokens(self.size))
        self.schedule = schedule_of(self.arm, self.size)
        self.consumed = LayerTokens(self.schedule)
        total = self.schedule.consumed_layer_tokens(self.size.steps)
        self.curve = LayerTokenCurve(round(WARM_UP * total), total, "cosine", FINAL_SHARE * self.size.lr)
        self.dropping: list[DroppingBlock] = []
        if self.arm == "dense":
            return
        first = 1 if self.size.layers > 2 else 0
        for number in range(first, first + self.schedule.dropping_layers):
            block = self.model.blocks[number]
            assert isinstance(block, Block)
            key = Key(self.seed, ("quality", "random_ltd", number))
            self.dropping.append(DroppingBlock(block, key))
            self.model.blocks[number] = self.dropping[-1]

    def before_step(self, step: int) -> None:
        """Set the kept length, and count."""
        self.model.train()
        self.consumed.count(step)
        for block in self.dropping:
            block.step, block.keep = step, self.schedule.kept(step)

    def learning_rate(self, step: int) -> float:
        """Of a step, from 0; by layer tokens, this step's included, as the warm-up by steps includes it."""
        if not self.arm.startswith("growing_lr"):
            return super().learning_rate(step)
        return self.curve(self.consumed.consumed, self.size.lr)

    def validate(self) -> float:
        """Mean loss over the validation windows, with all tokens."""
        self.model.eval()
        return super().validate()

    def train(self, interval: int) -> list[dict[str, Any]]:
        """Train all steps; rows have the layer tokens too."""
        rows = super().train(interval)
        return [{**row, "layer_tokens": self.schedule.consumed_layer_tokens(row["step"])} for row in rows]


COMPARISON = Comparison(
    "random-LTD", ("random_ltd_quality", "random_ltd_learning_rates"), ARMS, "dense", LtdRun
)

if __name__ == "__main__":
    sys.exit(main(COMPARISON))
