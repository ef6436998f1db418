"""Time of SLoPe's layer against ``nn.Linear`` on the CPU, forward and backward, and where it goes.

    python tests/perf/slope_cpu.py [--shapes 1024x1024,...] [--tokens 512,2048] [--threads 1]

A CPU has no sparse product: the layer multiplies by the sparse weight written out, so it costs the dense
layer and what writing it out and compacting the gradient take. Writes ``slope_cpu_<processor>.csv``; times
are medians in milliseconds of processor time, dense and sparse in turns. ``overhead`` is sparse over dense.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import DATA, ROOT, conditions, medians_in_turns, write_csv
from torch import nn

sys.path.insert(0, str(ROOT))

from ds_efficient.core.keys import Key
from ds_efficient.ops import slope as ops
from ds_efficient.ops.keyed_random import normal
from ds_efficient.slope.linear import SlopeLinear

CPU = torch.device("cpu")
KEY = Key(12, ("slope_cpu",))


def measure(out: int, inputs: int, tokens: int, dtype: torch.dtype, blocks: int) -> dict[str, Any]:
    """One row."""
    dense = nn.Linear(inputs, out, dtype=dtype)
    layer = SlopeLinear.from_linear(dense, key=KEY.fold("mask"))
    x = normal(KEY.fold("x"), [tokens, inputs]).to(dtype).requires_grad_()
    dy = normal(KEY.fold("dy"), [tokens, out]).to(dtype)
    product, weight = layer.slope, layer.weight.detach()
    pattern: dict[str, Any] = {"n": product.shape.n, "m": product.shape.m}
    gradient = torch.empty(out, inputs, dtype=dtype)

    def one_pass(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(dy)

    def forward(module: nn.Module) -> None:
        with torch.no_grad():
            module(x)

    found = medians_in_turns(
        {
            "dense_ms": lambda: one_pass(dense),
            "slope_ms": lambda: one_pass(layer),
            "dense_forward_ms": lambda: forward(dense),
            "slope_forward_ms": lambda: forward(layer),
            "decompress_ms": lambda: product.dense_weight(weight),
            "decompress_twice_ms": lambda: product.dense_weight(weight, backward=True),
            "compress_ms": lambda: product.compress(gradient),
            "select_columns_ms": lambda: ops.select_columns(weight, product.mask, inputs, **pattern),
        },
        CPU,
        blocks=blocks,
        repeat=1,
    )
    return {
        "dtype": str(dtype).removeprefix("torch."), "shape": f"{out}x{inputs}", "tokens": tokens,
        "overhead": found["slope_ms"] / found["dense_ms"],
        "forward_overhead": found["slope_forward_ms"] / found["dense_forward_ms"], **found,
    }  # fmt: skip


def main() -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description="Benchmark SLoPe's layer on the CPU.")
    parser.add_argument("--shapes", default="768x768,2304x768,3072x768,768x3072,1024x1024")
    parser.add_argument("--tokens", default="512,2048", help="separated by commas")
    parser.add_argument("--bf16-shapes", default="256x256,768x768", help="fewer: slow on most processors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=9, help="turns")
    parser.add_argument("--output", type=Path, default=DATA)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, common = [], conditions(CPU)
    for dtype, shapes in ((torch.float32, args.shapes), (torch.bfloat16, args.bf16_shapes)):
        for shape in shapes.split(","):
            for tokens in map(int, args.tokens.split(",")):
                out, inputs = map(int, shape.split("x"))
                row = measure(out, inputs, tokens, dtype, args.blocks)
                rows.append({**row, **common})
                print(
                    f"{row['dtype']:>9} {shape:>10} {tokens:>5} tokens: dense {row['dense_ms']:8.2f}, sparse "
                    f"{row['slope_ms']:8.2f} ms, overhead {row['overhead']:.3f} (forward "
                    f"{row['forward_overhead']:.3f}); written out {row['decompress_ms']:.2f} and "
                    f"{row['decompress_twice_ms']:.2f}, gradient compacted {row['compress_ms']:.2f}, column "
                    f"pass {row['select_columns_ms']:.2f} ms",
                    flush=True,
                )
    print(f"wrote {write_csv('slope_cpu', rows, args.output, CPU)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
