"""Throughput, MFU and peak memory of whole steps of ``launch/pretrain_gpt.py`` on synthetic data.

    python tests/perf/training_step.py --output docs/results/data [--cases 354m-plain ...] [--gpus 2]

Each case is one run of the script; the first interval (compilation, warm-up) is left out and the median of
the others is taken. One CSV row a case, with GPU, versions, commit and command; ratios against the first
case with the same model are printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

MODELS = {
    "354m": "--num-layers 24 --hidden-size 1024 --num-attention-heads 16",
    "1.3b": "--num-layers 24 --hidden-size 2048 --num-attention-heads 16",
    "4096x4": "--num-layers 4 --hidden-size 4096 --num-attention-heads 32",
    "4096x8": "--num-layers 8 --hidden-size 4096 --num-attention-heads 32",
    "tiny": "--num-layers 2 --hidden-size 64 --num-attention-heads 4",
}
NO_FUSION = "--no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-cross-entropy-fusion"


@dataclass(frozen=True)
class Case:
    """One run: model, samples a pass, optimizer parameters, arguments, the config's technique sections."""

    model: str
    micro: int
    fused_adam: bool
    arguments: str = ""
    zero: int = 1
    sections: dict[str, Any] = field(default_factory=dict)


SLOPE = {"slope": {"enabled": True}}
RMM = {"rmm": {"enabled": True}}
# A first plan halfway, so that a short run trains under one.
LGRECO = {"lgreco": {"enabled": True, "interval": 15}}
LGRECO_QSGD = {
    "lgreco": {"enabled": True, "interval": 15, "compressor": "qsgd", "default": 4, "range": [2, 8]}
}
MKOR = {"mkor": {"enabled": True, "form": "factored", "max_rank": 128}}
CASES = {
    "354m-plain": Case("354m", 8, False, NO_FUSION),
    "354m-fused": Case("354m", 8, True),
    "354m-plain-16": Case("354m", 16, False, NO_FUSION),
    "354m-fused-16": Case("354m", 16, True),
    "1.3b-plain": Case("1.3b", 8, False, NO_FUSION),
    "1.3b-adam": Case("1.3b", 8, True, NO_FUSION),
    "1.3b-fused": Case("1.3b", 8, True),
    "1.3b-fused-recompute-16": Case(
        "1.3b", 16, True, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
    "1.3b-slope": Case("1.3b", 8, True, sections=SLOPE),
    "4096x4-dense": Case("4096x4", 4, True),
    "4096x4-slope": Case("4096x4", 4, True, sections=SLOPE),
    "4096x8-dense": Case("4096x8", 4, True),
    "4096x8-slope": Case("4096x8", 4, True, sections=SLOPE),
    "1.3b-fused-12": Case("1.3b", 12, True),
    "1.3b-fused-16": Case("1.3b", 16, True),
    "1.3b-rmm": Case("1.3b", 8, True, sections=RMM),
    "1.3b-rmm-16": Case("1.3b", 16, True, sections=RMM),
    "1.3b-mkor": Case("1.3b", 8, True, sections=MKOR),
    "1.3b-mkor-right": Case("1.3b", 8, True, sections={"mkor": {**MKOR["mkor"], "sides": "right"}}),
    "1.3b-mkor-dense": Case("1.3b", 8, True, sections={"mkor": {"enabled": True}}),
    "354m-lgreco": Case("354m", 8, True, sections=LGRECO),
    "354m-lgreco-qsgd": Case("354m", 8, True, sections=LGRECO_QSGD),
    "1.3b-lgreco": Case("1.3b", 8, True, sections=LGRECO),
    "1.3b-lgreco-qsgd": Case("1.3b", 8, True, sections=LGRECO_QSGD),
    "tiny": Case("tiny", 2, False),
    "tiny-lgreco": Case("tiny", 2, False, sections=LGRECO),
    "tiny-mkor": Case("tiny", 2, False, sections={"mkor": {**MKOR["mkor"], "max_rank": 4}}),
    "tiny-rmm": Case("tiny", 2, False, sections=RMM),
    "tiny-slope": Case("tiny", 2, False, sections=SLOPE),
}


def command(case: Case, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Return the command line of a case; writes its DeepSpeed config."""
    # "fused": false would choose torch's loop over tensors; leaving it out is torch's default (foreach).
    params = {"torch_adam": True, **({"fused": True} if case.fused_adam else {})}
    config = {
        "optimizer": {"type": "AdamW", "params": params},
        "zero_optimization": {"stage": case.zero},
        "bf16": {"enabled": not arguments.fp32},
        **case.sections,
    }
    (folder / "ds.json").write_text(json.dumps(config))
    length, vocabulary = (64, 256) if case.model == "tiny" else (2048, 50304)
    launcher = [sys.executable, "launch/pretrain_gpt.py"]
    if arguments.gpus > 1:
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(arguments.gpus), "launch/pretrain_gpt.py"),
        ]
    return [
        *launcher,
        *f"--deepspeed_config {folder / 'ds.json'} --mock-data --vocab-size {vocabulary}".split(),
        *f"--seq-length {length} --position-embedding-type rope".split(),
        *f"--attention-dropout 0 --hidden-dropout 0 --lr 1e-4 --micro-batch-size {case.micro}".split(),
        *f"--train-iters {arguments.steps} --log-interval {arguments.interval} --eval-iters 0".split(),
        *f"--run-dir {folder} --num-workers 2".split(),
        *MODELS[case.model].split(),
        *case.arguments.split(),
        *arguments.extra,
    ]


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one case; return its CSV row, with ``error`` where it failed."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        argv = command(case, folder, arguments)
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=arguments.timeout)
        path = folder / "run.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    run = next((record for record in records if record["kind"] == "run"), {})
    steady = [record for record in records if record["kind"] == "train"][1:]
    row: dict[str, Any] = {"case": name, "gpus": arguments.gpus, "micro_batch": case.micro, "zero": case.zero}
    row |= {"gpu": run.get("gpu"), **run.get("versions", {})}
    shown = [
        word
        for word in argv[argv.index("--deepspeed_config") + 2 :]
        if word not in ("--run-dir", str(folder))
    ]
    row |= {"commit": commit(), "command": " ".join(shown)}
    if done.returncode != 0 or not steady:
        lines = (done.stderr or done.stdout).strip().splitlines()
        memory = [line for line in lines if "out of memory" in line.lower()]
        return row | {"error": (memory or lines or ["no output"])[-1][:300]}
    for metric in ("tokens_per_second", "model_tflops", "mfu", "peak_memory"):
        values = [record[metric] for record in steady if record[metric] is not None]
        row[metric] = statistics.median(values) if values else None
    tokens = steady[-1]["tokens"] / steady[-1]["step"]
    row["ms_per_step"] = 1000.0 * tokens / row["tokens_per_second"]
    row["last_loss"] = steady[-1]["loss"]
    evidence = next((record for record in records if record["kind"] == "evidence"), {})
    row["evidence"] = "; ".join(f"{name}: {evidence[name]['summary']}" for name in case.sections)
    if "lgreco" in case.sections:
        row |= {name: steady[-1]["lgreco"][name] for name in ("bytes", "raw_bytes")}
    return row


def commit() -> str:
    """Return the commit measured, or what COMMIT says where there is no git."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("COMMIT") or found.stdout.strip() or "unknown"


def main() -> int:
    """Run the cases and write the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=sorted(CASES), default=[c for c in CASES if c != "tiny"]
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/data")
    parser.add_argument("--name", default="training_step", help="name of the CSV file")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a case")
    parser.add_argument("--fp32", action="store_true", help="for a trial without a GPU")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="added to each command")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    first: dict[str, dict[str, Any]] = {}
    for name in arguments.cases:
        row = measure(name, arguments)
        rows.append(row)
        write(arguments.output / f"{arguments.name}.csv", rows)  # a run that is stopped keeps what it has
        if "error" in row:
            print(f"{name}: failed: {row['error']}", flush=True)
            continue
        base = first.setdefault(CASES[name].model, row)
        print(
            f"{name}: {row['ms_per_step']:.1f} ms, {row['tokens_per_second']:.0f} tok/s "
            f"({row['tokens_per_second'] / base['tokens_per_second']:.2f}x of {base['case']}), "
            f"{row['model_tflops']:.1f} TFLOP/s, MFU {row['mfu']}, "
            f"peak {row['peak_memory'] / 2**30:.1f} GiB, loss {row['last_loss']:.4f}",
            flush=True,
        )
    return int(any("error" in row for row in rows))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
