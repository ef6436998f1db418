"""Step time and bytes of a GPT's training over two hosts, with and without compression.

    python tests/perf/lgreco_hosts.py [--rates 1gbit,10gbit] [--arms none lgreco_powersgd ...] [--synthetic]

The hosts are network namespaces of this machine, joined by a veth pair whose ends are shaped to the rate with
tc's token bucket filter: needs root and iproute2, and says why where it cannot be had. They are removed in
the end. One rank a host, one thread a rank, gloo, fp32 gradients. Arms: those of `lgreco_arms`, and
``ddp_powersgd``, torch's DistributedDataParallel with its PowerSGD hook of the same rank. ``none`` is torch's
DistributedDataParallel. A rank trains on few tokens a step, so that the network is what a step waits for.

Writes ``lgreco_hosts_<processor>.csv``, one row a rate and arm: medians over the steps after the warm-up.
``bytes`` are those that the network interface counted, TCP's headers and acknowledgements included;
``planned`` what the plan says; ``processor_ms`` is the rank's own work, ``load`` the machine's: where it is
above the number of cores, steps wait for the processor and ``ms`` says little about the network. Of L-GreCo's
arms one plan is made, after the warm-up; its time and bytes stand by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lgreco_arms import ARMS, Averaging, section
from measuring import DATA, ROOT, conditions, write_csv
from quality_model import GPT, SIZES, Size, Text, new_model, token_files
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import two_hosts
from two_hosts import INTERFACE, HostError, TwoHosts

from ds_efficient.core.keys import Key
from ds_efficient.lgreco.transport import TorchTransport
from ds_efficient.ops.keyed_random import uniform

DDP_ARM = "ddp_powersgd"
MODELS = {"10m": Size(6, 320, 5, 32, 8192, 1, 0, 1e-3, 1, 1), "trial": SIZES["trial"]}
RANK = 8  # of the uniform arm and of torch's hook
CPU = torch.device("cpu")


# ---- one rank ----


def sent_bytes() -> int:
    """Bytes that this host's interface has sent."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def ddp(model: nn.Module, arm: str) -> nn.Module:
    """DistributedDataParallel, with torch's PowerSGD hook for its arm."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    if arm == DDP_ARM:
        # One bucket: of several the hook starts later collectives when earlier ones end, which over gloo is
        # in another order on each rank, and they meet the wrong partner.
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=4096)
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=RANK, start_powerSGD_iter=2, min_compression_rate=1
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return wrapped
    return nn.parallel.DistributedDataParallel(model)


def averaging_of(arm: str, model: GPT, interval: int) -> Averaging | None:
    """What averages the gradients of an arm, None where DDP does."""
    if arm in ("none", DDP_ARM):
        return None
    config = section(arm, RANK)
    assert config is not None
    planned = interval if arm.startswith("lgreco_") else 0
    return Averaging(config, model, [TorchTransport()], Key(0, ("hosts",)), planned)


class Rank:
    """Trains one arm; a step's time, processor time and bytes are noted.

    Args:
        arm: of `ARMS`, or `DDP_ARM`.
        size: of the model.
        text: tokens.
        number: of this rank, of two.
        warm: steps that are not counted; the plan comes after so many.
    """

    def __init__(self, arm: str, size: Size, text: Text, number: int, warm: int) -> None:
        self.model = new_model(size, 0, CPU)
        self.averaging = averaging_of(arm, self.model, warm)
        self.trained = self.model if self.averaging is not None else ddp(self.model, arm)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=size.lr, fused=True)
        self.text, self.order, self.number = text, text.order(0), number

    def step(self, step: int) -> tuple[float, float, float, float]:
        """Train one step; returns milliseconds, those of the processor, bytes sent, and the loss."""
        ids = self.text.batch(self.order, 2 * step + self.number)
        begin, worked, sent = time.perf_counter(), time.process_time(), sent_bytes()
        loss: Tensor = self.trained(ids)
        loss.backward()
        if self.averaging is not None:
            gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            self.averaging.average([gradients], step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        taken = 1e3 * (time.perf_counter() - begin)
        return taken, 1e3 * (time.process_time() - worked), sent_bytes() - sent, float(loss.detach())


def run_arm(arm: str, size: Size, text: Text, number: int, warm: int, steps: int) -> dict[str, Any]:
    """The row of an arm; all ranks have one."""
    rank = Rank(arm, size, text, number, warm)
    found = []
    for step in range(warm + steps):
        if step == warm and rank.averaging is not None:
            rank.averaging.stop_planning()
        found.append(rank.step(step))
    found = found[warm:]
    columns = list(zip(*found, strict=True))
    row: dict[str, Any] = {
        "arm": arm,
        "parameters": sum(p.numel() for p in rank.model.parameters()),
        "tokens": size.batch * size.sequence,
        "steps": steps,
        "ms": statistics.median(columns[0]),
        "ms_least": min(columns[0]),
        "processor_ms": statistics.median(columns[1]),
        "bytes": statistics.median(columns[2]),
        "loss": statistics.mean(columns[3]),
        "load": os.getloadavg()[0],
    }
    if rank.averaging is not None:
        _, plan = rank.averaging.plans[-1]
        row |= {
            "planned": plan.nbytes, "planned_default": plan.default_nbytes, "planned_raw": plan.raw_nbytes,
            "error": plan.error, "budget": plan.budget, "norm": plan.norm,
            "plan_ms": 1e3 * plan.seconds, "plan_bytes": plan.measured_nbytes,
        }  # fmt: skip
    return row


def run_rank(args: argparse.Namespace) -> int:
    """Train all arms as one of two ranks; rank 0 writes the rows."""
    torch.set_num_threads(1)
    address = f"tcp://{args.address}:29400"
    torch.distributed.init_process_group("gloo", init_method=address, rank=args.rank, world_size=2)
    size = MODELS[args.size]
    text = Text(args.tokens, size, CPU)
    rows = []
    for arm in args.arms:
        torch.distributed.barrier()
        rows.append(run_arm(arm, size, text, args.rank, args.warm, args.steps))
        if args.rank == 0:
            print(f"{arm}: {rows[-1]['ms']:.0f} ms", flush=True)
            args.rows.write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()
    return 0


# ---- both hosts ----


def synthetic(folder: Path, size: Size) -> Path:
    """Tokens whose frequencies fall as in text, written where `Text` reads them."""
    for path in token_files(folder, size.vocabulary):
        draws = uniform(Key(0, ("hosts", path.name)), 200 * (size.sequence + 1)).numpy()
        np.save(path, (size.vocabulary**draws - 1).astype(np.uint16))
    return folder


def measure(rate: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of all arms at one rate."""
    rows = folder / "rows.json"
    own = Path(__file__).resolve()
    with TwoHosts(folder / "logs") as hosts:
        hosts.shape(rate)
        common = ["--size", args.size, "--tokens", str(args.tokens), "--arms", *args.arms]
        counts = ["--steps", str(args.steps), "--warm", str(args.warm)]
        place = ["--address", hosts.hosts[0].address, "--rows", str(rows)]
        commands = [
            [sys.executable, str(own), *common, *counts, *place, "--rank", str(rank)] for rank in range(2)
        ]
        hosts.run(commands, timeout=60 * args.minutes)
    return [{"rate": rate, **row} for row in json.loads(rows.read_text())]


