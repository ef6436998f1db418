"""Two ways of a sparse product with an adapter, y = x W^T + (x R^T) L^T, in one run.

``python tests/perf/slope_adapter.py [--tokens 8192] [--rank 64] [--output DIR]`` prints a table and writes
``slope_adapter_<device name>.csv``.

- apart: the sparse product, a dense product x R^T, and a product added in place
- joined: one sparse product over W and R, then the product added in place. R is dense, so it takes two rows
  of the operand for each of its own, one with the elements 0 and 1 of every four, one with 2 and 3: exactly
  R, and no dearer than a dense product. The result is a strided view.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import conditions, write_csv
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from ds_efficient.core.keys import Key  # noqa: E402
from ds_efficient.ops.cusparselt import SparseOperand, multiply, unavailable  # noqa: E402
from ds_efficient.slope.linear import SlopeLinear  # noqa: E402

SHAPES = ((4096, 4096), (16384, 4096), (4096, 16384), (20480, 5120), (5120, 20480))


def joined_operand(weight: Tensor, down: Tensor) -> SparseOperand:
    """Compress [W; R at positions 0, 1; R at positions 2, 3] of a dense 2:4 weight."""
    rank, inner = down.shape
    halves = down.view(rank, inner // 4, 2, 2)
    parts = []
    for half in range(2):
        part = torch.zeros_like(halves)
        part[:, :, half] = halves[:, :, half]
        parts.append(part.view(rank, inner))
    whole = torch.cat([weight, *parts])
    operand = SparseOperand(whole.shape[0], inner, dtype=weight.dtype, device=weight.device)
    operand.set_pattern(whole)
    return operand


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Time in turns, since clocks change; median of CUDA events."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(4):
                call()
            end.record()
            end.synchronize()
            if turn >= 3:
                found[name].append(begin.elapsed_time(end) / 4)
    return {name: statistics.median(times) for name, times in found.items()}


def measure(out: int, inner: int, tokens: int, rank: int) -> dict[str, object]:
    """Return one row: both times, and the joined result's relative error against the other."""
    dtype, device = torch.bfloat16, torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)
    layer = SlopeLinear(inner, out, False, dtype=dtype, device=device, key=Key(1, (out, inner)))
    weight = layer.dense_weight()
    # No kept value may be zero where the library chooses positions itself.
    weight = torch.where(layer.forward_mask() & (weight == 0), torch.full_like(weight, 1e-3), weight)
    down = torch.randn(rank, inner, device=device, generator=generator).to(dtype) * inner**-0.5
    down = torch.where(down == 0, torch.full_like(down, 1e-3), down)
    up = torch.randn(out, rank, device=device, generator=generator).to(dtype)
    x = torch.randn(tokens, inner, device=device, generator=generator).to(dtype)
    plain = SparseOperand(out, inner, dtype=dtype, device=device)
    plain.set_pattern(weight)
    joined = joined_operand(weight, down)
    twice = torch.cat([up, up], dim=1)

    def product() -> Tensor:
        return multiply(plain, x)

    def apart() -> Tensor:
        return multiply(plain, x).addmm_(x @ down.t(), up.t())

    def together() -> Tensor:
        both = multiply(joined, x)
        return both[:, :out].addmm_(both[:, out:], twice.t())

    for call in (product, apart, together):
        call(), call()  # the second call searches an algorithm
    expected = apart().float()
    error = float((together().float() - expected).norm() / expected.norm())
    times = milliseconds({"product": product, "apart": apart, "joined": together})
    row = {"out": out, "in": inner, "tokens": tokens, "rank": rank, **times}
    return {**row, "apart_over_joined": times["apart"] / times["joined"], "relative_error": error}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="A sparse product with an adapter: apart or joined.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "data")
    args = parser.parse_args()
    reason = unavailable(torch.device("cuda", 0)) if torch.cuda.is_available() else "no CUDA device"
    if reason:
        print(f"slope_adapter.py: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    common = conditions(device)
    rows = []
    for out, inner in SHAPES:
        row = measure(out, inner, args.tokens, args.rank)
        print(
            "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
            flush=True,
        )
        rows.append({**row, **common})
    print(f"wrote {write_csv('slope_adapter', rows, args.output, device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
