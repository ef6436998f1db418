"""Training runs that compare the quality of techniques at equal tokens: the run, the arms, the CSV, the CLI.

A script makes a `Comparison` and hands it to `main`. Parameters are fp32; on a GPU the products run under
autocast in bf16. AdamW (0.9, 0.95), weight decay 0.1 on matrices, gradients clipped to norm 1, learning rate
with warm-up over 5 % and a cosine to a tenth: the same in all arms.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import DATA, ROOT, conditions, device_name, write_csv
from quality_model import GPT, SIZES, Size, Text, new_model, prepare, token_files
from torch import Tensor, nn

WEIGHT_DECAY = 0.1


class Run:
    """One arm with one seed; a technique's run changes the model in `change_model`.

    Args:
        arm: of the comparison.
        seed: of weights, random choices and order.
        size: of the model; its steps and learning rate are used.
        text: tokens.
        device: where to train.
    """

    def __init__(self, arm: str, seed: int, size: Size, text: Text, device: torch.device) -> None:
        self.arm, self.seed, self.size, self.text, self.device = arm, seed, size, text, device
        self.model: GPT = new_model(size, seed, device)
        self.order = text.order(seed)
        self.change_model()
        self.optimizer = self._new_optimizer()

    def change_model(self) -> None:
        """Make of the model what the arm trains."""

    def before_step(self, step: int) -> None:
        """Act before a step, from 0."""

    def after_step(self, step: int) -> None:
        """Act after the optimizer's step."""

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

    def backward(self, ids: Tensor) -> Tensor:
        """Leave the gradient of a batch in the parameters; returns its loss."""
        loss = self.loss(ids)
        loss.backward()
        return loss

    def step(self, step: int) -> Tensor:
        """Train one step; returns its loss."""
        self.before_step(step)
        loss = self.backward(self.text.batch(self.order, step))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_step(step)
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


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        technique: its name in text.
        name: beginning of the file's name, and with several learning rates.
        arms: in the order of training.
        base: the arm that gaps are to.
        new_run: makes a run of (arm, seed, size, text, device).
    """

    technique: str
    name: tuple[str, str]
    arms: tuple[str, ...]
    base: str
    new_run: Callable[[str, int, Size, Text, torch.device], Run]


def run_all(
    comparison: Comparison, args: argparse.Namespace, size: Size, device: torch.device
) -> list[dict[str, Any]]:
    """Train the arms seed by seed until the time is up; the file is written after each."""
    text, common = Text(args.tokens, size, device), conditions(device)
    name = comparison.name[len(args.lr or []) > 1]
    rows, longest, begin = kept_rows(name, args, device), 0.0, time.perf_counter()
    interval = args.interval or max(1, size.steps // 10)
    for seed, lr, arm in itertools.product(args.seeds, args.lr or [size.lr], args.arms):
        size = dataclasses.replace(size, lr=lr)
        started = time.perf_counter()
        if started - begin + longest > 60 * args.minutes:
            print(f"time is up: {arm} with seed {seed} and what follows is left out")
            return rows
        run = comparison.new_run(arm, seed, size, text, device)
        new = run.train(interval)
        parameters = sum(p.numel() for p in run.model.parameters())
        head = {"size": args.size, "arm": arm, "seed": seed, "lr": lr, "parameters": parameters}
        rows = [row for row in rows if (row["arm"], *map(float, (row["seed"], row["lr"]))) != (arm, seed, lr)]
        rows += [{**head, **row, **common} for row in new]
        write_csv(f"{name}_{args.size}", rows, args.output, device)
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


def kept_rows(name: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the file as it is, with --append."""
    path = args.output / f"{name}_{args.size}_{device_name(device).replace(' ', '_')}.csv"
    if not args.append or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(comparison: Comparison, rows: Sequence[dict[str, Any]]) -> str:
    """Final losses of the arms, and their gaps to the base with the same seed."""
    base = comparison.base
    final = {(float(row["lr"]), row["arm"], str(row["seed"])): float(row["valid_loss"]) for row in rows}
    lines = [f"{'arm':>17}  {'lr':>6}  seeds  validation loss (mean +- s)     gap to {base} (mean +- s)"]
    for lr, arm in itertools.product(sorted({lr for lr, _, _ in final}), comparison.arms):
        found = {seed: loss for (rate, name, seed), loss in final.items() if (rate, name) == (lr, arm)}
        gaps = [loss - final[lr, base, seed] for seed, loss in found.items() if (lr, base, seed) in final]
        if found:
            losses = _spread(list(found.values()))
            lines.append(f"{arm:>17}  {lr:>6g}  {len(found):>5}  {losses:<30}  {_spread(gaps)}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):+.4f} +- {deviation:.4f}"


def parse(comparison: Comparison) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=f"Compare the quality of {comparison.technique} at equal tokens."
    )
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
    sub.add_argument("--arms", nargs="+", choices=comparison.arms, default=comparison.arms)
    sub.add_argument("--seeds", nargs="+", type=int, default=[0])
    sub.add_argument("--steps", type=int, help="default: of the size")
    sub.add_argument("--batch", type=int, help="tokens a step; default: of the size")
    sub.add_argument("--lr", type=float, nargs="+", help="default: of the size; several: another file")
    sub.add_argument("--interval", type=int, help="steps between evaluations; default: a tenth of the steps")
    sub.add_argument("--minutes", type=float, default=math.inf, help="begin no arm that would end later")
    sub.add_argument("--append", action="store_true", help="keep the arms that the file has")
    sub.add_argument("--output", type=Path, default=DATA)
    return parser.parse_args()


def main(comparison: Comparison) -> int:
    """Prepare the text, or train, print and write the CSV."""
    args = parse(comparison)
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
    print(summary(comparison, run_all(comparison, args, size, torch.device(args.device))))
    return 0
