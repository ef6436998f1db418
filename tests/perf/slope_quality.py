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

Parameters are fp32; on a GPU the products run under autocast in bf16. AdamW (0.9, 0.95), weight decay 0.1 on
matrices, gradients clipped to norm 1, learning rate with warm-up over 5 % and a cosine to a tenth: the same
in all arms.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import DATA, ROOT, conditions, device_name, write_csv
from quality_model import GPT, SIZES, Size, Text, new_model, prepare, replace_linears, token_files
from torch import Tensor, nn

from ds_efficient.core.keys import Key
from ds_efficient.slope.linear import SlopeLinear

ARMS = ("dense", "slope", "slope_adapters", "slope_adapters10", "srste")
ADAPTER_FRACTION = {"slope_adapters": 0.01, "slope_adapters10": 0.10}
COLUMN_MASK_INTERVAL = 100
PRUNED_DECAY = 2e-4
WEIGHT_DECAY = 0.1


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


class Run:
    """One arm with one seed.

    Args:
        arm: of `ARMS`.
        seed: of weights, masks and order.
        size: of the model; its steps and learning rate are used.
        text: tokens.
        device: where to train.
    """

    def __init__(self, arm: str, seed: int, size: Size, text: Text, device: torch.device) -> None:
        self.arm, self.size, self.text, self.device = arm, size, text, device
        self.model: GPT = new_model(size, seed, device)
        self.order = text.order(seed)
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
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.AdamW:
        named = list(self.model.named_parameters())
        decayed = [p for name, p in named if p.dim() == 2 and "adapter" not in name]
        others = [p for name, p in named if p.dim() != 2 or "adapter" in name]
        return torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=self.size.lr, betas=(0.9, 0.95), fused=self.device.type == "cuda",
        )  # fmt: skip

    def learning_rate(self, step: int) -> float:
        """Of a step, from 0."""
        warm = max(1, round(0.05 * self.size.steps))
        if step < warm:
            return self.size.lr * (step + 1) / warm
        done = (step - warm) / max(1, self.size.steps - warm)
        return self.size.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def loss(self, ids: Tensor) -> Tensor:
        """Loss of a batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(ids)

    def step(self, step: int) -> Tensor:
        """Train one step; returns its loss."""
        if step == self.adapter_start:
            for layer in self.sparse:
                layer.activate_adapter()
        loss = self.loss(self.text.batch(self.order, step))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for layer in self.sparse:
            if (step + 1) % COLUMN_MASK_INTERVAL == 0:
                layer.refresh()
            layer.slope.operands.weight_changed()
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation windows."""
        losses = [self.loss(ids) for ids in self.text.validation()]
        return float(torch.stack(losses).mean())

    def train(self, interval: int) -> list[dict[str, Any]]:
        """Train all steps; returns a row for each evaluation. Its seconds are those of training alone."""
        rows: list[dict[str, Any]] = []
        seconds, recent = 0.0, []
        rows.append({"step": 0, "tokens": 0, "valid_loss": self.validate(), "train_loss": "", "seconds": 0.0})
        start = time.perf_counter()
        for step in range(self.size.steps):
            recent.append(self.step(step))
            done = step + 1
            if done % interval and done != self.size.steps:
                continue
            train_loss = float(torch.stack(recent).mean())  # waits for the device
            seconds += time.perf_counter() - start
            tokens = done * self.size.batch * self.size.sequence
            row = {"step": done, "tokens": tokens, "valid_loss": self.validate(), "train_loss": train_loss}
            rows.append({**row, "seconds": seconds})
            recent, start = [], time.perf_counter()
        return rows


