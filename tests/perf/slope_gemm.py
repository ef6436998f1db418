"""Speed of the 2:4 sparse products of SLoPe against the dense product and bare cuSPARSELt, in one run.

``python tests/perf/slope_gemm.py [--shapes 4096x4096x8192,...] [--exhaustive]`` prints a table and writes
``slope_gemm_<device name>.csv``. A shape is out x in x tokens; each is measured forwards (the matrix out x
in) and backwards (in x out). Times are medians in milliseconds:

- dense: ``torch.nn.functional.linear``
- bare: cusparseLtMatmul in a loop on prepared pointers, with the algorithm that the library's search found
- ours: `ds_efficient.ops.cusparselt.multiply` as `tune` chose; by CUDA events, and by the wall clock

All candidates of tiles and token splits are printed. Nothing is read from or written to the user's file of
measured plans.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import conditions, write_csv

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from ds_efficient.ops import cusparselt_cache as caches  # noqa: E402
from ds_efficient.ops import cusparselt_library as lt  # noqa: E402
from ds_efficient.ops import cusparselt_plans as plans  # noqa: E402
from ds_efficient.ops.cusparselt import SparseOperand, multiply, tune, unavailable  # noqa: E402
from ds_efficient.ops.cusparselt_tuning import Bench  # noqa: E402

SHAPES = (
    "1024x1024x8192,4096x1024x8192,2560x2560x8192,10240x2560x8192,4096x4096x8192,14336x4096x8192,"
    "5120x5120x8192,20480x5120x8192,7168x28672x16384"
)


def bare_call(bench: Bench, operands: list[SparseOperand]) -> tuple[Callable[[int], object], plans.Plan]:
    """The library's product on prepared arguments, and the plan that holds its structures."""
    shape = operands[0].layout.tile_shape(bench.tokens)
    plan = plans.Plan(lt.load(), shape, iterations=plans.SEARCH_ITERATIONS)
    addresses = [
        (operand.buffer.data_ptr(), x.data_ptr(), y.data_ptr())
        for operand, x, y in zip(operands, bench.xs, bench.ys, strict=True)
    ]
    plan.search(*addresses[0], bench.lane)
    if plan.workspace > bench.lane.size:
        bench.lane.reserve(plan.workspace)
    prepared = [
        (
            plan._handle, plan._address, plans._ALPHA, operand, x, plans._BETA, y, y, bench.lane.workspace,
            bench.lane.streams, 1,
        )
        for operand, x, y in addresses
    ]  # fmt: skip
    function, count = plan._matmul, len(prepared)
    return lambda index: function(*prepared[index % count]), plan


