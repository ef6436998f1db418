"""Speed of the kernels of N:M sparse matrices against plain torch, a gather and the bandwidth floor.

``python tests/perf/slope_kernels.py [--output docs/results/data]`` prints a table and writes
``slope_kernels_<device name>.csv``. Needs a GPU. Floor: the bytes that must be read and written once, at the
bandwidth of a device-to-device copy measured in the same run. Each call works on another copy of its data
than the one before, so that nothing is found in the L2 cache; times are medians of CUDA events around single
calls.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import benchmark, copy_rate, median_ms

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from ds_efficient.core.keys import Key  # noqa: E402
from ds_efficient.ops import keyed_random, slope  # noqa: E402

CASES = (
    (4096, 4096, 2, 4, torch.bfloat16), (14336, 4096, 2, 4, torch.bfloat16),
    (20480, 5120, 2, 4, torch.bfloat16), (5120, 20480, 2, 4, torch.bfloat16),
    (4096, 4096, 2, 8, torch.bfloat16), (4096, 4096, 2, 4, torch.float32),
)  # fmt: skip
ROTATION = 160 << 20  # bytes of all copies together: three times the L2 cache of an H100
KEY = Key(3).fold("slope_kernels")


class Case:
    """One matrix with everything that the kernels read and write.

    Args:
        rows, columns: out and in.
        n, m: pattern.
        dtype: of the values.
    """

    def __init__(self, rows: int, columns: int, n: int, m: int, dtype: torch.dtype) -> None:
        self.pattern: dict[str, Any] = {"n": n, "m": m}
        self.columns = columns
        order = keyed_random.uniform(KEY, (rows, columns // m, m), device="cuda").argsort(dim=2)
        mask = torch.zeros(order.shape, dtype=torch.bool, device="cuda").scatter_(2, order[..., :n], True)
        self.mask = slope.pack_mask(mask.view(rows, columns))
        self.values = keyed_random.normal(KEY, (rows, columns // m * n), device="cuda").to(dtype)
        self.chosen = slope.select_columns(self.values, self.mask, columns, **self.pattern)
        self.dense = self.values.new_empty(rows, columns)
        self.forward = self.values.new_empty(rows, columns // 2)
        self.backward = self.values.new_empty(columns, rows // 2)
        self.index: torch.Tensor | None = None

    def copy(self) -> Case:
        """Another copy of all data except the gather's index, which is read once by each gather anyway."""
        other = object.__new__(Case)
        other.__dict__ = {
            name: value.clone() if isinstance(value, torch.Tensor) and name != "index" else value
            for name, value in self.__dict__.items()
        }
        return other

    def refresh(self, backend: str = "auto") -> None:
        """Both operands."""
        self.write_forward(backend)
        self.write_backward(backend)

    def write_forward(self, backend: str = "auto") -> None:
        """The forward operand."""
        slope.write_operand(
            self.values, self.mask, self.forward, self.columns, **self.pattern, backend=backend
        )

    def write_backward(self, backend: str = "auto") -> None:
        """The operand of the twice pruned transpose."""
        slope.write_operand(
            self.values, self.mask, self.backward, self.columns, **self.pattern, backward_mask=self.chosen,
            backend=backend,
        )  # fmt: skip

    def decompress(self, backend: str = "auto") -> None:
        """The dense weight of the forward pass."""
        slope.decompress(
            self.values, self.mask, self.columns, **self.pattern, out=self.dense, backend=backend
        )

    def decompress_twice(self, backend: str = "auto") -> None:
        """The dense weight of the input gradient."""
        slope.decompress(
            self.values, self.mask, self.columns, **self.pattern, out=self.dense, backend=backend,
            backward_mask=self.chosen,
        )  # fmt: skip

    def compress(self, backend: str = "auto") -> torch.Tensor:
        """The compact form of a dense gradient."""
        return slope.compress(self.dense, self.mask, **self.pattern, backend=backend)

    def select(self, backend: str = "auto") -> torch.Tensor:
        """The column pass."""
        return slope.select_columns(self.values, self.mask, self.columns, **self.pattern, backend=backend)

    def gather(self, source: torch.Tensor, count: int) -> torch.Tensor:
        """What a gather of ``count`` elements by int32 indices in irregular order costs."""
        assert self.index is not None
        return source.view(-1).index_select(0, self.index[:count])

    def ops(self) -> Iterator[tuple[str, str, int, tuple[torch.Tensor, int] | None]]:
        """Name, method, bytes of the floor, and source and count of the gather that does the same."""
        values, masks, dense = self.values.nbytes, self.mask.nbytes, self.dense.nbytes
        operand, kept = self.forward.nbytes, self.values.numel()
        copied = self.pattern in ({"n": 2, "m": 4}, {"n": 1, "m": 2})
        yield "forward operand", "write_forward", values + operand + (0 if copied else masks), None
        yield (
            "backward operand", "write_backward", values + operand + 2 * masks,
            (self.values, self.backward.numel()),
        )  # fmt: skip
        yield "both operands", "refresh", 2 * (values + operand) + (2 if copied else 3) * masks, None
        yield "decompress", "decompress", values + masks + dense, None
        yield "decompress twice", "decompress_twice", values + 2 * masks + dense, None
        yield "compress", "compress", values + masks + dense, (self.dense, kept)
        yield "select columns", "select", values + 2 * masks, None


def measure(device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for each kernel and case."""
    rate = copy_rate(device)
    print(f"device-to-device copy: {rate / 1e9:.2f} TB/s, read and written bytes counted")
    for rows, columns, n, m, dtype in CASES:
        case = Case(rows, columns, n, m, dtype)
        # Columns of the mask in turn, which scatters the reads as a transposed operand does.
        order = torch.arange(case.backward.numel(), device="cuda") * rows % case.values.numel()
        case.index = order.to(torch.int32)
        smallest = case.values.nbytes + case.forward.nbytes
        copies = [case, *(case.copy() for _ in range(max(1, ROTATION // smallest)))]
        for op, method, size, gather in case.ops():
            ours = median_ms([getattr(c, method) for c in copies], 40)
            plain = median_ms([functools.partial(getattr(c, method), "reference") for c in copies[:2]], 3)
            row: dict[str, Any] = {
                "op": op, "pattern": f"{n}:{m}", "dtype": str(dtype).removeprefix("torch."),
                "shape": f"{rows}x{columns}", "milliseconds": ours, "gigabytes_per_second": size / ours / 1e6,
                "floor_milliseconds": size / rate, "fraction_of_floor": size / rate / ours,
                "reference_milliseconds": plain, "speedup_over_reference": plain / ours,
            }  # fmt: skip
            if gather is not None:
                name = "values" if gather[0] is case.values else "dense"
                calls = [functools.partial(c.gather, getattr(c, name), gather[1]) for c in copies]
                row["gather_milliseconds"] = median_ms(calls, 20)
                row["speedup_over_gather"] = row["gather_milliseconds"] / ours
            yield row


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    gather = f", gather {row['gather_milliseconds']:.4f} ms" if "gather_milliseconds" in row else ""
    what = f"{row['op']:>16} {row['pattern']:>4} {row['dtype']:>8} {row['shape']:>11}"
    print(
        f"{what}: {row['milliseconds']:8.4f} ms, {row['gigabytes_per_second']:6.0f} GB/s, "
        f"{100 * row['fraction_of_floor']:5.1f} % of the floor's speed, "
        f"plain torch {row['reference_milliseconds']:8.3f} ms{gather}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(benchmark("slope_kernels", "Benchmark the kernels of N:M sparse matrices.", measure, show))
