"""Time of L-GreCo's planner on one core.

    python tests/perf/lgreco_planner.py [--instances 300x60,...] [--buckets 1000,10000]

Writes ``lgreco_planner_<processor>.csv``; times are medians in milliseconds of processor time. ``plan_ms`` is
all of `plan_compression`, ``solve_ms`` its dynamic programme in C++ over all options, ``reference_ms`` the
same in plain torch.
Instances: ``falling``: sizes fall as errors grow, as of real compressors, the default in the middle;
``dense``: the default is uncompressed and the other errors are small against the budget, so that after a few
layers all sums are within it: about the most work there is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import DATA, ROOT, conditions, medians_in_turns, write_csv

sys.path.insert(0, str(ROOT))

from ds_efficient.lgreco import error_budget, plan_compression
from ds_efficient.ops import lgreco_planner as op

CPU = torch.device("cpu")


def instance(kind: str, layers: int, options: int) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Errors, sizes, default and budget."""
    rng = np.random.default_rng(7)
    sizes = np.sort(rng.uniform(1e3, 1e7, (layers, options)), axis=1)[:, ::-1].copy()
    if kind == "falling":
        scale = rng.uniform(0.1, 10.0, (layers, 1))
        errors = scale * np.sort(rng.uniform(0.2, 1.0, (layers, options)), axis=1)
        return errors, sizes, options // 2, error_budget(errors, options // 2)
    errors = np.sort(rng.uniform(0.0, 0.05, (layers, options)), axis=1)
    errors[:, 0] = 0.0
    return errors, sizes, 0, 1.0


def solve_arguments(
    errors: np.ndarray, sizes: np.ndarray, budget: float, buckets: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """What `plan_compression` hands to the dynamic programme, here with all options."""
    layers, options = errors.shape
    cells = np.ceil(errors / budget * buckets).astype(np.int64)
    offsets = torch.arange(0, layers * options + 1, options)
    return offsets, torch.from_numpy(cells.reshape(-1)), torch.from_numpy(sizes.reshape(-1)), buckets


def measure(kind: str, layers: int, options: int, buckets: int, blocks: int) -> dict[str, Any]:
    """One row."""
    errors, sizes, default, budget = instance(kind, layers, options)
    arguments = solve_arguments(errors, sizes, budget, buckets)
    found = medians_in_turns(
        {
            "plan_ms": lambda: plan_compression(
                errors, sizes, budget, buckets=buckets, default=default, backend="native"
            ),
            "solve_ms": lambda: op.plan(*arguments, backend="native"),
        },
        CPU,
        blocks=blocks,
        repeat=1,
    )
    slow = {"reference_ms": lambda: op.plan(*arguments, backend="reference")}
    found |= medians_in_turns(slow, CPU, blocks=1, repeat=1)
    plan = plan_compression(errors, sizes, budget, buckets=buckets, default=default).numpy()
    rows = np.arange(layers)
    return {
        "instance": kind, "layers": layers, "options": options, "buckets": buckets,
        "gain": sizes[:, default].sum() / sizes[rows, plan].sum(),
        "budget_used": errors[rows, plan].sum() / budget, **found,
    }  # fmt: skip


def main() -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description="Benchmark L-GreCo's planner on one core.")
    parser.add_argument("--instances", default="50x20,300x60", help="layers x options, separated by commas")
    parser.add_argument("--buckets", default="1000,10000", help="separated by commas")
    parser.add_argument("--blocks", type=int, default=9, help="turns")
    parser.add_argument("--output", type=Path, default=DATA)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, common = [], conditions(CPU)
    for shape in args.instances.split(","):
        layers, options = map(int, shape.split("x"))
        for buckets in map(int, args.buckets.split(",")):
            for kind in ("falling", "dense"):
                row = measure(kind, layers, options, buckets, args.blocks)
                rows.append({**row, **common})
                print(
                    f"{kind:>8} {shape:>7}, {buckets:>6} buckets: plan {row['plan_ms']:7.2f} ms, in C++ "
                    f"{row['solve_ms']:7.2f}; in plain torch {row['reference_ms']:8.1f}; {row['gain']:.2f} "
                    f"times smaller than the default, {row['budget_used']:.4f} of the budget used",
                    flush=True,
                )
    print(f"wrote {write_csv('lgreco_planner', rows, args.output, CPU)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
