"""Time and memory of RMM's layers against exact ones: a linear layer, a block of a GPT, an encoder.

    python tests/perf/rmm_layer.py [--shapes 8192x4096x4096,...] [--ratios 0.125,...] [--output DIR]

Writes ``rmm_layer_<device name>.csv`` with one row a case. ``part``:

- layer: ``nn.Linear`` without bias against `RandomizedLinear`, forward pass and both gradients, bf16, with
  every sketch; and by themselves the two projections and the product of them
- block: a training pass of a pre-norm block of a GPT. The output projection of the attention stays exact,
  as in training: the attention keeps its input anyway
- encoder: a training step, AdamW included, of a classifier of the shape of RoBERTa-base, with fp32
  parameters and autocast to bf16; the query, key and value layers read one input and share its projection

``shape`` of a layer: tokens x inputs x outputs. Times are medians in milliseconds, exact and sketched in
turns; ``*_host_ms`` is what the host needs to queue a pass. ``*_saved_bytes``: what autograd saves in the
forward pass, without parameters. ``*_peak_bytes``: most bytes allocated, on GPUs only: in a block's pass
above those before it; in an encoder's step above those before the model was built. For a trial without a
GPU: ``--device cpu --shapes 256x32x48 --hidden 64 --tokens 256 --sequence 64 --encoder 2x64x32x8``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpt_block import KEY, Block, dense_linear, draw, peak_bytes, replace, saved_bytes
from measuring import DATA, conditions, host_ms, medians_in_turns, write_csv
from torch import Tensor, nn

from ds_efficient.ops.rmm import SKETCHES, partition, project
from ds_efficient.rmm.linear import RandomizedLinear

SHAPES = "16384x5120x20480,8192x4096x16384,8192x4096x4096"
RATIOS = "0.125,0.25,0.0625"
ENCODER = "12x768x128x128"
ENCODER_RATIO = 0.2
VOCABULARY = 50265
HEAD = 64
MIN_ROWS = 64
Case = Callable[[torch.device], Iterator[dict[str, Any]]]


def randomized(linear: nn.Linear, name: str, *, ratio: float, sketch: str, block: int) -> RandomizedLinear:
    """A layer with the parameters of `linear`."""
    return RandomizedLinear.from_linear(
        linear, ratio=ratio, sketch=sketch, block_size=block, min_rows=MIN_ROWS, key=KEY.fold("sketch", name)
    )


def training_pass(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward pass."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(dy)

    return run


def measure_layer(
    tokens: int,
    inputs: int,
    out: int,
    ratio: float,
    sketches: Sequence[str],
    block: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Rows of one linear layer at one ratio, one a sketch."""
    dtype = torch.bfloat16
    dense = dense_linear(out, inputs, f"{out}x{inputs}", device, dtype)
    layers = {
        sketch: randomized(dense, "layer", ratio=ratio, sketch=sketch, block=block) for sketch in sketches
    }
    x = draw("x", tokens, inputs, like=device, dtype=dtype).requires_grad_()
    dy = draw("dy", tokens, out, like=device, dtype=dtype)
    modules: dict[str, nn.Module] = {"exact": dense, **layers}
    calls = {name: training_pass(module, x, dy) for name, module in modules.items()}
    times = medians_in_turns(calls, device)
    host = {name: host_ms(call, device) for name, call in calls.items()}
    saved = {name: saved_bytes(module, functools.partial(module, x)) for name, module in modules.items()}
    for sketch in sketches:
        yield {
            "part": "layer", "shape": f"{tokens}x{inputs}x{out}", "tokens": tokens, "sketch": sketch,
            "ratio": ratio, "block_size": block, "exact_ms": times["exact"], "rmm_ms": times[sketch],
            "speedup": times["exact"] / times[sketch],
            "exact_host_ms": host["exact"], "rmm_host_ms": host[sketch],
            "exact_saved_bytes": saved["exact"], "rmm_saved_bytes": saved[sketch],
            **measure_parts(x.detach(), dy, ratio, sketch, block),
        }  # fmt: skip


