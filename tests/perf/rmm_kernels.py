"""Speed of the projections S^T X of random sketches against torch's batched products and the bandwidth floor.

``python tests/perf/rmm_kernels.py [--output docs/results/data]`` prints a table and writes
``rmm_projections_<device name>.csv``. Needs a GPU. Floor: X read and the projection written once, at the
bandwidth of a device-to-device copy measured in the same run. Each call works on another copy of X than the
one before, so that nothing is found in the L2 cache; times are medians of CUDA events around
eight calls, which follow each other as the kernels of a training step do.

Ways as in `ds_efficient.ops.rmm.project`. Beside them: torch.baddbmm with an S that is there already, and
plain torch (`torch.randn`, or signs by `torch.randint`, then a batched product).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import benchmark, copy_rate, median_ms
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from ds_efficient.core.keys import Key  # noqa: E402
from ds_efficient.ops import keyed_random, rmm  # noqa: E402
from ds_efficient.ops.rmm_partition import Partition  # noqa: E402

SHAPES = ((16384, 5120), (16384, 20480), (8192, 4096), (8192, 16384))
RATIOS, BLOCK, DTYPE = (1 / 8, 1 / 4), 512, torch.bfloat16
LONG_BLOCKS = (2048, 4096, 8192, 16384)  # srht at 16384 x 5120: where the fast transform begins to pay
WAYS = {
    "gaussian": ("gemm",), "rademacher": ("gemm",), "srht": ("gemm", "hadamard"), "count": ("gemm",),
    "rows": ("gemm", "fused"),
}  # fmt: skip
ROTATION = 160 << 20  # bytes of all copies together: three times the L2 cache of an H100
TOGETHER = 8  # calls between two events
KEY = Key(3).fold("rmm_kernels")


def multiply(x: Tensor, s: Tensor, scale: float) -> Tensor:
    """The batched product with a given S (blocks, p, block)."""
    blocks = x.unflatten(0, (s.shape[0], -1))
    out = x.new_empty(s.shape[0], s.shape[1], x.shape[1])
    return torch.baddbmm(out, s, blocks, beta=0, alpha=scale, out=out)


def plain(x: Tensor, sketch: str, parts: Partition, scale: float) -> Tensor:
    """What one writes in torch: random S, batched product."""
    shape = (parts.full_blocks, parts.projected, parts.block)
    if sketch == "gaussian":
        s = torch.randn(shape, dtype=x.dtype, device=x.device)
    else:
        s = (torch.randint(0, 2, shape, device=x.device) * 2 - 1).to(x.dtype)
    return multiply(x, s, scale)


def measure_shape(
    rows: int, features: int, ratio: float, block: int, rate: float
) -> Iterator[dict[str, Any]]:
    """One row for each sketch and way."""
    parts = rmm.partition(rows, ratio, block_size=block)
    x = keyed_random.normal(KEY, (rows, features), dtype=DTYPE, device="cuda")
    copies = [x, *(x.clone() for _ in range(max(1, ROTATION // x.nbytes)))]
    size = x.nbytes + parts.total * features * x.element_size()
    (segment,) = parts.segments()
    scale = segment.scale("gaussian")
    s = torch.randn((segment.blocks, segment.projected, block), dtype=DTYPE, device="cuda")
    given = median_ms([functools.partial(multiply, c, s, scale) for c in copies], 30, together=TOGETHER)
    sketches = WAYS if block == BLOCK else {"srht": WAYS["srht"]}
    for sketch, ways in sketches.items():
        baseline: float | str = ""
        if sketch in ("gaussian", "rademacher"):
            calls = [functools.partial(plain, c, sketch, parts, scale) for c in copies]
            baseline = median_ms(calls, 30, together=TOGETHER)
        for way in ways:
            calls = [functools.partial(rmm.project, c, KEY, sketch, parts, backend=way) for c in copies]
            ours = median_ms(calls, 30, together=TOGETHER)
            read = parts.total * features * x.element_size() if sketch == "rows" else x.nbytes
            floor = (size - x.nbytes + read) / rate
            yield {
                "sketch": sketch, "way": way, "shape": f"{rows}x{features}", "block": block, "ratio": ratio,
                "projected": parts.projected, "dtype": str(DTYPE).removeprefix("torch."),
                "milliseconds": ours,
                "floor_milliseconds": floor, "fraction_of_floor": floor / ours,
                "given_sketch_milliseconds": given, "speedup_over_given_sketch": given / ours,
                "plain_torch_milliseconds": baseline,
                "speedup_over_plain_torch": baseline / ours if isinstance(baseline, float) else "",
            }  # fmt: skip


def measure(device: torch.device) -> Iterator[dict[str, Any]]:
    """All rows."""
    rate = copy_rate(device, together=TOGETHER)
    print(f"device-to-device copy: {rate / 1e9:.2f} TB/s, read and written bytes counted")
    for rows, features in SHAPES:
        for ratio in RATIOS:
            yield from measure_shape(rows, features, ratio, BLOCK, rate)
    for block in LONG_BLOCKS:
        for ratio in RATIOS:
            yield from measure_shape(16384, 5120, ratio, block, rate)


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    what = f"{row['sketch']:>10} {row['way']:>9} {row['shape']:>11}"
    what += f" block {row['block']:5} p {row['projected']:4}"
    baseline = row["plain_torch_milliseconds"]
    torch_part = f", plain torch {baseline:7.4f}" if isinstance(baseline, float) else ""
    print(
        f"{what}: {row['milliseconds']:7.4f} ms, "
        f"{100 * row['fraction_of_floor']:5.1f} % of the floor's speed, "
        f"baddbmm with S given {row['given_sketch_milliseconds']:7.4f}{torch_part}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(benchmark("rmm_projections", "Benchmark the projections of random sketches.", measure, show))
