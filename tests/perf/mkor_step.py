"""What MKOR adds to a step of a GPT: preconditioning, updates of the factors, statistics, memory.

    python tests/perf/mkor_step.py [--step-ms 300] [--output docs/results/data]

Gradients and factors have the shapes of a model's linear layers (default: GPT-1.3B, 24 layers of
qkv 6144 x 2048, proj 2048 x 2048, fc1 8192 x 2048, fc2 2048 x 8192, with biases), one data-parallel rank,
bf16 gradients; statistics are the sums of the rows of the inputs, 16384 tokens a step. Writes
``mkor_step_<device name>.csv``, a row a case:

- ``precondition_ms``: every step, all layers in one call of `ds_efficient.ops.mkor_precondition`
- ``update_ms``: all factors, every ``interval`` steps; the factored form at its full rank
- ``statistics_ms``: the input sums, every ``interval`` steps
- ``added_ms``: precondition + (update + statistics) / interval; ``added_share`` of it in ``--step-ms``
- ``*_host_ms``: what the host needs to queue it
- ``state_bytes``: factors and operands; ``memory_share`` of 8 bytes a parameter of these layers
- ``scratch_bytes``: most bytes allocated during the calls above those before them, on a GPU
- ``operations``: of the preconditioning, multiplications and additions; ``gradient_bytes``: of all gradients

Times are medians. For a trial without a GPU: ``--device cpu --layers 1 --hidden 32 --tokens 64 --rank 4``.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import DATA, conditions, host_ms, medians_in_turns, write_csv
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from ds_efficient.core.keys import Key  # noqa: E402
from ds_efficient.ops import keyed_random, mkor  # noqa: E402
from ds_efficient.ops.mkor_factored import FactoredFactors  # noqa: E402
from ds_efficient.ops.mkor_precondition import LowRank, operations, precondition_  # noqa: E402

KEY = Key(11).fold("mkor_step")
RULE: dict[str, Any] = {"gamma": 0.95, "threshold": 10.0, "zeta": 0.9}
CASES = (
    ("factored", "both", torch.float32),
    ("factored", "right", torch.float32),
    ("dense", "both", torch.float32),
    ("dense", "right", torch.float32),
    ("dense", "both", torch.bfloat16),
)


class Model:
    """Gradients of the layers, and the vectors of an update.

    Args:
        arguments: of the command line.
        device: where they lie.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        h = arguments.hidden
        shapes = [(3 * h, h), (h, h), (4 * h, h), (h, 4 * h)] * arguments.layers
        dtype = torch.bfloat16
        self.device, self.shapes, self.interval = device, shapes, arguments.interval
        self.rank, self.tokens = arguments.rank, arguments.tokens
        self.weights = [
            keyed_random.normal(KEY.fold(index), shape, device=device).to(dtype)
            for index, shape in enumerate(shapes)
        ]
        self.biases = [
            keyed_random.normal(KEY.fold("bias").fold(index), (shape[0],), device=device).to(dtype)
            for index, shape in enumerate(shapes)
        ]
        widths = sorted({columns for _, columns in shapes})
        self.inputs = {width: torch.ones(self.tokens, width, dtype=dtype, device=device) for width in widths}
        self.parameters = sum(rows * columns + rows for rows, columns in shapes)

    def sizes(self, sides: str) -> list[int]:
        """Sizes of the factors."""
        used = [(rows, columns + 1) if sides == "both" else (columns + 1,) for rows, columns in self.shapes]
        return [size for pair in used for size in pair]

    def statistics(self) -> list[Tensor]:
        """The sums of the rows of all layers' inputs."""
        return [self.inputs[columns].sum(0, dtype=torch.float32) for _, columns in self.shapes]