def measure_parts(x: Tensor, dy: Tensor, ratio: float, sketch: str, block: int) -> dict[str, float]:
    """Medians of the projections, of their product, and of the exact weight gradient."""
    parts = partition(len(x), ratio, block_size=block, min_rows=MIN_ROWS)
    key = KEY.fold("parts")
    p, q = (project(z, key, sketch, parts) for z in (x, dy))
    return medians_in_turns(
        {
            "project_input_ms": lambda: project(x, key, sketch, parts),
            "project_gradient_ms": lambda: project(dy, key, sketch, parts),
            "product_ms": lambda: q.t() @ p,
            "exact_weight_gradient_ms": lambda: dy.t() @ x,
        },
        x.device,
    )


def measure_block(
    hidden: int, tokens: int, sequence: int, ratio: float, sketch: str, block: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Row of one block."""
    dtype = torch.bfloat16
    shape = (tokens // sequence, sequence, hidden)
    x = draw("x", *shape, like=device, dtype=dtype).requires_grad_()
    dy = draw("dy", *shape, like=device, dtype=dtype)
    make = functools.partial(randomized, ratio=ratio, sketch=sketch, block=block)
    modules = {"exact": Block(hidden, device, dtype), "rmm": Block(hidden, device, dtype)}
    replace(modules["rmm"], ("qkv", "fc1", "fc2"), make)
    calls = {name: training_pass(module, x, dy) for name, module in modules.items()}
    times = medians_in_turns(calls, device)
    row: dict[str, Any] = {
        "part": "block", "shape": f"hidden {hidden}, sequence {sequence}", "tokens": tokens, "sketch": sketch,
        "ratio": ratio, "block_size": block, "exact_ms": times["exact"], "rmm_ms": times["rmm"],
        "speedup": times["exact"] / times["rmm"],
    }  # fmt: skip
    for name, module in modules.items():
        row[f"{name}_host_ms"] = host_ms(calls[name], device)
        row[f"{name}_saved_bytes"] = saved_bytes(module, functools.partial(module, x))
        for other in modules.values():
            other.zero_grad(set_to_none=True)
        x.grad = None
        row[f"{name}_peak_bytes"] = peak_bytes(calls[name], device)
    yield row


class EncoderLayer(nn.Module):
    """A post-norm layer of an encoder with separate query, key and value layers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = max(1, hidden // HEAD)
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.proj = nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden) to the same."""
        batch, length, hidden = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, hidden)
        x = self.norm1(x + self.proj(mixed))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class Encoder(nn.Module):
    """Token and position embeddings, layers, and two classes from the first token."""

    def __init__(self, layers: int, hidden: int, sequence: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, hidden), nn.Embedding(sequence, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.layers = nn.Sequential(*(EncoderLayer(hidden) for _ in range(layers)))
        self.classes = nn.Linear(hidden, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, sequence) ids to (batch, 2)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.classes(self.layers(self.norm(self.tokens(ids) + self.positions(places)))[:, 0])


class EncoderRun:
    """An encoder with its optimizer.

    Args:
        sizes: layers, hidden, sequence, batch.
        make: what linear layers become, or None: they stay.
        device: where it trains.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        make: Callable[[nn.Linear, str], nn.Module] | None,
        device: torch.device,
    ) -> None:
        layers, hidden, sequence, batch = sizes
        with torch.device("meta"):
            model = Encoder(layers, hidden, sequence)
        self.model, self.device = model.to_empty(device=device), device
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                if parameter.dim() == 2:
                    shape = parameter.shape
                    parameter.copy_(draw(name, *shape, like=device, dtype=torch.float32, scale=0.02))
        if make:
            replace(self.model, ("query", "key", "value", "fc1", "fc2"), make)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device.type == "cuda")
        place = torch.arange(batch * sequence, device=device)
        self.ids = (place * 2654435761 % VOCABULARY).view(batch, sequence)
        self.labels = torch.arange(batch, device=device) % 2

    def forward(self) -> Tensor:
        """The loss."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return F.cross_entropy(self.model(self.ids).float(), self.labels)

    def step(self) -> None:
        """A training step."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure_encoder(
    sizes: Sequence[int], ratio: float, sketch: str, block: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Row of the encoder: each alone for its memory, then both in turns for their time."""
    layers, hidden, sequence, batch = sizes
    sketched = functools.partial(randomized, ratio=ratio, sketch=sketch, block=block)
    variants: dict[str, Callable[[nn.Linear, str], nn.Module] | None] = {"exact": None, "rmm": sketched}
    row: dict[str, Any] = {
        "part": "encoder", "shape": f"{layers} x {hidden}, sequence {sequence}, batch {batch}",
        "tokens": batch * sequence, "sketch": sketch, "ratio": ratio, "block_size": block,
    }  # fmt: skip
    for name, make in variants.items():

        def train(make: Callable[[nn.Linear, str], nn.Module] | None = make) -> None:
            run = EncoderRun(sizes, make, device)
            for _ in range(3):
                run.step()

        row[f"{name}_peak_bytes"] = peak_bytes(train, device)
        gc.collect()
    runs = {name: EncoderRun(sizes, make, device) for name, make in variants.items()}
    for name, run in runs.items():
        row[f"{name}_saved_bytes"] = saved_bytes(run.model, run.forward)
    times = medians_in_turns({name: run.step for name, run in runs.items()}, device, blocks=3)
    host = {f"{name}_host_ms": host_ms(run.step, device) for name, run in runs.items()}
    yield {
        **row, **host, "exact_ms": times["exact"], "rmm_ms": times["rmm"],
        "speedup": times["exact"] / times["rmm"],
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    print(
        f"{row['part']:>8} {row['shape']:<36} {row['sketch']:<10} ratio {row['ratio']:<6g} "
        f"exact {row['exact_ms']:8.3f}, rmm {row['rmm_ms']:8.3f} ms, {row['speedup']:.3f}x"
    )
    text = f"saved {row['rmm_saved_bytes'] / row['exact_saved_bytes']:.4f} of exact"
    if row.get("exact_peak_bytes"):
        exact, rmm = row["exact_peak_bytes"], row["rmm_peak_bytes"]
        text += f", peak {rmm / 2**20:.0f} of {exact / 2**20:.0f} MiB: {rmm / exact:.4f}"
    if row["exact_host_ms"]:
        text += f", host: exact {row['exact_host_ms']:.3f}, rmm {row['rmm_host_ms']:.3f} ms"
    print(f"{'':>8} {text}", flush=True)
    if row["part"] == "layer":
        names = ("project_input_ms", "project_gradient_ms", "product_ms", "exact_weight_gradient_ms")
        print(f"{'':>8} {', '.join(f'{name[:-3]} {row[name]:.4f}' for name in names)} ms", flush=True)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """What is measured, in order of importance, each as a function of the device."""
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",") if shape]
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    hidden = [int(size) for size in args.hidden.split(",") if size]
    layers = [
        functools.partial(measure_layer, *shape, ratio, args.sketches, args.block_size)
        for ratio in ratios
        for shape in shapes
    ]
    yield from layers[: len(shapes)]
    if args.encoder:
        sizes = tuple(map(int, args.encoder.split("x")))
        yield functools.partial(measure_encoder, sizes, ENCODER_RATIO, args.sketches[0], args.block_size)
    for ratio in ratios[:2]:
        for size in hidden:
            yield functools.partial(
                measure_block, size, args.tokens, args.sequence, ratio, args.sketches[0], args.block_size
            )
    yield from layers[len(shapes) :]


def main() -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description="Benchmark RMM's layers against exact ones.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default=SHAPES, help="tokens x in x out, separated by commas")
    parser.add_argument("--ratios", default=RATIOS, help="the first is measured first, the blocks with two")
    parser.add_argument("--sketches", nargs="+", choices=SKETCHES, default=list(SKETCHES))
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--hidden", default="4096", help="widths of the blocks, separated by commas")
    parser.add_argument("--tokens", type=int, default=8192, help="of the blocks")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--encoder", default=ENCODER, help='layers x hidden x sequence x batch; "": none')
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which no case is begun")
    parser.add_argument("--output", type=Path, default=DATA)
    args = parser.parse_args()
    device = torch.device(args.device)
    begin, common, rows = time.perf_counter(), conditions(device), []
    for case in cases(args):
        start = time.perf_counter()
        if start - begin > args.limit:
            print(f"stopped after {start - begin:.0f} s: the cases that follow are not measured")
            break
        for row in case(device):
            show(row)
            rows.append({**row, **common})
            path = write_csv("rmm_layer", rows, args.output, device)
        print(f"{'':>8} [{time.perf_counter() - start:.1f} s]", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
