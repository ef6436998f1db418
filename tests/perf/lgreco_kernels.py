"""Speed of L-GreCo's compressors against the memory floor, plain torch and torch's own functions.

``python tests/perf/lgreco_kernels.py [--device cpu] [--output docs/results/data]`` prints a table and writes
``lgreco_kernels_<device name>.csv``. Quantisation to 4 bits with buckets of 512, its sum over 1 and 8 ranks,
the 1 % largest entries, both with and without error feedback, on 2^26 elements (GPU; 2^22 on the CPU) in
float32 and bfloat16; orthonormal columns of the 96 factors of a GPT with 24 layers in one call.

Floor: the bytes that must be read and written (each argument once), at the bandwidth of a copy measured in
the same run. The tensors of a call are several times larger than the L2 cache of a GPU, or taken in turn with
others. Times are medians over turns; on the CPU the processor's time a thread.

Columns: ``plain_torch`` is the same computed with torch's operations; ``rival`` is what torch has for the
purpose (`torch.topk` of the magnitudes; `torch.linalg.qr` of every factor).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import benchmark, copy_rate, host_ms, medians_in_turns
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from ds_efficient.core.keys import Key  # noqa: E402
from ds_efficient.ops import keyed_random, lgreco_orthonormal, lgreco_quantize, lgreco_topk  # noqa: E402

ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 22}
BITS, BUCKET, DENSITY, RANKS = 4, 512, 0.01, 8
ROTATION = 160 << 20  # bytes of all copies together: three times the L2 cache of an H100
FACTORS = {"cuda": ((2304, 32), (768, 32), (3072, 32), (768, 32)), "cpu": ((768, 32), (256, 32))}
LAYERS, EMBEDDING = {"cuda": 24, "cpu": 2}, (50304, 32)
KEY = Key(5).fold("lgreco_kernels")
Calls = dict[str, Callable[[], object]]


class Turns:
    """Copies of a tensor, taken in turn, so that none is found in a cache."""

    def __init__(self, tensor: Tensor) -> None:
        copies = max(1, -(-ROTATION // tensor.nbytes)) if tensor.is_cuda else 1
        self._turn = itertools.cycle([tensor, *(tensor.clone() for _ in range(copies - 1))])

    def next(self) -> Tensor:
        """The next copy."""
        return next(self._turn)


def plain_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit codes with stochastic rounding, packed, and the scales, with torch's operations."""
    rows = x.view(-1, BUCKET).float()
    lo, hi = rows.aminmax(dim=1, keepdim=True)
    unit = ((hi - lo) / 15).clamp_min(2.0**-100)
    code = ((rows - lo) / unit + torch.rand_like(rows)).floor_().clamp_(max=15).to(torch.uint8)
    return code[:, ::2] | code[:, 1::2] << 4, torch.cat((lo, unit), 1)


