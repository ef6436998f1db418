"""Time and memory of SLoPe's sparse layer against the dense one: a linear layer, and a block of a GPT.

    python tests/perf/slope_layer.py [--shapes 4096x4096,...] [--hidden 4096,5120] [--output DIR]

Writes ``slope_layer_<device name>.csv`` with one row a case. ``part``:

- layer: ``nn.Linear`` without bias, forward and both gradients, against `SlopeLinear` with both operands
  written anew for each pass, as after an optimizer step; and the parts of it, each by itself. Weights lie in
  larger buffers, as DeepSpeed keeps them
- block: a pre-norm block of a GPT, one training pass with all four linears sparse
- inference: the same block's forward pass under ``no_grad``
- memory: parameter and gradient in bf16, fp32 master copy and Adam's moments after one step, with masks and
  operands; on a GPU read from the allocator. "memory, flat": the weight in a larger buffer, as DeepSpeed
  keeps it, where the operand cannot be the weight's own memory; "memory, rewritten": the same with operands
  that are written for each product and dropped after it

Times are medians in milliseconds, dense and sparse in turns; ``*_host_ms`` is what the host needs to queue a
pass, which must be less than the pass takes. For a trial without a GPU:
``--device cpu --shapes 64x64 --hidden 128 --tokens 128 --sequence 64``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpt_block import KEY, LINEARS, Block, dense_linear, draw, replace
from measuring import DATA, conditions, host_ms, medians_in_turns, write_csv
from mixed_adamw import MixedAdamW
from torch import Tensor, nn

from ds_efficient.ops import cusparselt
from ds_efficient.ops import slope as ops
from ds_efficient.slope.linear import SlopeLinear

SHAPES = "4096x4096,14336x4096,4096x14336,5120x5120,20480x5120,5120x20480"


def sparse_layer(dense: nn.Linear, name: str, *, flat: bool = True) -> SlopeLinear:
    """A sparse layer from a dense one.

    Args:
        dense: the layer.
        name: of its mask.
        flat: keep the weight where DeepSpeed keeps it, in a larger buffer whose changes it is told of.
    """
    layer = SlopeLinear.from_linear(dense, key=KEY.fold("mask", name))
    if flat:
        move_to_buffer(layer)
        layer.slope.operands.managed = True
    return layer


def move_to_buffer(layer: nn.Module) -> None:
    """Move a layer's weight into a buffer that is larger than it."""
    weight = layer.get_parameter("weight")
    buffer = weight.detach().new_empty(weight.numel() + 128)
    weight.data = buffer[: weight.numel()].view_as(weight).copy_(weight.detach())


def make_sparse(block: Block) -> list[SlopeLinear]:
    """Replace the four linears of a block; returns the new ones."""
    layers: list[SlopeLinear] = []

    def make(linear: nn.Linear, name: str) -> SlopeLinear:
        layers.append(sparse_layer(linear, name))
        return layers[-1]

    replace(block, LINEARS, make)
    return layers