def run_all(args: argparse.Namespace, size: Size, device: torch.device) -> list[dict[str, Any]]:
    """Train the arms seed by seed until the time is up; the file is written after each."""
    text, common = Text(args.tokens, size, device), conditions(device)
    rows, longest, begin = kept_rows(args, device), 0.0, time.perf_counter()
    interval = args.interval or max(1, size.steps // 10)
    for seed, lr, arm in itertools.product(args.seeds, args.lr or [size.lr], args.arms):
        size = dataclasses.replace(size, lr=lr)
        started = time.perf_counter()
        if started - begin + longest > 60 * args.minutes:
            print(f"time is up: {arm} with seed {seed} and what follows is left out")
            return rows
        run = Run(arm, seed, size, text, device)
        new = run.train(interval)
        parameters = sum(p.numel() for p in run.model.parameters())
        head = {"size": args.size, "arm": arm, "seed": seed, "lr": lr, "parameters": parameters}
        rows = [row for row in rows if (row["arm"], *map(float, (row["seed"], row["lr"]))) != (arm, seed, lr)]
        rows += [{**head, **row, **common} for row in new]
        write_csv(f"{file_name(args)}_{args.size}", rows, args.output, device)
        first, last = new[1], new[-1]
        # Without the first interval, in which code is compiled and products are tuned.
        pace = (last["tokens"] - first["tokens"]) / max(last["seconds"] - first["seconds"], 1e-9)
        print(
            f"{arm:>17} seed {seed} lr {lr:g}: validation loss {last['valid_loss']:.4f} after "
            f"{last['tokens']:,} tokens, {pace:,.0f} tokens/s, {parameters:,} parameters "
            f"[{time.perf_counter() - started:.0f} s]",
            flush=True,
        )
        longest = max(longest, time.perf_counter() - started)
        del run
    return rows


def file_name(args: argparse.Namespace) -> str:
    """Beginning of the file's name."""
    return "slope_learning_rates" if len(args.lr or []) > 1 else "slope_quality"


def kept_rows(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the file as it is, with --append."""
    path = args.output / f"{file_name(args)}_{args.size}_{device_name(device).replace(' ', '_')}.csv"
    if not args.append or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Final losses of the arms, and their gaps to dense with the same seed."""
    final = {(float(row["lr"]), row["arm"], str(row["seed"])): float(row["valid_loss"]) for row in rows}
    lines = [f"{'arm':>17}  {'lr':>6}  seeds  validation loss (mean +- s)     gap to dense (mean +- s)"]
    for lr, arm in itertools.product(sorted({lr for lr, _, _ in final}), ARMS):
        found = {seed: loss for (rate, name, seed), loss in final.items() if (rate, name) == (lr, arm)}
        gaps = [
            loss - final[lr, "dense", seed] for seed, loss in found.items() if (lr, "dense", seed) in final
        ]
        if found:
            losses = _spread(list(found.values()))
            lines.append(f"{arm:>17}  {lr:>6g}  {len(found):>5}  {losses:<30}  {_spread(gaps)}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):+.4f} +- {deviation:.4f}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the quality of SLoPe at equal tokens.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "run"):
        sub = commands.add_parser(name)
        sub.add_argument("--size", choices=sorted(SIZES), default="tiny")
        sub.add_argument("--tokens", type=Path, default=ROOT / "runs" / "slope_quality", metavar="DIR")
        if name == "prepare":
            sub.add_argument("--train", type=Path, required=True, help='JSON lines with "text", also .xz')
            sub.add_argument("--valid", type=Path, required=True)
            sub.add_argument("--megabytes", type=float, default=30.0, help="of training tokens, 2 bytes each")
    sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sub.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    sub.add_argument("--seeds", nargs="+", type=int, default=[0])
    sub.add_argument("--steps", type=int, help="default: of the size")
    sub.add_argument("--batch", type=int, help="tokens a step; default: of the size")
    sub.add_argument("--lr", type=float, nargs="+", help="default: of the size; several: another file")
    sub.add_argument("--interval", type=int, help="steps between evaluations; default: a tenth of the steps")
    sub.add_argument("--minutes", type=float, default=math.inf, help="begin no arm that would end later")
    sub.add_argument("--append", action="store_true", help="keep the arms that the file has")
    sub.add_argument("--output", type=Path, default=DATA)
    return parser.parse_args()


def main() -> int:
    """Prepare the text, or train, print and write the CSV."""
    args = parse()
    size = SIZES[args.size]
    if args.command == "prepare":
        prepare(args.train, args.valid, args.tokens, size.vocabulary, args.megabytes)
        return 0
    missing = [str(path) for path in token_files(args.tokens, size.vocabulary) if not path.is_file()]
    if missing:
        print(f"missing: {', '.join(missing)}; write them with the command prepare", file=sys.stderr)
        return 2
    size = dataclasses.replace(size, steps=args.steps or size.steps)
    if args.batch:
        size = dataclasses.replace(size, batch=max(1, args.batch // size.sequence))
    print(summary(run_all(args, size, torch.device(args.device))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
