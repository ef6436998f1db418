"""Validation loss of a GPT under MKOR and other optimizers, at equal tokens, each at several learning rates.

    python tests/perf/slope_quality.py prepare --train TRAIN.jsonl.xz --valid VALID.jsonl.xz --size 125m
    python tests/perf/mkor_quality.py run --size 125m --arms adamw muon mkor_right --lr 3e-4 1e-3 --append
    python tests/perf/mkor_quality.py run --size small --arms sgd --lr 0.1 0.3 --interval 12 --append

The tokens are those of ``slope_quality.py``, in ``runs/slope_quality``. ``run`` writes
``mkor_quality_<size>_<device name>.csv``, one row an evaluation, after each arm that is complete; the arms of
a seed start from the same weights and see the same tokens in the same order. Seconds are the processor's own
on the CPU. Arms: `mkor_contestants`. How arms are trained: `quality_runs`, but for the optimizer; the
learning rates are on one grid of half decades, 1e-4, 3e-4, 1e-3 and so on.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from mkor_contestants import CONTESTANTS, new_optimizer, step, switched_at
from quality_runs import WEIGHT_DECAY, Comparison, Run, main
from torch import Tensor, nn


class MkorRun(Run):
    """One arm with one seed."""

    def _new_optimizer(self) -> Any:
        self.spent = [0.0]
        return new_optimizer(self.arm, self.model, lr=self.size.lr, steps=self.size.steps, decay=WEIGHT_DECAY)

    def step(self, step_number: int) -> Tensor:
        """Train one step; returns its loss."""
        started = time.process_time()
        loss = self.loss(self.text.batch(self.order, step_number))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step_number)
        step(self.optimizer, loss)
        self.optimizer.zero_grad(set_to_none=True)
        self.spent.append(self.spent[-1] + time.process_time() - started)
        return loss.detach()

    def train(self, interval: int) -> list[dict[str, Any]]:
        """Train all steps; rows have the step at which MKOR-H switched."""
        rows = super().train(interval)
        if self.device.type == "cpu":
            rows = [{**row, "seconds": self.spent[row["step"]]} for row in rows]
        return [{**row, "switched_at": switched_at(self.optimizer)} for row in rows]


COMPARISON = Comparison("MKOR", ("mkor_quality", "mkor_quality"), tuple(CONTESTANTS), "adamw", MkorRun)

if __name__ == "__main__":
    sys.exit(main(COMPARISON))
