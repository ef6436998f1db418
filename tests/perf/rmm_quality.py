"""Validation loss with RMM's sketched weight gradients against exact ones, at equal tokens.

    python tests/perf/slope_quality.py prepare --train TRAIN.jsonl.xz --valid VALID.jsonl.xz --size 125m
    python tests/perf/rmm_quality.py run --size 125m --seeds 0 1 2 --arms exact ratio8 --minutes 9
    python tests/perf/rmm_quality.py run --size 125m --seeds 0 --arms ratio4 ratio16 --append

The tokens are those of ``slope_quality.py``, in ``runs/slope_quality``. ``run`` writes
``rmm_quality_<size>_<device name>.csv``, or ``rmm_learning_rates_...`` with several ``--lr``, one row an
evaluation, after each arm that is complete; a seed's arms start from the same weights and see the same
tokens in the same order. Arms:

- exact: ratio 1
- ratio4, ratio8, ratio16: Gaussian sketches of 1/4, 1/8, 1/16 of the rows, in blocks of 512, in the layers
  that are sketched by default: query, key and value, and both of the feed-forward part

How arms are trained: `quality_runs`.
"""

from __future__ import annotations

import sys

from quality_model import replace_linears
from quality_runs import Comparison, Run, main
from torch import nn

from ds_efficient.core.keys import Key
from ds_efficient.rmm.linear import RandomizedLinear

RATIOS = {"exact": 1.0, "ratio4": 1 / 4, "ratio8": 1 / 8, "ratio16": 1 / 16}
SKETCHED = ("qkv", "fc1", "fc2")
BLOCK = 512


class RmmRun(Run):
    """One arm with one seed."""

    def change_model(self) -> None:
        """Sketch the gradients of the linear layers of the blocks."""
        if RATIOS[self.arm] < 1:
            replace_linears(self.model, self._layer)

    def _layer(self, linear: nn.Linear, name: str) -> nn.Module:
        if name.rpartition(".")[2] not in SKETCHED:
            return linear
        return RandomizedLinear.from_linear(
            linear, ratio=RATIOS[self.arm], block_size=BLOCK, min_rows=8,
            key=Key(self.seed, ("quality", "rmm", name)),
        )  # fmt: skip


COMPARISON = Comparison("RMM", ("rmm_quality", "rmm_learning_rates"), tuple(RATIOS), "exact", RmmRun)

if __name__ == "__main__":
    sys.exit(main(COMPARISON))
