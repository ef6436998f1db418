"""Speed of the rank-1 updates of inverse factors against the memory floor, plain torch and a matrix inverse.

``python tests/perf/mkor_kernels.py [--output docs/results/data]`` prints a table and writes
``mkor_updates_<device name>.csv``. On a GPU: d = 1024 .. 20480, and 96 factors of 1024 in one call; on the
CPU smaller ones. Floor: every matrix read and written once, at the bandwidth of a copy measured in the same
run. Factors smaller than the cache are updated in turn with others, so that nothing is found in the L2 cache
of a GPU. Times are medians of CUDA events around eight calls, which follow each other as the kernels of a
training step do; on the CPU the processor's time a thread.

Columns: ``plain_torch`` is the same formula written with torch (matrix-vector product, rank-1 `addr_`, one
factor after another) with the largest entry as a second step; ``inverse`` is `torch.linalg.inv` of one factor
in float32, what K-FAC computes in place of the update.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import benchmark, copy_rate, host_ms, median_ms, medians_in_turns
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from ds_efficient.core.keys import Key  # noqa: E402
from ds_efficient.ops import keyed_random, mkor  # noqa: E402

CASES = {
    "cuda": ((1, 1024), (1, 2048), (1, 4096), (1, 8192), (1, 16384), (1, 20480), (96, 1024), (24, 4096)),
    "cpu": ((1, 256), (1, 1024), (1, 2048), (1, 4096), (24, 256), (24, 1024)),
}
LARGEST_INVERSE = {"cuda": 16384, "cpu": 2048}
ROTATION = 160 << 20  # bytes of all copies together: three times the L2 cache of an H100
GAMMA, THRESHOLD, ZETA = 0.95, 10.0, 0.9
TOGETHER = 8  # calls between two events
KEY = Key(4).fold("mkor_kernels")


class Updates:
    """Sets of factors, updated in turn.

    Args:
        count, size, dtype: of the factors of a set.
        device: where they are.
    """

    def __init__(self, count: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        nbytes = count * size * size * dtype.itemsize
        copies = max(1, ROTATION // nbytes) if device.type == "cuda" else 1
        one = torch.eye(size, dtype=dtype, device=device)
        self.sets = [[one.clone() for _ in range(count)] for _ in range(copies)]
        self.vectors = keyed_random.normal(KEY, (count * size,), device=device)
        self.largest = [torch.ones(count, device=device) for _ in range(copies)]
        self._turn = itertools.cycle(range(copies))

    def compiled(self) -> Tensor:
        """Update the next set with the kernels."""
        turn = next(self._turn)
        return mkor.update_(
            self.sets[turn], self.vectors, self.largest[turn],
            gamma=GAMMA, threshold=THRESHOLD, zeta=ZETA, backend="native",
        )  # fmt: skip

    def plain(self) -> None:
        """Update the next set with torch, the decision about the blend left out."""
        turn = next(self._turn)
        matrices = self.sets[turn]
        vectors = self.vectors.to(matrices[0].dtype).split([len(matrix) for matrix in matrices])
        for index, (matrix, vector) in enumerate(zip(matrices, vectors, strict=True)):
            u = matrix @ vector
            scale = (1 - GAMMA) / (GAMMA * (GAMMA + (1 - GAMMA) * (u @ vector)))
            matrix.addr_(u * scale, u, beta=1 / GAMMA, alpha=-1)
            self.largest[turn][index] = torch.linalg.vector_norm(matrix, torch.inf)


def measure_case(
    count: int, size: int, dtype: torch.dtype, rate: float, device: torch.device
) -> dict[str, Any]:
    """One row."""
    updates = Updates(count, size, dtype, device)
    calls: dict[str, Callable[[], object]] = {"compiled": updates.compiled, "plain": updates.plain}
    times = medians_in_turns(calls, device)
    if device.type == "cuda":
        times["compiled"] = median_ms([updates.compiled], 20, together=TOGETHER)
    host = host_ms(updates.compiled, device)
    elements, element = count * size * size, dtype.itemsize
    del updates, calls
    inverse: float | str = ""
    if count == 1 and size <= LARGEST_INVERSE[device.type] and dtype == torch.float32:
        half = keyed_random.normal(KEY, (size, size), device=device)
        matrix = half @ half.T / size + torch.eye(size, device=device)
        found = medians_in_turns({"inv": lambda: torch.linalg.inv(matrix)}, device, blocks=3, repeat=2)
        inverse = found["inv"]
    floor, ours = 2 * elements * element / rate, times["compiled"]
    return {
        "factors": count, "size": size, "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": ours, "floor_milliseconds": floor, "times_the_floor": ours / floor,
        "host_milliseconds": host,
        "plain_torch_milliseconds": times["plain"], "speedup_over_plain_torch": times["plain"] / ours,
        "inverse_milliseconds": inverse,
        "speedup_over_inverse": inverse / ours if isinstance(inverse, float) else "",
    }  # fmt: skip


def measure(device: torch.device) -> Iterator[dict[str, Any]]:
    """All rows."""
    rate = copy_rate(device, together=TOGETHER)
    print(f"copy: {rate / 1e6:.1f} GB/s, read and written bytes counted")
    for dtype in mkor.DTYPES:
        for count, size in CASES[device.type]:
            yield measure_case(count, size, dtype, rate, device)


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    inverse = row["inverse_milliseconds"]
    print(
        f"{row['factors']:3} x {row['size']:5} {row['dtype']:>8}: {row['milliseconds']:8.4f} ms, "
        f"{row['times_the_floor']:5.2f} x the floor, plain torch {row['plain_torch_milliseconds']:8.4f}"
        + (f", inverse {inverse:9.3f}" if isinstance(inverse, float) else ""),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(
        benchmark("mkor_updates", "Benchmark the rank-1 updates of inverse factors.", measure, show, cpu=True)
    )