def wall_ms(call: Callable[[int], object], calls: int) -> float:
    """Milliseconds a call, back to back, until the GPU has finished."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for index in range(calls):
        call(index)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def host_us(call: Callable[[int], object]) -> float:
    """Microseconds that the host needs to queue one call: the best of several rounds of 50."""
    rounds = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(50):
            call(index)
        rounds.append(1e6 * (time.perf_counter() - start) / 50)
    torch.cuda.synchronize()
    return min(rounds)


def measure(rows: int, k: int, tokens: int, name: str, exhaustive: bool) -> dict[str, Any]:
    """One row of the table."""
    dtype, device = torch.bfloat16, torch.device("cuda", torch.cuda.current_device())
    bench = Bench(rows, k, tokens, dtype, device)
    candidates = bench.measure(exhaustive=exhaustive)
    caches.cache.put(
        {
            caches.algorithm_key(candidate.shape): candidate.algorithm._asdict()
            for candidate in candidates
            if candidate.algorithm is not None
        }
    )
    choice = tune(rows, k, tokens, dtype, device)
    ours = bench.operands(choice.tiles)
    whole = ours if choice.tiles == 1 else bench.operands(1)
    weights = [weight.t() for weight in bench.weights_t]
    count = len(bench.xs)
    bare, plan = bare_call(bench, whole)

    def dense(index: int) -> object:
        return F.linear(bench.xs[index % count], weights[index % count])

    def sparse(index: int) -> object:
        return multiply(ours[index % count], bench.xs[index % count])

    times: dict[str, list[float]] = {"dense": [], "bare": [], "ours": []}
    for _ in range(5):  # in turns: clocks vary with heat
        for label, call in (("dense", dense), ("bare", bare), ("ours", sparse)):
            times[label] += bench.times(call, 1)
    dense_ms, bare_ms, ours_ms = (statistics.median(times[label]) for label in ("dense", "bare", "ours"))
    calls = max(5, min(100, int(50 / ours_ms)))
    wall = statistics.median(wall_ms(sparse, calls) for _ in range(3))
    chosen = [c for c in candidates if (c.tiles, c.token_splits) == (choice.tiles, choice.token_splits)]
    small = (rows, k) == (1024, 1024)
    row: dict[str, Any] = {
        "op": name, "dtype": "bfloat16", "rows": rows, "k": k, "tokens": tokens, "milliseconds": ours_ms,
        "wall_milliseconds": wall, "dense_milliseconds": dense_ms, "bare_milliseconds": bare_ms,
        "speedup": dense_ms / ours_ms, "over_bare": ours_ms / bare_ms, "choice": choice.backend,
        "tiles": choice.tiles, "token_splits": choice.token_splits,
        "algorithm": _text(chosen[0].algorithm if chosen else None), "bare_algorithm": _text(plan.algorithm),
        "candidates": json.dumps(
            {f"{c.tiles} tiles, {c.token_splits} splits": round(c.milliseconds, 4) for c in candidates}
        ),
        "host_microseconds": host_us(sparse) if small else "",
        "bare_host_microseconds": host_us(bare) if small else "",
        "dense_host_microseconds": host_us(dense) if small else "",
    }  # fmt: skip
    torch.cuda.synchronize()
    plan.destroy()
    return row


def _text(algorithm: plans.Algorithm | None) -> str:
    return "default" if algorithm is None else "/".join(map(str, algorithm))


def show(row: dict[str, Any], seconds: float) -> None:
    """Print a row."""
    print(
        f"{row['op']:>8} {row['rows']:>6}x{row['k']:<6} {row['tokens']:>6} tokens: dense "
        f"{row['dense_milliseconds']:.4f}, bare {row['bare_milliseconds']:.4f}, ours "
        f"{row['milliseconds']:.4f} (wall {row['wall_milliseconds']:.4f}) ms; speed-up {row['speedup']:.2f}, "
        f"{row['over_bare']:.3f} of bare; {row['choice']}, tiles {row['tiles']}, splits "
        f"{row['token_splits']}, algorithm {row['algorithm']} [{seconds:.1f} s]\n"
        f"           candidates: {row['candidates']}",
        flush=True,
    )
    if row["host_microseconds"] != "":
        print(
            f"           host microseconds a call: ours {row['host_microseconds']:.1f}, bare "
            f"{row['bare_host_microseconds']:.1f}, F.linear {row['dense_host_microseconds']:.1f}",
            flush=True,
        )


def cases(text: str) -> list[tuple[int, int, int, str]]:
    """Rows, columns, tokens and name of what is measured; a square matrix only once."""
    found = []
    for shape in text.split(","):
        out_features, in_features, tokens = map(int, shape.split("x"))
        found.append((out_features, in_features, tokens, "forward"))
        if out_features != in_features:
            found.append((in_features, out_features, tokens, "backward"))
    return found


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the CSV."""
    device = torch.device("cuda", torch.cuda.current_device())
    common = {"cusparselt": lt.load().version_text, **conditions(device)}
    print(f"wrote {write_csv('slope_gemm', [{**row, **common} for row in rows], folder, device)}")


def main() -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description="Benchmark the 2:4 sparse products.")
    parser.add_argument("--shapes", default=SHAPES, help="out x in x tokens, separated by commas")
    parser.add_argument("--exhaustive", action="store_true", help="token splits with every number of tiles")
    parser.add_argument("--search-iterations", type=int, default=3, help="runs of each algorithm in a search")
    parser.add_argument("--limit", type=float, default=55.0, help="seconds after which no shape is begun")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "data")
    args = parser.parse_args()
    plans.SEARCH_ITERATIONS = args.search_iterations
    with tempfile.TemporaryDirectory() as folder:
        os.environ[caches.VARIABLE] = str(Path(folder, "tuning.json"))
        reason = unavailable("cuda")
        if reason is not None:
            print(f"the sparse product does not run here: {reason}", file=sys.stderr)
            return 2
        begin, rows = time.perf_counter(), []
        for rows_, k, tokens, name in cases(args.shapes):
            start = time.perf_counter()
            if start - begin > args.limit:
                print(f"{name} {rows_}x{k} and what follows: not measured, over {args.limit:.0f} s")
                break
            rows.append(measure(rows_, k, tokens, name, args.exhaustive))
            show(rows[-1], time.perf_counter() - start)
        if rows:
            write(rows, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