def plain_dequantize(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Values of `plain_quantize` over ``out``."""
    code = torch.stack((codes & 15, codes >> 4), 2).view(len(codes), -1)
    return out.view_as(code).copy_(code.float() * scales[:, 1:] + scales[:, :1])


def plain_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices ascending and values with torch's operations."""
    index = torch.topk(x.abs(), k, sorted=False).indices.sort().values
    return index.to(torch.int32), x[index]


def row(kernel: str, x: Tensor, detail: str, calls: Calls, nbytes: float, rate: float) -> dict[str, Any]:
    """Measure ``calls``: ``"compiled"``, and what else there is of ``"plain"`` and a rival's name."""
    times = medians_in_turns(calls, x.device, blocks=3, repeat=5)
    ours, floor, plain = times["compiled"], nbytes / rate, times.get("plain")
    rivals = [name for name in calls if name not in ("compiled", "plain")]
    return {
        "kernel": kernel, "elements": x.numel(), "dtype": str(x.dtype).removeprefix("torch."),
        "detail": detail, "milliseconds": ours, "floor_milliseconds": floor, "times_the_floor": ours / floor,
        "host_milliseconds": host_ms(calls["compiled"], x.device),
        "plain_torch_milliseconds": "" if plain is None else plain,
        "speedup_over_plain_torch": "" if plain is None else plain / ours,
        "rival": rivals[0] if rivals else "", "rival_milliseconds": times[rivals[0]] if rivals else "",
    }  # fmt: skip


def quantisation(x: Tensor, rate: float) -> Iterator[dict[str, Any]]:
    """Quantise; add up one payload and several."""
    size, name = lgreco_quantize.payload_bytes(x.numel(), BITS, BUCKET), f"{BITS} bits, buckets of {BUCKET}"
    turns, payload = Turns(x), torch.empty(size, dtype=torch.uint8, device=x.device)
    calls: Calls = {
        "compiled": lambda: lgreco_quantize.quantize(turns.next(), KEY, BITS, BUCKET, out=payload),
        "plain": lambda: plain_quantize(turns.next()),
    }
    yield row("quantize", x, name, calls, x.nbytes + size, rate)
    codes, scales = plain_quantize(x)
    calls = {
        "compiled": lambda: lgreco_quantize.dequantize_(turns.next(), payload, BITS, BUCKET),
        "plain": lambda: plain_dequantize(codes, scales, turns.next()),
    }
    yield row("dequantize", x, name, calls, x.nbytes + size, rate)
    calls = {
        "compiled": lambda: lgreco_quantize.dequantize_(
            turns.next(), payload, BITS, BUCKET, weight=0.5, accumulate=True
        )
    }
    yield row("dequantize and add", x, name, calls, 2 * x.nbytes + size, rate)
    rows = torch.empty(RANKS, -(-size // 8) * 8, dtype=torch.uint8, device=x.device)[:, :size]
    rows.copy_(payload)
    calls = {
        "compiled": lambda: lgreco_quantize.dequantize_(
            turns.next(), rows, BITS, BUCKET, weight=1 / RANKS, accumulate=False
        )
    }
    yield row("dequantize sum", x, f"{name}, {RANKS} ranks", calls, x.nbytes + RANKS * size, rate)


def feedback(x: Tensor, rate: float) -> Iterator[dict[str, Any]]:
    """Quantise and select with the error fed back, in place."""
    turns, error = Turns(x), torch.zeros(x.shape, device=x.device)
    moved = x.nbytes + 2 * error.nbytes
    size, k = lgreco_quantize.payload_bytes(x.numel(), BITS, BUCKET), kept(x)
    codes = torch.empty(size, dtype=torch.uint8, device=x.device)
    calls: Calls = {
        "compiled": lambda: lgreco_quantize.quantize(
            turns.next(), KEY, BITS, BUCKET, error=error, unscale=0.5, new_error=error, out=codes
        )
    }
    yield row("quantize with feedback", x, f"{BITS} bits, buckets of {BUCKET}", calls, moved + size, rate)
    size = lgreco_topk.payload_bytes(x.numel(), k, torch.float32)
    entries = torch.empty(size, dtype=torch.uint8, device=x.device)
    calls = {
        "compiled": lambda: lgreco_topk.select(
            turns.next(), k, error=error, unscale=0.5, new_error=error, out=entries
        )
    }
    yield row("topk with feedback", x, f"{DENSITY:.0%}", calls, moved + size, rate)


def kept(x: Tensor) -> int:
    """Entries that are selected."""
    return -(-x.numel() // round(1 / DENSITY))


def selection(x: Tensor, rate: float) -> Iterator[dict[str, Any]]:
    """Select what can be narrowed and what cannot; scatter."""
    turns, name, k = Turns(x), f"{DENSITY:.0%}", kept(x)
    size = lgreco_topk.payload_bytes(x.numel(), k, x.dtype)
    payload = torch.empty(size, dtype=torch.uint8, device=x.device)
    calls: Calls = {
        "compiled": lambda: lgreco_topk.select(turns.next(), k, out=payload),
        "plain": lambda: plain_topk(turns.next(), k),
        "torch.topk": lambda: torch.topk(turns.next(), k, sorted=False),
    }
    yield row("topk", x, name, calls, x.nbytes + size, rate)
    ones = torch.ones_like(x)
    calls = {"compiled": lambda: lgreco_topk.select(ones, k, out=payload)}
    yield row("topk of equal magnitudes", x, f"{name}, nothing to narrow", calls, x.nbytes + size, rate)
    lgreco_topk.select(x, k, out=payload)
    calls = {
        "compiled": lambda: lgreco_topk.scatter_(
            turns.next(), payload, k, x.dtype, weight=0.5, accumulate=True
        )
    }
    # A line of 32 bytes is read and written for each entry.
    yield row("topk scatter and add", x, name, calls, size + 64 * k, rate)


def orthonormal(
    device: torch.device, shapes: tuple[tuple[int, int], ...], detail: str, rate: float
) -> dict[str, Any]:
    """Factors in one call."""
    given = [keyed_random.normal(KEY.fold(i), shape, device=device) for i, shape in enumerate(shapes)]
    whole = torch.cat([matrix.flatten() for matrix in given])
    calls: Calls = {
        "compiled": lambda: lgreco_orthonormal.orthonormalize_(given),
        "torch.linalg.qr": lambda: [torch.linalg.qr(matrix) for matrix in given],
    }
    return row("orthonormal columns", whole, detail, calls, 2 * whole.nbytes, rate)


def measure(device: torch.device) -> Iterator[dict[str, Any]]:
    """All rows."""
    rate = copy_rate(device)
    print(f"copy: {rate / 1e6:.1f} GB/s, read and written bytes counted")
    for dtype in (torch.float32, torch.bfloat16):
        x = keyed_random.normal(KEY, (ELEMENTS[device.type],), device=device).to(dtype)
        yield from selection(x, rate)
        yield from quantisation(x, rate)
        yield from feedback(x, rate)
        del x
    layers, shapes = LAYERS[device.type], FACTORS[device.type]
    detail = f"{layers} layers of " + ", ".join(f"{n} x {r}" for n, r in shapes)
    yield orthonormal(device, shapes * layers, detail, rate)
    n, r = EMBEDDING
    yield orthonormal(device, (EMBEDDING,), f"an embedding, {n} x {r}", rate)


def show(found: dict[str, Any]) -> None:
    """Print a row."""
    plain, rival = found["plain_torch_milliseconds"], found["rival_milliseconds"]
    print(
        f"{found['kernel']:>26} {found['dtype']:>8}: {found['milliseconds']:8.4f} ms, "
        f"{found['times_the_floor']:6.2f} x the floor"
        + (f", plain torch {plain:8.4f}" if plain else "")
        + (f", {found['rival']} {rival:8.4f}" if rival else ""),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(benchmark("lgreco_kernels", "Benchmark L-GreCo's compressors.", measure, show, cpu=True))
