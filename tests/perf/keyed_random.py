"""Speed of the keyed random numbers against torch's generators and the bandwidth floor, in one run.

``python tests/perf/keyed_random.py [--device cuda] [--output docs/results/data]`` prints a table and writes
``keyed_random_<device name>.csv``. Floor: writing the result once at the bandwidth of a device-to-device copy
measured in the same run. Times are medians.
"""

from __future__ import annotations

import argparse
import csv
import functools
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from ds_efficient.ops import keyed_random as kr  # noqa: E402

COLUMNS = (
    "op", "dtype", "shape", "milliseconds", "competitor", "competitor_milliseconds", "speedup",
    "floor_milliseconds", "fraction_of_floor", "device", "torch", "cuda", "python", "commit", "command",
)  # fmt: skip


def median_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of one call in milliseconds; CUDA events around single calls, after warm-up."""
    for _ in range(3):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < end:
        if device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(200_000)  # the host is ahead: launch overhead is not part of the time
            first.record()
            call()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes a millisecond of a copy, read and written bytes counted."""
    source = torch.empty(1 << (28 if device.type == "cuda" else 25), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), device, seconds)


def measure(device: torch.device, seconds: float) -> list[dict[str, object]]:
    """One row for each op, dtype and size."""
    rate = bandwidth(device, seconds)
    sizes = (1 << 20, 1 << 24, 1 << 28) if device.type == "cuda" else (1 << 20, 1 << 23)
    rows: list[dict[str, object]] = []

    def add(
        op: str, dtype: torch.dtype, shape: str, size: int, ours: Callable, name: str, other: Callable
    ) -> None:
        mine, theirs = median_ms(ours, device, seconds), median_ms(other, device, seconds)
        floor = size / rate
        rows.append(
            {
                "op": op, "dtype": str(dtype).removeprefix("torch."), "shape": shape, "milliseconds": mine,
                "competitor": name, "competitor_milliseconds": theirs, "speedup": theirs / mine,
                "floor_milliseconds": floor, "fraction_of_floor": floor / mine,
            }
        )  # fmt: skip
        print(
            f"{op:>8} {rows[-1]['dtype']:>9} {shape:>16}: {mine:9.4f} ms, {name} {theirs:9.4f} ms, "
            f"speed-up {theirs / mine:5.2f}, {100 * floor / mine:5.1f} % of the floor's speed",
            flush=True,
        )

    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            buffer = torch.empty(size, dtype=dtype, device=device)
            for op, draw, other in (
                ("uniform", kr.uniform, buffer.uniform_),
                ("normal", kr.normal, buffer.normal_),
            ):
                ours = functools.partial(draw, 1, size, dtype=dtype, device=device)
                add(op, dtype, str(size), buffer.nbytes, ours, f"Tensor.{op}_", other)
        words = torch.empty(size, dtype=torch.int32, device=device)
        ours = functools.partial(kr.random_bits, 1, size, device=device)
        add("bits", torch.int32, str(size), words.nbytes, ours, "Tensor.random_", words.random_)
    for batch, n, k in ((8, 2048, 1024), (4, 4096, 2048), (64, 2048, 512), (1, 1 << 20, 1 << 19)):
        ours = functools.partial(kr.sample_k_of_n, 1, n, k, batch=batch, device=device)
        other = functools.partial(by_sorting, batch, n, k, device)
        add("choice", torch.int64, f"{batch}x{k} of {n}", 8 * batch * k, ours, "rand.argsort.sort", other)
    return rows


def by_sorting(batch: int, n: int, k: int, device: torch.device) -> torch.Tensor:
    """The usual way to choose k of n: sort random numbers."""
    return torch.rand(batch, n, device=device).argsort(dim=1)[:, :k].sort(dim=1).values


def main() -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description="Benchmark the keyed random numbers.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "data")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    common = {
        "device": name, "torch": torch.__version__, "cuda": torch.version.cuda or "",
        "python": platform.python_version(), "commit": commit.stdout.strip() or "unknown",
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    rows = [{**row, **common} for row in measure(device, args.seconds)]
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"keyed_random_{name.replace(' ', '_')}.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
