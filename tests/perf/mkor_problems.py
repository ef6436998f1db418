"""Steps and seconds of MKOR and other optimizers to a target loss, on two small networks on the CPU.

    python tests/perf/mkor_problems.py compare
    python tests/perf/mkor_problems.py settings
    python tests/perf/mkor_problems.py formula

Problems, both with a new batch in every step, and a loss on data that training does not see:

- regression: a tanh network of 32, 64, 64, 8 on inputs with a mean of 1 and a covariance of condition number
  1e4, towards a random network of the whitened inputs
- autoencoder: 144, 64, 32, 8, 32, 64, 144 with tanh, on images of three blurred dots

``compare`` finds for each contestant the learning rate with the lowest final loss on one grid of half decades
(`mkor_contestants.LR_GRID`, from the contestant's first one outwards until both neighbours are worse) with
seed 0, then trains with the other seeds, and writes ``mkor_problems_<device name>.csv``: each evaluation of
the rates found, the last one of the others. ``settings`` does the same for values of MKOR's own settings, and
writes ``mkor_settings_...``. ``formula`` shows an inverse factor under the printed update and under
Sherman-Morrison's: ``mkor_formula_...``. Learning rates warm up over 5 % of the steps and fall by a cosine to
a tenth. Seconds are the processor's own of the training steps.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import DATA, conditions, write_csv
from mkor_contestants import CONTESTANTS, FIRST_LR, LR_GRID, new_optimizer, step, switched_at
from torch import Tensor, nn

from ds_efficient.core.keys import Key
from ds_efficient.mkor.inverse import DenseInverse
from ds_efficient.ops.keyed_random import normal, uniform

CPU = torch.device("cpu")
EVALUATIONS = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "gamma=0.9": {"gamma": 0.9, "zeta": 0.85},
    "gamma=0.99": {"gamma": 0.99},
    "threshold=2": {"threshold": 2.0},
    "threshold=100": {"threshold": 100.0},
    "threshold=1e6": {"threshold": 1e6},
    "zeta=0.5": {"zeta": 0.5},
    "interval=1": {"inversion_interval": 1},
    "interval=1,gamma=0.99": {"inversion_interval": 1, "gamma": 0.99},
    "interval=50": {"inversion_interval": 50},
    "rank=2": {"statistics_rank": 2},
    "rank=32": {"statistics_rank": 32},
    "gamma=0.5": {"gamma": 0.5, "zeta": 0.45},
    "warmup=30": {"warmup_steps": 30},
    "gamma=0.5,warmup=30": {"gamma": 0.5, "zeta": 0.45, "warmup_steps": 30},
    "interval=1,gamma=0.5": {"inversion_interval": 1, "gamma": 0.5, "zeta": 0.45},
}


@dataclass(frozen=True)
class Problem:
    """A network and its data.

    Attributes:
        widths: of the layers, inputs first.
        batch: rows a step.
        steps: of a run.
        sample: (rows, inputs) and (rows, outputs) of a key.
    """

    widths: tuple[int, ...]
    batch: int
    steps: int
    sample: Callable[[Key, int], tuple[Tensor, Tensor]]

    def network(self, seed: int) -> nn.Sequential:
        """With weights of variance 1 / inputs, drawn by key, and biases of zero."""
        layers: list[nn.Module] = []
        for number, (width, out) in enumerate(itertools.pairwise(self.widths)):
            linear = nn.Linear(width, out)
            with torch.no_grad():
                linear.weight.copy_(normal(Key(seed, ("weights", number)), (out, width)) / math.sqrt(width))
                linear.bias.zero_()
            layers += [linear, nn.Tanh()]
        return nn.Sequential(*layers[:-1])


def regression(key: Key, rows: int) -> tuple[Tensor, Tensor]:
    """Inputs in a rotated frame, 32, with standard deviations from 1 to 0.01; targets, 8."""
    world = Key(7, ("regression",))
    rotation = torch.linalg.qr(normal(world.fold("rotation"), (32, 32)))[0]
    whitened = normal(key, (rows, 32))
    hidden = torch.tanh(whitened @ normal(world.fold("first"), (32, 16)) / math.sqrt(32))
    y = hidden @ normal(world.fold("second"), (16, 8)) / math.sqrt(16)
    return 1 + whitened * torch.logspace(0, -2, 32) @ rotation, y


def dots(key: Key, rows: int) -> tuple[Tensor, Tensor]:
    """Images of 12 x 12, (rows, 144), as inputs and targets."""
    centres = 1.5 + 8 * uniform(key, (rows, 3, 2, 1))
    places = torch.arange(12.0)
    x, y = (places - centres[:, :, 0]).square(), (places - centres[:, :, 1]).square()
    images = torch.exp(-(x[:, :, :, None] + y[:, :, None, :]) / 5).sum(1).flatten(1)
    return images, images


PROBLEMS = {
    "regression": Problem((32, 64, 64, 8), 128, 300, regression),
    "autoencoder": Problem((144, 64, 32, 8, 32, 64, 144), 128, 300, dots),
}


def learning_rate(lr: float, done: int, steps: int) -> float:
    """Of a step, from 0: the schedule of `quality_runs`."""
    warm = max(1, round(0.05 * steps))
    if done < warm:
        return lr * (done + 1) / warm
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (done - warm) / max(1, steps - warm))))


def train(
    name: str, problem: Problem, seed: int, lr: float, settings: dict[str, Any], steps: int
) -> list[dict[str, Any]]:
    """Train a contestant; returns a row for each evaluation, and ends early where the loss is lost."""
    network = problem.network(seed)
    optimizer = new_optimizer(name, network, lr=lr, steps=steps, **settings)
    x, y = problem.sample(Key(0, ("evaluation",)), 1024)
    interval, spent = max(1, steps // EVALUATIONS), 0.0
    rows: list[dict[str, Any]] = []
    for done in range(steps + 1):
        if done % interval == 0 or done == steps:
            with torch.no_grad():
                loss = float(F.mse_loss(network(x), y))
            rows.append({"step": done, "loss": loss if math.isfinite(loss) else math.inf, "seconds": spent})
            if done == steps or not loss < 1e6:
                break
        inputs, targets = problem.sample(Key(seed, ("training", done)), problem.batch)
        started = time.process_time()
        loss_now = F.mse_loss(network(inputs), targets)
        loss_now.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, done, steps)
        step(optimizer, loss_now)
        optimizer.zero_grad()
        spent += time.process_time() - started
    return [{**row, "switched_at": switched_at(optimizer)} for row in rows]


def tuned(run: Callable[[float], list[dict[str, Any]]], first: float) -> dict[float, list[dict[str, Any]]]:
    """Run at rates of `LR_GRID` until that of the lowest final loss has both neighbours; returns the runs."""
    runs: dict[float, list[dict[str, Any]]] = {}
    wanted = [first]
    while wanted:
        for lr in wanted:
            runs[lr] = run(lr)
        place = LR_GRID.index(best_rate(runs))
        wanted = [lr for lr in LR_GRID[max(0, place - 1) : place + 2] if lr not in runs]
    return runs


def best_rate(runs: dict[float, list[dict[str, Any]]]) -> float:
    """The rate with the lowest final loss, of equal ones the lowest."""
    return min(sorted(runs), key=lambda lr: runs[lr][-1]["loss"])


def contestant(
    name: str, title: str, settings: dict[str, Any], seeds: Sequence[int], steps: int | None
) -> list[dict[str, Any]]:
    """All rows of a contestant: tuned with the first seed, then with the others."""
    rows: list[dict[str, Any]] = []
    for title_, problem in PROBLEMS.items():
        length = steps or problem.steps

        def run(
            lr: float, seed: int, problem: Problem = problem, length: int = length
        ) -> list[dict[str, Any]]:
            return train(name, problem, seed, lr, settings, length)

        inner = CONTESTANTS[name].inner
        runs = tuned(lambda lr: run(lr, seeds[0]), FIRST_LR.get(name, FIRST_LR[inner]))
        best = best_rate(runs)
        found = [(seeds[0], lr, rows_ if lr == best else rows_[-1:]) for lr, rows_ in sorted(runs.items())]
        found += [(seed, best, run(best, seed)) for seed in seeds[1:]]
        for seed, lr, rows_ in found:
            head = {
                "problem": title_,
                "arm": name,
                "settings": title,
                "seed": seed,
                "lr": lr,
                "tuned": int(lr == best),
            }
            rows += [{**head, **row} for row in rows_]
        finals = [rows_[-1]["loss"] for _, lr, rows_ in found if lr == best]
        seconds = found[-1][2][-1]["seconds"]
        print(
            f"{title_:>12} {name:>16} {title:<22} lr {best:<6g} of {len(runs)}: "
            f"{' '.join(f'{loss:.5f}' for loss in finals)}, {1e3 * seconds / length:.2f} ms a step",
            flush=True,
        )
    return rows


def formula() -> list[dict[str, Any]]:
    """Largest entry of M, and distance of M F from the identity, under both formulas, also with blends."""
    size, gamma, updates = 32, 0.95, 200
    rows: list[dict[str, Any]] = []
    for name, threshold in itertools.product(("sherman_morrison", "printed"), (math.inf, 10.0)):
        for dtype in (torch.float32, torch.float64):
            m = DenseInverse(size, dtype, formula=name)
            factor = torch.eye(size, dtype=torch.float64)
            for update in range(1, updates + 1):
                v = normal(Key(3, ("formula", update)), (size,))
                m.stabilize(threshold, 0.9)
                if threshold == math.inf:
                    factor = gamma * factor + (1 - gamma) * torch.outer(v.double(), v.double())
                m.update(v.to(dtype), gamma)
                if update in (1, 2, 5, 10, 20, 50, 100, 150, 200):
                    residual = (m.m.double() @ factor - torch.eye(size)).abs().max()
                    rows.append({
                        "formula": name, "threshold": threshold, "dtype": str(dtype).removeprefix("torch."),
                        "size": size, "gamma": gamma, "update": update, "largest": float(m.m.abs().max()),
                        "residual": float(residual) if threshold == math.inf else "",
                        "blends": int(m.hits),
                    })  # fmt: skip
    return rows


def main() -> int:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description="Compare MKOR with other optimizers on small problems.")
    parser.add_argument("command", choices=("compare", "settings", "formula"))
    parser.add_argument("--arms", nargs="+", choices=tuple(CONTESTANTS), default=None)
    parser.add_argument("--only", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: of the problem")
    parser.add_argument("--output", type=Path, default=DATA)
    args = parser.parse_args()
    common, rows = conditions(CPU), []
    if args.command == "formula":
        rows = formula()
    elif args.command == "compare":
        for name in args.arms or CONTESTANTS:
            rows += contestant(name, "", {}, args.seeds, args.steps)
    else:
        arms = args.arms or ("mkor_right",)
        for name, title in itertools.product(arms, args.only):
            rows += contestant(name, title, SETTINGS[title], args.seeds, args.steps)
    target = {"compare": "mkor_problems", "settings": "mkor_settings", "formula": "mkor_formula"}
    path = write_csv(target[args.command], [{**row, **common} for row in rows], args.output, CPU)
    print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
