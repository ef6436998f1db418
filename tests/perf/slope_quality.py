"""Validation loss of SLoPe against the dense model and a dynamic-mask baseline, at equal tokens.

    python tests/perf/slope_quality.py prepare --train TRAIN.jsonl.xz --valid VALID.jsonl.xz --size 125m
    python tests/perf/slope_quality.py run --size 125m --seeds 0 1 2 --minutes 9

``prepare`` writes the tokens (a byte-level BPE trained on the training text) to ``--tokens``, by default
``runs/slope_quality``. ``run`` trains every arm with every seed and writes
``slope_quality_<size>_<device name>.csv``, or ``slope_learning_rates_...`` with several ``--lr``, one row an
evaluation, after each arm that is complete; a seed's arms start from the same weights and see the same
tokens in the same order. Arms:

- dense
- slope: 2:4, random masks, double pruned, no adapters
- slope_adapters: the same with adapters in the last 1 % of the steps
- slope_adapters10: in the last 10 %
- srste: dense weights whose 2:4 magnitude mask is chosen anew in every step; the gradient passes straight
  through the mask, and pruned weights decay (SR-STE, arXiv 2102.04010); forward and backward use one mask

How arms are trained: `quality_runs`.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from quality_model import replace_linears
from quality_runs import Comparison, Run, main
from torch import Tensor, nn

from ds_efficient.core.keys import Key
from ds_efficient.slope.linear import SlopeLinear

ARMS = ("dense", "slope", "slope_adapters", "slope_adapters10", "srste")
ADAPTER_FRACTION = {"slope_adapters": 0.01, "slope_adapters10": 0.10}
COLUMN_MASK_INTERVAL = 100
PRUNED_DECAY = 2e-4


class _StraightThrough(torch.autograd.Function):
    """The weight's 2:4 magnitude mask applied, with the gradient of SR-STE."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        mask = top2_of_4(weight)
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        weight, mask = ctx.saved_tensors
        return grad + PRUNED_DECAY * weight * ~mask


def top2_of_4(weight: Tensor) -> Tensor:
    """Bool mask of the two largest magnitudes in every four inputs; of equal ones the first."""
    order = (weight.detach().float().abs().view(torch.int32).to(torch.int64) << 2).view(-1, 4)
    order = order | torch.tensor([3, 2, 1, 0], device=weight.device)  # all different now
    a, b, c, d = order.unbind(1)
    high, other = torch.maximum(a, b), torch.maximum(c, d)
    low, last = torch.minimum(a, b), torch.minimum(c, d)
    second = torch.maximum(torch.minimum(high, other), torch.maximum(low, last))
    return (order >= second[:, None]).view(weight.shape)


class StraightThroughLinear(nn.Module):
    """A linear layer with a dense weight that is pruned to 2:4 in each forward pass."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, _StraightThrough.apply(self.weight), self.bias)


class SlopeRun(Run):
    """One arm with one seed."""

    def change_model(self) -> None:
        """Make the linear layers of the blocks sparse."""
        size, seed, arm = self.size, self.seed, self.arm
        self.sparse: list[SlopeLinear] = []
        if arm.startswith("slope"):
            rank = size.rank if arm in ADAPTER_FRACTION else 0
            self.sparse = replace_linears(
                self.model,
                lambda linear, name: SlopeLinear.from_linear(
                    linear, adapter_rank=rank, key=Key(seed, ("quality", "slope", name))
                ),
            )
        elif arm == "srste":
            replace_linears(self.model, lambda linear, name: StraightThroughLinear(linear))
        # Ends with a step of its own, as `slope.adapter.last_fraction` does.
        share = ADAPTER_FRACTION.get(arm)
        self.adapter_start = math.inf if share is None else size.steps - max(1, round(size.steps * share))

    def before_step(self, step: int) -> None:
        """Let the adapters join when it is time."""
        if step == self.adapter_start:
            for layer in self.sparse:
                layer.activate_adapter()

    def after_step(self, step: int) -> None:
        """Choose the column masks anew at their interval, and have the operands written again."""
        for layer in self.sparse:
            if (step + 1) % COLUMN_MASK_INTERVAL == 0:
                layer.refresh()
            layer.slope.operands.weight_changed()


COMPARISON = Comparison("SLoPe", ("slope_quality", "slope_learning_rates"), ARMS, "dense", SlopeRun)

if __name__ == "__main__":
    sys.exit(main(COMPARISON))
