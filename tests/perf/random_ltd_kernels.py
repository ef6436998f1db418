"""Speed of token dropping against the bandwidth floor, plain torch and DeepSpeed's op, in one run.

``python tests/perf/random_ltd_kernels.py [--deepspeed] [--output docs/results/data]`` prints a table and
writes ``random_ltd_kernels_<device name>.csv``. Needs a GPU. Floor: the bytes that must be read and written
once, at the bandwidth of a device-to-device copy measured in the same run. Each call works on other memory
than the one before, so that nothing is found in the L2 cache; times are medians of CUDA events around eight
calls, which follow each other as the kernels of a training step do; ``copy_of_...`` is a plain copy of as
many bytes, timed likewise, which shows what a launch costs at this size. ``--deepspeed`` builds DeepSpeed's
op (a minute) and times it in processes of its own, since an illegal memory access of it would end this one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import conditions, copy_rate, median_ms, write_csv

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from ds_efficient.core.keys import Key  # noqa: E402
from ds_efficient.ops import random_ltd as ltd  # noqa: E402

CASES = ((2048, 8, 2048, 1024), (4096, 4, 4096, 2048), (32768, 1, 4096, 8192))  # S, B, H, kept
SAMPLING = (24, 8, 2048, 1024)  # layers, B, S, kept
SAMPLING_BAR = 0.03  # milliseconds
ROTATION = 160 << 20  # bytes of all copies together: three times the L2 cache of an H100
TOGETHER = 8  # calls between two events
KEY = Key(5).fold("random_ltd_kernels")
LAYOUT = {"batch_first": False}


class Case:
    """One hidden state (length, batch, features) in bfloat16 with everything that the calls read and write.

    Args:
        length, batch, features, keep: sizes.
    """

    def __init__(self, length: int, batch: int, features: int, keep: int) -> None:
        self.length = length
        self.x = torch.randn(length, batch, features, device="cuda", dtype=torch.bfloat16)
        self.part = torch.randn(keep, batch, features, device="cuda", dtype=torch.bfloat16)
        self.index = ltd.sample_tokens(length, keep, batch, key=KEY, device="cuda")
        # What torch's functions take: the index spread over the features, and rows of the flattened state.
        self.spread = self.index.T[..., None].expand(keep, batch, features)
        self.rows = (self.index.T * batch + torch.arange(batch, device="cuda")).flatten()
        self.short = self.index.to(torch.int32)
        self.made: object = None

    @classmethod
    def copies(cls, sizes: Sequence[int]) -> list[Case]:
        """Cases that together exceed the L2 cache several times; results stay alive, and move with them."""
        first = cls(*sizes)
        return [first, *(cls(*sizes) for _ in range(max(2, ROTATION // first.part.nbytes)))]

    def gather(self) -> None:
        """Ours."""
        self.made = ltd.gather_tokens(self.x, self.index, **LAYOUT)

    def put(self) -> None:
        """Ours, in place."""
        ltd.scatter_tokens(self.x, self.part, self.index, in_place=True, **LAYOUT)

    def scatter(self) -> None:
        """Ours, into new memory."""
        self.made = ltd.scatter_tokens(self.x, self.part, self.index, **LAYOUT)

    def split(self) -> None:
        """Ours: the backward pass of `scatter`."""
        self.made = torch.ops.ds_efficient.ltd_split(self.x, self.index, False, "auto")

    def copy_of_part(self) -> None:
        """A plain copy of as many bytes as gather moves: what a launch of this size can reach."""
        self.made = self.part.clone()

    def copy_of_all(self) -> None:
        """A plain copy of as many bytes as scatter moves."""
        self.made = self.x.clone()

    def torch_gather(self) -> None:
        """torch.gather."""
        self.made = torch.gather(self.x, 0, self.spread)

    def index_select(self) -> None:
        """torch.index_select of rows."""
        self.made = self.x.flatten(0, 1).index_select(0, self.rows)

    def torch_put(self) -> None:
        """Tensor.scatter_."""
        self.x.scatter_(0, self.spread, self.part)

    def index_copy(self) -> None:
        """Tensor.index_copy_ of rows."""
        self.x.flatten(0, 1).index_copy_(0, self.rows, self.part.flatten(0, 1))

    def torch_scatter(self) -> None:
        """torch.scatter."""
        self.made = torch.scatter(self.x, 0, self.spread, self.part)

    def copy_and_index_copy(self) -> None:
        """torch.index_copy of rows."""
        self.made = self.x.flatten(0, 1).index_copy(0, self.rows, self.part.flatten(0, 1))

    def deepspeed_gather(self, module: Any) -> None:
        """DeepSpeed's op."""
        self.made = module.token_gather(self.x, self.short, False)

    def deepspeed_put(self, module: Any) -> None:
        """DeepSpeed's op, in place."""
        module.token_scatter_(self.x, self.part, self.short, False)

    def graph(self, together: bool) -> Callable[[], object]:
        """The backward pass of a layer that does nothing, prepared."""
        x = self.x.detach().requires_grad_()
        if together:
            y = ltd.apply_to_kept(lambda part: part, x, self.index, **LAYOUT)
        else:
            y = ltd.scatter_tokens(x, ltd.gather_tokens(x, self.index, **LAYOUT), self.index, **LAYOUT)
        up = torch.randn_like(x)

        def run() -> None:
            self.made = torch.autograd.grad(y, x, up, retain_graph=True)

        return run