def training_pass(module: nn.Module, sparse: list[SlopeLinear], x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward pass, new operands included where the module is sparse."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        for layer in sparse:
            layer.slope.operands.weight_changed()
        module(x).backward(dy)

    return run


def forward_pass(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            module(x)

    return run


def choices(layer: SlopeLinear, x: Tensor) -> dict[str, str]:
    """How each product of a layer was computed: backend, tiles, parts of the tokens."""
    found = {}
    for key, backend in layer.slope.operands.choices.items():
        transposed, text = bool(key[0]), backend
        if backend == "cusparselt":
            rows, inner = layer.slope.operands.sizes(transposed)
            tokens = 1 << (x.numel() // x.shape[-1] - 1).bit_length()  # as `Operands` rounds them
            tuned = cusparselt.tune(rows, inner, tokens, x.dtype, x.device)
            text += f", tiles {tuned.tiles}, token splits {tuned.token_splits}"
        found["input_gradient_choice" if transposed else "forward_choice"] = text
    return found


def measure_layer(
    out: int, inputs: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Row of one linear layer."""
    dense = dense_linear(out, inputs, f"{out}x{inputs}", device, dtype)
    layer = sparse_layer(dense, "layer")
    x = draw("x", tokens, inputs, like=device, dtype=dtype).requires_grad_()
    dy = draw("dy", tokens, out, like=device, dtype=dtype)
    rewritten = sparse_layer(dense, "layer")
    rewritten.slope.operands.rewritten = True
    calls = {
        "dense": training_pass(dense, [], x, dy),
        "slope": training_pass(layer, [layer], x, dy),
        "rewritten": training_pass(rewritten, [], x, dy),
    }
    whole = medians_in_turns(calls, device)
    host = {f"{name}_host_ms": host_ms(call, device) for name, call in calls.items()}
    parts = measure_parts(dense, layer, x.detach(), dy, device)
    yield {
        "part": "layer", "shape": f"{out}x{inputs}", "tokens": tokens,
        "dense_ms": whole["dense"], "slope_ms": whole["slope"], "ratio": whole["dense"] / whole["slope"],
        "rewritten_ms": whole["rewritten"], "rewritten_ratio": whole["dense"] / whole["rewritten"],
        **host, **parts, **choices(layer, x),
    }  # fmt: skip


def measure_parts(
    dense: nn.Linear, layer: SlopeLinear, x: Tensor, dy: Tensor, device: torch.device
) -> dict[str, float]:
    """Medians of the parts of a pass; the operands are written into tensors of the operands' sizes."""
    product, shape, weight = layer.slope, layer.slope.shape, layer.weight  # itself: its changes are followed
    plain = dense.weight.detach()
    forward = plain.new_empty(shape.out_features, shape.in_features // 2)
    backward = plain.new_empty(shape.in_features, shape.out_features // 2)
    pattern: dict[str, Any] = {"n": shape.n, "m": shape.m}

    def refresh() -> None:
        ops.write_operand(weight, product.mask, forward, shape.in_features, **pattern)
        ops.write_operand(
            weight, product.mask, backward, shape.in_features, **pattern, backward_mask=product.column_mask
        )

    with torch.no_grad():
        found = medians_in_turns(
            {
                "dense_forward_ms": lambda: F.linear(x, plain),
                "slope_forward_ms": lambda: product.multiply(x, layer.weight),
                "dense_input_gradient_ms": lambda: dy @ plain,
                "slope_input_gradient_ms": lambda: product.input_gradient(dy, layer.weight),
                "dense_weight_gradient_ms": lambda: dy.t() @ x,
                "slope_weight_gradient_ms": lambda: product.weight_gradient(dy, x),
                "refresh_ms": refresh,
                "select_columns_ms": lambda: ops.select_columns(
                    weight, product.mask, shape.in_features, **pattern
                ),
            },
            device,
        )
    return found


def measure_block(
    hidden: int, tokens: int, sequence: int, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Rows of one block: training and inference."""
    dense, block = Block(hidden, device, dtype), Block(hidden, device, dtype)
    sparse = make_sparse(block)
    x = draw("x", tokens // sequence, sequence, hidden, like=device, dtype=dtype).requires_grad_()
    dy = draw("dy", tokens // sequence, sequence, hidden, like=device, dtype=dtype)
    chosen: dict[str, dict[str, str]] = {}
    for part, calls in (
        ("block", {"dense": training_pass(dense, [], x, dy), "slope": training_pass(block, sparse, x, dy)}),
        ("inference", {"dense": forward_pass(dense, x), "slope": forward_pass(block, x)}),
    ):
        found = medians_in_turns(calls, device)
        for name, layer in zip(LINEARS, sparse, strict=True):
            for product, text in choices(layer, x).items():
                if part == "block" or product == "forward_choice":
                    chosen.setdefault(product, {})[name] = text
        yield {
            "part": part, "shape": f"hidden {hidden}, sequence {sequence}", "tokens": tokens,
            "dense_ms": found["dense"], "slope_ms": found["slope"],
            "ratio": found["dense"] / found["slope"],
            **{f"{name}_host_ms": host_ms(call, device) for name, call in calls.items()},
            **{product: "; ".join(f"{n}: {text}" for n, text in by_name.items())
               for product, by_name in chosen.items()
               if part == "block" or product == "forward_choice"},
        }  # fmt: skip


def hold_layer(
    sparse: bool, out: int, inputs: int, x: Tensor, dy: Tensor, *, flat: bool, rewritten: bool = False
) -> tuple[int | None, dict[str, int]]:
    """Build a layer, take one step with it; return the bytes the allocator holds for it, and the count.

    Args:
        sparse: build a `SlopeLinear`.
        out, inputs: its sizes.
        x, dy: input and gradient of the output.
        flat: put the weight into a larger buffer, as DeepSpeed does, which the sparse operand cannot share.
        rewritten: write the operands for each product.
    """
    device, cuda = x.device, x.is_cuda
    gc.collect()
    before = torch.cuda.memory_allocated(device) if cuda else 0
    dense = dense_linear(out, inputs, "memory", device, x.dtype)
    if flat:
        move_to_buffer(dense)
    layer = sparse_layer(dense, "memory", flat=flat) if sparse else dense
    del dense
    if isinstance(layer, SlopeLinear):
        layer.slope.operands.rewritten = rewritten
    adam = MixedAdamW(list(layer.parameters()))
    layer(x).backward(dy)
    adam.step()
    if isinstance(layer, SlopeLinear):
        layer.slope.operands.weight_changed()
    layer.zero_grad(set_to_none=False)
    layer(x).backward(dy)  # with the new values, as in the middle of a run
    x.grad = None
    gc.collect()
    if cuda:
        torch.cuda.synchronize(device)
    measured = torch.cuda.memory_allocated(device) - before if cuda else None
    masks = sum(buffer.nbytes for buffer in layer.buffers())
    operands = layer.slope.operands.nbytes() if isinstance(layer, SlopeLinear) else 0
    return measured, {"states": adam.nbytes(), "masks": masks, "operands": operands}


def measure_memory(
    out: int, inputs: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Rows of one layer's memory; what libraries hold for themselves is there before (first round)."""
    x = draw("x", tokens, inputs, like=device, dtype=dtype).requires_grad_()
    dy = draw("dy", tokens, out, like=device, dtype=dtype)
    for sparse in (False, True):
        hold_layer(sparse, out, inputs, x, dy, flat=False)
    for part, flat, rewritten in (
        ("memory", False, False), ("memory, flat", True, False), ("memory, rewritten", True, True),
    ):  # fmt: skip
        dense, dense_counted = hold_layer(False, out, inputs, x, dy, flat=flat)
        slope, counted = hold_layer(True, out, inputs, x, dy, flat=flat, rewritten=rewritten)
        dense_bytes = dense if dense is not None else sum(dense_counted.values())
        slope_bytes = slope if slope is not None else sum(counted.values())
        yield {
            "part": part, "shape": f"{out}x{inputs}", "tokens": tokens,
            "ratio": slope_bytes / dense_bytes, "dense_bytes": dense_bytes, "slope_bytes": slope_bytes,
            "states_bytes": counted["states"], "masks_bytes": counted["masks"],
            "operands_bytes": counted["operands"],
            "states_and_masks_ratio": (counted["states"] + counted["masks"]) / sum(dense_counted.values()),
            "measured": "allocator" if dense is not None else "counted",
        }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    head = f"{row['part']:>12} {row['shape']:<26}"
    if row["part"].startswith("memory"):
        print(
            f"{head} dense {row['dense_bytes'] / 2**20:.1f} MiB, slope {row['slope_bytes'] / 2**20:.1f} MiB "
            f"({row['measured']}), ratio {row['ratio']:.4f}; states and masks alone "
            f"{row['states_and_masks_ratio']:.4f}, operands {row['operands_bytes'] / 2**20:.1f} MiB",
            flush=True,
        )
        return
    print(
        f"{head} dense {row['dense_ms']:8.3f} ms, slope {row['slope_ms']:8.3f} ms, ratio {row['ratio']:.3f}",
        flush=True,
    )
    if row["dense_host_ms"]:
        print(f"{'':>12}host, to queue it: dense {row['dense_host_ms']}, slope {row['slope_host_ms']} ms")
    if row["part"] == "layer":
        for name in ("forward", "input_gradient", "weight_gradient"):
            dense, slope = row[f"dense_{name}_ms"], row[f"slope_{name}_ms"]
            print(f"{'':>12}{name:<16} dense {dense:8.4f}, slope {slope:8.4f} ms, {dense / slope:.3f}")
        print(f"{'':>12}refresh {row['refresh_ms']:.4f} ms, column pass {row['select_columns_ms']:.4f} ms")
    for name in ("forward_choice", "input_gradient_choice"):
        print(f"{'':>12}{name}: {row.get(name, '')}", flush=True)


def cases(args: argparse.Namespace) -> Iterator[Callable[..., Iterator[dict[str, Any]]]]:
    """What is measured, in order of importance, each as a function of device and dtype."""
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",") if shape]
    hidden = [int(size) for size in args.hidden.split(",") if size]
    layers = [functools.partial(measure_layer, out, inputs, args.tokens) for out, inputs in shapes]
    yield from layers[:1]
    for size in hidden:
        yield functools.partial(measure_block, size, args.tokens, args.sequence)
    yield from layers[1:]
    for out, inputs in shapes[:2]:
        yield functools.partial(measure_memory, out, inputs, args.tokens)


def main() -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description="Benchmark SLoPe's layers against dense ones.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--shapes", default=SHAPES, help="out x in, separated by commas")
    parser.add_argument("--hidden", default="4096,5120", help="widths of the blocks, separated by commas")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--limit", type=float, default=100.0, help="seconds after which no case is begun")
    parser.add_argument("--output", type=Path, default=DATA)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    begin, common, rows = time.perf_counter(), conditions(device), []
    for case in cases(args):
        start = time.perf_counter()
        if start - begin > args.limit:
            print(f"stopped after {start - begin:.0f} s: the cases that follow are not measured")
            break
        for row in case(device, dtype):
            show(row)
            rows.append({**row, **common})
            path = write_csv("slope_layer", rows, args.output, device)
        print(f"{'':>12}[{time.perf_counter() - start:.1f} s]", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
