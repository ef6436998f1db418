"""Validation loss with compressed gradients against exact ones, at equal tokens, with simulated ranks.

    python tests/perf/slope_quality.py prepare --train TRAIN.jsonl.xz --valid VALID.jsonl.xz --size tiny
    python tests/perf/lgreco_quality.py run --size tiny --seeds 0 1 2 [--arms none lgreco_powersgd ...]
    python tests/perf/lgreco_quality.py run --size 125m --steps 250 --seeds 0 --append

The tokens are those of ``slope_quality.py``, in ``runs/slope_quality``. ``run`` writes
``lgreco_quality_<size>_<device name>.csv`` after each arm that is complete, one row an evaluation, and the
choices of every plan of its first seed to ``lgreco_choices_<size>_<device name>.csv``. A seed's arms start
from the same weights and see the same tokens in the same order. Each step's batch is cut into the
micro-batches of `RANKS` ranks; each rank's gradient is compressed with its own error feedback by the reducer
that also runs over a network. Compression starts after the warm-up of the learning rate; a plan is made every
tenth of the steps. Arms: `lgreco_arms`; how they are trained: `quality_runs`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lgreco_arms import ARMS, Averaging, choices_rows, section, simulated
from measuring import conditions, write_csv
from quality_runs import Comparison, Run, kept_rows, main, parse
from torch import Tensor

from ds_efficient.core.keys import Key

RANKS = 2
RANK = 32  # the configuration's default
PLANS = 10  # of a run


class LgrecoRun(Run):
    """One arm with one seed."""

    averaging: Averaging | None = None

    def change_model(self) -> None:
        """Make what averages the gradients."""
        config = section(self.arm, RANK)
        self.start = max(1, round(0.05 * self.size.steps))
        self.interval = max(1, self.size.steps // PLANS)
        self.done, self.sent = 0, 0.0
        if config is not None:
            key = Key(self.seed, ("quality", "lgreco"))
            interval = self.interval if self.arm.startswith("lgreco_") else 0
            self.averaging = simulated(config, self.model, RANKS, key, interval)

    def backward(self, ids: Tensor) -> Tensor:
        """Mean of the ranks' gradients, as the arm sends them."""
        parameters = dict(self.model.named_parameters())
        gradients: list[dict[str, Tensor]] = []
        losses = []
        for part in ids.chunk(RANKS):
            losses.append(self.loss(part))
            losses[-1].backward()
            gradients.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
            for p in parameters.values():
                p.grad = None
        self._average(gradients)
        for name, p in parameters.items():
            p.grad = gradients[0].get(name)
        return torch.stack(losses).mean()

    def _average(self, gradients: list[dict[str, Tensor]]) -> None:
        step, self.done = self.done, self.done + 1
        if self.averaging is not None and step >= self.start:
            self.averaging.average(gradients, step)
            return
        for name, gradient in gradients[0].items():
            for other in gradients[1:]:
                gradient += other[name]
            gradient /= RANKS

    def train(self, interval: int) -> list[dict[str, Any]]:
        """Train all steps; rows have the bytes that a rank has sent, and the choices are written."""
        rows = super().train(interval)
        steps = self.size.steps - self.start
        for row in rows:
            row["ratio"] = self._ratio(steps)
            row["plan_seconds"] = (
                sum(plan.seconds for _, plan in self.averaging.plans) if self.averaging else ""
            )
        if self.averaging is not None:
            CHOICES[self.arm, self.seed] = choices_rows(
                self.averaging.plans, {name: p.shape for name, p in self.model.named_parameters()}
            )
        return rows

    def _ratio(self, steps: int) -> float:
        """Bytes of exact gradients over the bytes sent, of the compressed steps."""
        if self.averaging is None:
            return 1.0
        reducer = self.averaging.reducers[0]
        return reducer.raw_bytes / max(1.0, reducer.transport.sent.gradients)


CHOICES: dict[tuple[str, int], list[dict[str, Any]]] = {}
COMPARISON = Comparison("L-GreCo", ("lgreco_quality", "lgreco_learning_rates"), ARMS, "none", LgrecoRun)


def write_choices() -> None:
    """Write what the plans of the first seed of this run chose."""
    rows = [
        {"arm": arm, "seed": seed, **row}
        for (arm, seed), found in CHOICES.items()
        if arm.startswith("lgreco_") and seed == min(one for _, one in CHOICES)
        for row in found
    ]
    if not rows:
        return
    args = parse(COMPARISON)
    device = torch.device(args.device)
    common = conditions(device)
    rows = [{"size": args.size, **row, **common} for row in rows]
    new = {row["arm"] for row in rows}
    rows = [row for row in kept_rows("lgreco_choices", args, device) if row["arm"] not in new] + rows
    print(f"wrote {write_csv(f'lgreco_choices_{args.size}', rows, args.output, device)}")


if __name__ == "__main__":
    status = main(COMPARISON)
    write_choices()
    sys.exit(status)