def summary(rows: list[dict[str, Any]]) -> str:
    """Lines with the time and the bytes of each arm against none."""
    lines = []
    for row in rows:
        none = next((one for one in rows if one["rate"] == row["rate"] and one["arm"] == "none"), row)
        text = f"{row['rate']:>8} {row['arm']:>16}: {row['ms']:7.1f} ms, {row['bytes'] / 1e6:7.3f} MB"
        text += (
            f", {none['ms'] / row['ms']:5.2f} times as fast, {none['bytes'] / row['bytes']:6.1f} times fewer"
        )
        if row.get("planned"):
            text += f"; default / plan {row['planned_default'] / row['planned']:.2f}"
        lines.append(text)
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Training over two hosts with compressed gradients.")
    parser.add_argument("--rates", default="1gbit,10gbit", help="separated by commas, as tc writes them")
    parser.add_argument("--arms", nargs="+", choices=(DDP_ARM, *ARMS), default=None)
    parser.add_argument("--size", choices=sorted(MODELS), default="10m")
    parser.add_argument("--steps", type=int, default=12, help="counted")
    parser.add_argument("--warm", type=int, default=10, help="not counted")
    parser.add_argument("--tokens", type=Path, default=ROOT / "runs" / "slope_quality", metavar="DIR")
    parser.add_argument("--synthetic", action="store_true", help="made-up tokens in place of --tokens")
    parser.add_argument("--minutes", type=float, default=10.0, help="for one rate")
    parser.add_argument("--output", type=Path, default=DATA)
    for name, kind in (("rank", int), ("address", str), ("rows", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.arms = args.arms or ["none", DDP_ARM, *ARMS[1:]]
    return args


def main(tools: Callable[[], str | None] = two_hosts.why_not) -> int:
    """Measure, print, write the CSV."""
    args = parse()
    if args.rank is not None:
        return run_rank(args)
    reason = tools()
    if reason is not None:
        print(f"skipped: two hosts cannot be made here: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="hosts_") as name:
        folder, size = Path(name), MODELS[args.size]
        if args.synthetic:
            args.tokens = synthetic(folder, size)
        missing = [str(path) for path in token_files(args.tokens, size.vocabulary) if not path.is_file()]
        if missing:
            print(f"missing: {', '.join(missing)}; give --tokens or --synthetic", file=sys.stderr)
            return 2
        rows: list[dict[str, Any]] = []
        try:
            for rate in args.rates.split(","):
                rows += measure(rate, args, folder)
        except HostError as error:
            print(error, file=sys.stderr)
            return 1
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"skipped: tc cannot shape here: {getattr(error, 'stderr', '') or error}")
            return 0
    common = conditions(CPU)
    print(summary(rows))
    path = write_csv("lgreco_hosts", [{"size": args.size, **row, **common} for row in rows], args.output, CPU)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