class Case:
    """The factors of one form.

    Args:
        model: gradients.
        form: "factored" or "dense".
        sides: "both" or "right".
        dtype: of dense factors.
    """

    def __init__(self, model: Model, form: str, sides: str, dtype: torch.dtype) -> None:
        self.model, self.form, self.sides, self.dtype = model, form, sides, dtype
        sizes = model.sizes(sides)
        self.vectors = keyed_random.normal(KEY.fold("vectors"), (sum(sizes),), device=model.device)
        if form == "factored":
            operand = torch.bfloat16 if model.device.type == "cuda" else torch.float32
            self.factors = FactoredFactors(sizes, model.rank, device=model.device, operand_dtype=operand)
            self.state_bytes = self.factors.nbytes
        else:
            self.matrices = [torch.eye(size, dtype=dtype, device=model.device) for size in sizes]
            self.largest = torch.ones(len(sizes), device=model.device)
            self.state_bytes = sum(matrix.nbytes for matrix in self.matrices)
        self._step = 0

    def update(self) -> Tensor:
        """Take new vectors into all factors."""
        self._step += 1
        self.vectors = self.vectors.roll(self._step % 7 + 1)
        if self.form == "factored":
            outcome = self.factors.update_(self.vectors, **RULE)
            for index in range(len(self.factors)):
                self.factors.operand(index)  # made of the factor when asked for
            return outcome
        return mkor.update_(self.matrices, self.vectors, self.largest, **RULE)

    def _factor(self, index: int) -> Tensor | LowRank:
        return LowRank(self.factors.operand(index)) if self.form == "factored" else self.matrices[index]

    def precondition(self) -> Tensor:
        """Precondition all gradients."""
        model, step = self.model, 2 if self.sides == "both" else 1
        layers = range(len(model.shapes))
        lefts = [self._factor(2 * layer) if step == 2 else None for layer in layers]
        rights = [self._factor(step * layer + step - 1) for layer in layers]
        return precondition_(model.weights, model.biases, lefts, rights)

    def fill(self) -> None:
        """Update until a low-rank form is full."""
        for _ in range(self.model.rank + 1 if self.form == "factored" else 2):
            self.update()

    def operations(self) -> int:
        """Of the preconditioning."""
        rank = self.model.rank if self.form == "factored" else 0
        left = rank if self.sides == "both" else None
        return sum(operations(rows, columns + 1, left, rank) for rows, columns in self.model.shapes)


def scratch(calls: list[Callable[[], object]], device: torch.device) -> int | str:
    """Most bytes allocated during the calls, above those before."""
    if device.type != "cuda":
        return ""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(model: Model, step_ms: float) -> Iterator[dict[str, Any]]:
    """All rows."""
    device = model.device
    statistics = medians_in_turns({"sum": model.statistics}, device, blocks=3)["sum"]
    for form, sides, dtype in CASES:
        case = Case(model, form, sides, dtype)
        case.fill()
        calls = {"precondition": case.precondition, "update": case.update}
        times = medians_in_turns(calls, device, blocks=3, repeat=3)
        hosts = {name: host_ms(call, device) for name, call in calls.items()}
        most = scratch(list(calls.values()), device)
        added = times["precondition"] + (times["update"] + statistics) / model.interval
        applied = int((case.precondition()[:, 2] > 0).sum())
        yield {
            "form": form, "sides": sides, "rank": model.rank if form == "factored" else "",
            "state_dtype": str(dtype).removeprefix("torch."), "layers": len(model.shapes),
            "layers_preconditioned": applied, "parameters": model.parameters, "tokens": model.tokens,
            "precondition_ms": times["precondition"], "update_ms": times["update"], 
            "statistics_ms": statistics,
            "precondition_host_ms": hosts["precondition"], "update_host_ms": hosts["update"],
            "interval": model.interval, "added_ms": added, "step_ms": step_ms, "added_share": added / step_ms,
            "state_bytes": case.state_bytes, "memory_share": case.state_bytes / (8 * model.parameters),
            "scratch_bytes": most, "operations": case.operations(),
            "gradient_bytes": sum(weight.nbytes for weight in model.weights),
        }  # fmt: skip
        del case, calls
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    hosts = [row["precondition_host_ms"], row["update_host_ms"]]
    host = "".join(f", host {value:.2f}" for value in hosts if value != "")
    print(
        f"{row['form']} {row['state_dtype']}, {row['sides']}: precondition {row['precondition_ms']:.2f} ms, "
        f"update {row['update_ms']:.2f}, statistics {row['statistics_ms']:.2f}"
        f"{host}; adds {row['added_ms']:.2f} ms = {row['added_share']:.1%}, memory {row['memory_share']:.1%} "
        f"of Adam's, {row['layers_preconditioned']} of {row['layers']} layers",
        flush=True,
    )


def main() -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=DATA)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--step-ms", type=float, default=300.0, help="a step without MKOR, for the shares")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu with small sizes is for a trial", file=sys.stderr)
        return 2
    device = torch.device("cpu")
    if arguments.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    common = conditions(device)
    rows = []
    for row in measure(Model(arguments, device), arguments.step_ms):
        show(row)
        rows.append({**row, **common})
        write_csv("mkor_step", rows, arguments.output, device)  # a run that is stopped keeps what it has
    print(f"wrote {write_csv('mkor_step', rows, arguments.output, device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
