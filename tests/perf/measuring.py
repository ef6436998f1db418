"""What the measurements share: conditions of a run, medians of times taken in turns, CSV files."""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "results" / "data"


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def conditions(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and command: the columns that close each row."""
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or found.stdout.strip() or "unknown",
        "command": command(),
    }


def command() -> str:
    """The command line as anybody would repeat it: without the output's folder, paths from the root on."""
    words = ["python", *sys.argv]
    if "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    return shlex.join(word.replace(f"{ROOT}/", "") for word in words)


def write_csv(name: str, rows: Sequence[Mapping[str, Any]], folder: Path, device: torch.device) -> Path:
    """Write ``<name>_<device>.csv``; the columns are those of all rows in the order of appearance."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{device_name(device).replace(' ', '_')}.csv"
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    return path


def times_ms(call: Callable[[], object], repeat: int, device: torch.device) -> list[float]:
    """Milliseconds of single calls: on a GPU by events, with the host running ahead.

    On the CPU it is the processor's time a thread: the wall clock would count what other programs take.
    """
    if device.type != "cuda":
        found = []
        for _ in range(repeat):
            start = time.process_time()
            call()
            found.append(1e3 * (time.process_time() - start) / torch.get_num_threads())
        return found
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)
    ]
    torch.cuda._sleep(2_000_000)
    for first, last in events:
        first.record()
        call()
        last.record()
    torch.cuda.synchronize(device)
    return [first.elapsed_time(last) for first, last in events]


def median_ms(calls: Sequence[Callable[[], object]], repeat: int, *, together: int = 1) -> float:
    """Median milliseconds of one call on a GPU, going round the calls, with the host running ahead.

    Args:
        calls: the same work on different memory, so that nothing is found in the L2 cache.
        repeat: pairs of events.
        together: calls between two events. One call alone also counts the start of a kernel on an idle GPU
            and its end, some microseconds that a stream of kernels hides in part.
    """
    for call in calls:
        call()
    turn = itertools.cycle(calls)
    times: list[float] = []
    for _ in range(repeat):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(400_000 * (1 + together))  # 0.2 ms a call: the host's time is not part of it
        first.record()
        for _ in range(together):
            next(turn)()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / together)
    return statistics.median(times)


def copy_rate(device: torch.device | None = None, *, together: int = 1) -> float:
    """Bytes a millisecond of a copy within a device's memory, read and written bytes counted.

    Args:
        device: None: the GPU.
        together: as in `median_ms`, on a GPU.
    """
    place = device or torch.device("cuda")
    source = torch.ones(1 << (29 if place.type == "cuda" else 27), dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    if place.type == "cuda":
        return 2 * source.nbytes / median_ms([lambda: target.copy_(source)], 20, together=together)
    return 2 * source.nbytes / medians_in_turns({"copy": lambda: target.copy_(source)}, place)["copy"]


def host_ms(call: Callable[[], object], device: torch.device) -> float | str:
    """Milliseconds that the host needs to queue a call: the best of ten rounds; empty on the CPU."""
    if device.type != "cuda":
        return ""
    rounds = []
    for _ in range(10):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        rounds.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize(device)
    return min(rounds)


def medians_in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, blocks: int = 5, repeat: int = 5
) -> dict[str, float]:
    """Median milliseconds of each call over ``blocks`` turns of ``repeat`` calls each.

    In turns, because a GPU's clock follows its temperature and its load.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        times_ms(call, 2, device)
    for _ in range(blocks):
        for name, call in calls.items():
            found[name] += times_ms(call, repeat, device)
    return {name: statistics.median(times) for name, times in found.items()}


def benchmark(
    name: str,
    description: str,
    measure: Callable[[torch.device], Iterable[dict[str, Any]]],
    show: Callable[[dict[str, Any]], None],
    *,
    cpu: bool = False,
) -> int:
    """Do what a script of kernels does: read the command line, measure, print, write the CSV.

    Args:
        name: beginning of the file's name.
        description: of the script, for its help.
        measure: yields rows.
        show: prints one.
        cpu: whether there is something to measure without a GPU.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=DATA)
    if cpu:
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    kind = args.device if cpu else "cuda"
    if kind == "cuda" and not torch.cuda.is_available():
        print("no CUDA device" + ("; --device cpu measures the C++ code" if cpu else ""), file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    common, rows = conditions(device), []
    for row in measure(device):
        show(row)
        rows.append({**row, **common})
    print(f"wrote {write_csv(name, rows, args.output, device)}")
    return 0