def measure_rows(sizes: Sequence[int], rate: float) -> Iterator[dict[str, Any]]:
    """One row for each op of a case."""
    copies = Case.copies(sizes)
    all_rows, kept_rows = copies[0].x.nbytes, copies[0].part.nbytes
    for op, size, method, competitors in (
        ("gather", 2 * kept_rows, "gather", ("copy_of_part", "torch_gather", "index_select")),
        ("scatter in place", 2 * kept_rows, "put", ("copy_of_part", "torch_put", "index_copy")),
        ("scatter", 2 * all_rows, "scatter", ("copy_of_all", "torch_scatter", "copy_and_index_copy")),
        ("split", 2 * all_rows + kept_rows, "split", ()),
    ):
        row = common(
            op, sizes, size, rate, median_ms([getattr(c, method) for c in copies], 40, together=TOGETHER)
        )
        for name in competitors:
            row[f"{name}_milliseconds"] = median_ms([getattr(c, name) for c in copies], 15, together=TOGETHER)
        yield row
    some = copies[:3]
    ours = median_ms([c.graph(True) for c in some], 40, together=TOGETHER)
    row = common("layer backward", sizes, 2 * (all_rows + kept_rows), rate, ours)
    row["gather_and_scatter_apart_milliseconds"] = median_ms(
        [c.graph(False) for c in some], 15, together=TOGETHER
    )
    yield row


def common(op: str, sizes: Sequence[int], size: int, rate: float, ours: float) -> dict[str, Any]:
    """The columns that all copies of rows have."""
    length, batch, features, keep = sizes
    return {
        "op": op, "shape": f"{length}x{batch}x{features}", "kept": keep, "dtype": "bfloat16",
        "milliseconds": ours, "gigabytes_per_second": size / ours / 1e6, "floor_milliseconds": size / rate,
        "times_the_floor": ours * rate / size,
    }  # fmt: skip


def measure_sampling() -> dict[str, Any]:
    """All layers in one launch, against sorting random numbers and torch.multinomial."""
    layers, batch, length, keep = SAMPLING
    keys = [KEY.fold(layer) for layer in range(layers)]
    ones = torch.ones(layers * batch, length, device="cuda")

    def argsort() -> object:
        return torch.rand_like(ones).argsort(1)[:, :keep].sort(1)

    def multinomial() -> object:
        return torch.multinomial(ones, keep).sort(1)

    sample = functools.partial(ltd.sample_layers, length, keep, batch, keys, "cuda")
    return {
        "op": "sample", "shape": f"{layers}x{batch}x{length}", "kept": keep, "dtype": "int64",
        "milliseconds": median_ms([sample], 40, together=TOGETHER),
        "bar_milliseconds": SAMPLING_BAR,
        "argsort_milliseconds": median_ms([argsort], 15, together=TOGETHER),
        "multinomial_milliseconds": median_ms([multinomial], 15, together=TOGETHER),
    }  # fmt: skip


def time_deepspeed(number: int) -> None:
    """Print DeepSpeed's times of a case as JSON; runs in a process of its own."""
    from deepspeed.ops.op_builder import RandomLTDBuilder

    module = RandomLTDBuilder().load(verbose=False)
    copies = Case.copies(CASES[number])
    found = {}
    for op, method in (("gather", "deepspeed_gather"), ("scatter in place", "deepspeed_put")):
        calls = [functools.partial(getattr(c, method), module) for c in copies]
        found[op] = median_ms(calls, 40, together=TOGETHER)
    copies[0].deepspeed_gather(module)
    found["equal"] = torch.equal(copies[0].made, ltd.gather_tokens(copies[0].x, copies[0].index, **LAYOUT))
    print(json.dumps(found))


def deepspeed_times(number: int) -> dict[str, Any]:
    """DeepSpeed's times of a case by op, or why there are none."""
    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}  # it cannot read 9.0a
    command = [sys.executable, __file__, "--deepspeed-case", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in (done.stdout if not done.returncode else done.stderr).splitlines() if line]
    if done.returncode:
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
        return {"failed": errors[-1][:200]}
    return json.loads(lines[-1])


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    others = ", ".join(
        f"{name.removesuffix('_milliseconds')} {value:.4f}"
        for name, value in row.items()
        if name.endswith("_milliseconds") and isinstance(value, float)
    )
    ratio = f" {row['times_the_floor']:.3f} x floor;" if "times_the_floor" in row else ""
    what = f"{row['op']:>16} {row['shape']:>13} keep {row['kept']:>5}"
    print(f"{what}: {row['milliseconds']:.4f} ms;{ratio} {others} {row.get('deepspeed', '')}", flush=True)


def main() -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description="Benchmark the kernels of token dropping.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "data")
    parser.add_argument("--deepspeed", action="store_true", help="time DeepSpeed's op too")
    parser.add_argument("--deepspeed-case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    if args.deepspeed_case is not None:
        time_deepspeed(args.deepspeed_case)
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    conditions_of_run = conditions(device)
    rate = copy_rate(together=TOGETHER)
    print(f"device-to-device copy: {rate / 1e9:.2f} TB/s, read and written bytes counted")
    rows = []
    for number, sizes in enumerate(CASES):
        theirs = deepspeed_times(number) if args.deepspeed else {}
        for row in measure_rows(sizes, rate):
            if row["op"] in theirs:
                row["deepspeed_milliseconds"] = theirs[row["op"]]
                row["deepspeed"] = "" if theirs["equal"] else "DeepSpeed's result is wrong"
            elif "failed" in theirs and row["op"] in ("gather", "scatter in place"):
                row["deepspeed"] = f"DeepSpeed's op fails: {theirs['failed']}"
            show(row)
            rows.append({**row, **conditions_of_run})
        torch.cuda.empty_cache()
    row = measure_sampling()
    show(row)
    rows.append({**row, **conditions_of_run})
    print(f"wrote {write_csv('random_ltd_kernels', rows, args.output, device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
