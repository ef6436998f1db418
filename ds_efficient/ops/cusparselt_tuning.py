"""Measure whether the sparse product of a shape pays, and the fastest way of running it.

Each shape is measured once for a GPU and a version of the library; the result is kept in the file that
`ds_efficient.ops.cusparselt_cache` describes. The product may run as one call, in tiles (equal parts of the
rows, each a matrix of its own: square tiles of a wide layer, as in the SLoPe paper, arXiv 2405.16325), and in
equal parts of the tokens.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.ops import cusparselt_library as lt
from ds_efficient.ops import cusparselt_plans as plans
from ds_efficient.ops.cusparselt_cache import (
    Tuned,
    algorithm_key,
    cache,
    choice_key,
    kept_algorithm,
    kept_choice,
)
from ds_efficient.ops.cusparselt_multiply import TOKEN_MULTIPLE, new_starts, padded_tokens
from ds_efficient.ops.cusparselt_operand import (
    ROW_MULTIPLE,
    SparseOperand,
    find_layout,
    on_device,
    shape_problem,
    with_index,
)
from ds_efficient.ops.cusparselt_plans import Algorithm, Plan, PlanShape
from ds_efficient.ops.cusparselt_probe import (
    TOLERANCES,
    random_normal,
    random_pattern,
    relative_error,
    unavailable,
)

logger = logging.getLogger(__name__)

TOKEN_SPLITS = (1, 2, 4)
MARGIN = 1.02  # a less plain way must be faster than this
# A weight in tiles cannot live in its operand (`ds_efficient.slope.operands`) and costs a copy a step.
TILE_MARGIN = 1.06
_CALLS, _BATCHES, _FINAL_BATCHES = 10, 3, 7
_MAX_COPIES = 4
_CHECKED_TOKENS = 256


class Choice(NamedTuple):
    """How to run a layer's product.

    Attributes:
        backend: ``"cusparselt"`` or ``"dense"``.
        tiles, token_splits: of the fastest sparse way, also where the backend is dense.
        speedup: of the sparse product over the dense one.
        milliseconds, dense_milliseconds: their times.
    """

    backend: str
    tiles: int
    token_splits: int
    speedup: float
    milliseconds: float
    dense_milliseconds: float


class Candidate(NamedTuple):
    """A way of running a sparse product, and its time.

    Attributes:
        tiles, token_splits: see the module.
        milliseconds: median of the measured times.
        shape: of the plan of one call.
        algorithm: found by the library's search, or None for its default.
    """

    tiles: int
    token_splits: int
    milliseconds: float
    shape: PlanShape
    algorithm: Algorithm | None


def tune(rows: int, k: int, tokens: int, dtype: torch.dtype, device: torch.device | str) -> Choice:
    """How to compute x S^T for x (tokens, k) and S (rows, k) 2:4 sparse: known, or measured now.

    Measuring takes up to some seconds, needs memory for a few copies of the matrices, and draws by key.

    Args:
        rows, k: shape of the sparse matrix; rows a multiple of 16, k of 32.
        tokens: rows of x, >= 1.
        dtype: float16 or bfloat16.
        device: a CUDA device.

    Raises:
        UserError: the shape or dtype is not possible, or there is not enough memory to measure.
        OpBuildError: the sparse product does not run on the device; says why.
    """
    problem = shape_problem(rows, k, dtype)
    if problem is None and tokens < 1:
        problem = f"tokens={tokens} is out of range; allowed: 1 and more"
    if problem is not None:
        raise UserError(problem)
    reason = unavailable(device)
    if reason is not None:
        raise OpBuildError(f'{reason}; remedy: "backend": "dense"')
    place = with_index(device)
    key = choice_key(rows, k, padded_tokens(tokens), dtype, place.index or 0)
    known = kept_choice(key)
    with on_device(place.index or 0):
        if known is not None and _usable(known, rows, k, tokens, dtype, place):
            return decide(known)
        try:
            return _tune_now(key, rows, k, tokens, dtype, place)
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"not enough memory on {place} to compare the sparse and the dense product of {rows}x{k} "
                f'with {tokens} tokens; set "backend": "cusparselt" or "dense" instead of "auto"'
            ) from error


def decide(known: Tuned) -> Choice:
    """The choice that follows from measured times: sparse unless that is slower than dense."""
    speedup = known.dense_milliseconds / known.milliseconds if known.milliseconds > 0 else 0.0
    backend = "cusparselt" if speedup >= 1.0 else "dense"
    return Choice(
        backend, known.tiles, known.token_splits, speedup, known.milliseconds, known.dense_milliseconds
    )


def tile_counts(rows: int, k: int) -> list[int]:
    """Numbers of tiles worth trying: the whole matrix, and for more rows than columns halves and squares."""
    counts = {1, 2, round(rows / k)} if rows > k else {1}
    return sorted(
        count for count in counts if count > 0 and rows % count == 0 and rows // count % ROW_MULTIPLE == 0
    )


def token_splits(tokens: int) -> list[int]:
    """Numbers of parts of the (padded) tokens worth trying."""
    padded = padded_tokens(tokens)
    return [splits for splits in TOKEN_SPLITS if padded % (splits * TOKEN_MULTIPLE) == 0]


def plainest(candidates: Sequence[Candidate]) -> Candidate:
    """The way with the fewest calls among those within 2 % of the fastest; tiles must gain 6 %."""
    whole = [candidate for candidate in candidates if candidate.tiles == 1]
    fastest = min(candidate.milliseconds for candidate in candidates)
    if whole and min(candidate.milliseconds for candidate in whole) <= TILE_MARGIN * fastest:
        candidates = whole
    limit = MARGIN * min(candidate.milliseconds for candidate in candidates)
    return min(
        (candidate for candidate in candidates if candidate.milliseconds <= limit),
        key=lambda candidate: (candidate.tiles * candidate.token_splits, candidate.token_splits),
    )


def _usable(known: Tuned, rows: int, k: int, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the library still takes what was kept; the plan is made in passing."""
    padded = padded_tokens(tokens)
    if known.tiles not in tile_counts(rows, k) or known.token_splits not in token_splits(tokens):
        return False
    if not (math.isfinite(known.milliseconds) and known.milliseconds > 0 and known.dense_milliseconds > 0):
        return False
    shape = find_layout(rows, k, dtype, device, known.tiles).tile_shape(padded // known.token_splits)
    algorithm = kept_algorithm(shape)
    if algorithm is None:
        return True  # the library's default was the fastest, or its search failed
    if plans.find_plan(shape, algorithm).algorithm is None:
        cache.forget(algorithm_key(shape))
        return False
    return True


def _tune_now(key: str, rows: int, k: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Choice:
    bench = Bench(rows, k, padded_tokens(tokens), dtype, device)
    candidates = bench.measure()
    if not candidates:
        logger.warning("no sparse product of %dx%d with %d tokens worked: dense", rows, k, tokens)
        return Choice("dense", 1, 1, 0.0, math.inf, bench.dense_milliseconds())
    best = plainest(candidates)
    milliseconds, dense = bench.compare(best)
    known = Tuned(best.tiles, best.token_splits, milliseconds, dense)
    entries = {key: known._asdict()}
    for candidate in candidates:
        if candidate.algorithm is not None:
            entries[algorithm_key(candidate.shape)] = candidate.algorithm._asdict()
    cache.put(entries)
    if best.algorithm is not None:
        plans.replace_plan(best.shape, best.algorithm)
    find_layout(rows, k, dtype, device, best.tiles).products.clear()  # what ran untuned is resolved again
    choice = decide(known)
    logger.info(
        "slope: %dx%d, %d tokens, %s: sparse %.4f ms (algorithm %s, tiles %d, token splits %d), "
        "dense %.4f ms, speed-up %.2f: %s",
        rows, k, tokens, str(dtype).removeprefix("torch."), milliseconds,
        "default" if best.algorithm is None else "/".join(map(str, best.algorithm)),
        best.tiles, best.token_splits, dense, choice.speedup, choice.backend,
    )  # fmt: skip
    return choice


class Bench:
    """The tensors and the timing of one shape.

    Args:
        rows, k: shape of the sparse matrix.
        tokens: a multiple of 16.
        dtype: float16 or bfloat16.
        device: with index; the current device.
    """

    def __init__(self, rows: int, k: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.k, self.tokens, self.dtype, self.device = rows, k, tokens, dtype, device
        bytes_a_call = 2 * (tokens * (rows + k) + rows * k // 2)
        # In training nobody finds the last call's tensors in the cache.
        copies = min(_MAX_COPIES, 1 + 2 * cache_bytes(device) // bytes_a_call)
        x = random_normal("x", (tokens, k), dtype=dtype, device=device)
        weight = random_normal("weight", (rows, k), dtype=dtype, device=device)
        self.xs = [x, *(x.clone() for _ in range(copies - 1))]
        self.weights_t = [weight.t(), *(weight.clone().t() for _ in range(copies - 1))]
        self.ys = [torch.empty(tokens, rows, dtype=dtype, device=device) for _ in range(copies)]
        self.pattern = random_pattern(rows, k, dtype=dtype, device=device)
        self.lane = plans.current_lane(device, device.index or 0)

    def measure(self, *, exhaustive: bool = False) -> list[Candidate]:
        """Time the ways of running the product; those that fail or give wrong numbers are left out.

        Parts of the tokens are tried for the fastest number of tiles only, unless ``exhaustive``.
        """
        candidates: list[Candidate] = []
        counts, splits = tile_counts(self.rows, self.k), token_splits(self.tokens)
        for tiles in counts:
            operands = self.operands(tiles)
            for split in splits if exhaustive else splits[:1]:
                candidates += self.candidate(operands, split)
            del operands
        if not exhaustive and candidates:
            operands = self.operands(min(candidates, key=lambda candidate: candidate.milliseconds).tiles)
            for split in splits[1:]:
                candidates += self.candidate(operands, split)
        return candidates

    def operands(self, tiles: int) -> list[SparseOperand]:
        """The sparse matrix in ``tiles`` tiles, as many copies as there are of x."""
        first = SparseOperand(self.rows, self.k, dtype=self.dtype, device=self.device, tiles=tiles)
        first.set_pattern(self.pattern)
        others = [
            SparseOperand(self.rows, self.k, dtype=self.dtype, device=self.device, tiles=tiles)
            for _ in self.xs[1:]
        ]
        for other in others:
            other.buffer.copy_(first.buffer)
            other.has_pattern = True
        return [first, *others]

    def candidate(self, operands: list[SparseOperand], splits: int) -> list[Candidate]:
        """The candidate with these operands and parts of the tokens, if it works."""
        layout = operands[0].layout
        shape = layout.tile_shape(self.tokens // splits)
        try:
            algorithm = kept_algorithm(shape) or plans.search(
                shape, operands[0].buffer.data_ptr(), self.xs[0].data_ptr(), self.ys[0].data_ptr(), self.lane
            )
            plan = plans.create_plan(shape, algorithm)
        except lt.LtError as error:
            logger.warning("cuSPARSELt cannot run %s: %s", shape.text, error)
            return []
        try:
            call = self.sparse_call(plan, operands, splits)
            milliseconds = statistics.median(self.times(call, _BATCHES))
            difference = self.error(call)
        finally:
            torch.cuda.synchronize(self.device)
            plan.destroy()
        # Both products are rounded here, so this is wider than the check at start-up.
        if not difference <= 5 * TOLERANCES[self.dtype]:
            logger.warning("cuSPARSELt's product for %s is wrong by %.1e: left out", shape.text, difference)
            return []
        return [Candidate(layout.tiles, splits, milliseconds, shape, plan.algorithm)]

    def sparse_call(self, plan: Plan, operands: list[SparseOperand], splits: int) -> Callable[[int], None]:
        """A function that queues the whole product with the i-th copies."""
        starts = new_starts(operands[0].layout, self.tokens, splits)
        run, lane = plan.run, self.lane

        def call(index: int) -> None:
            copy = index % len(operands)
            operand, x = operands[copy].buffer.data_ptr(), self.xs[copy].data_ptr()
            y = self.ys[copy].data_ptr()
            for start_operand, start_x, start_y in starts:
                run(operand + start_operand, x + start_x, y + start_y, lane)

        return call

    def dense_call(self, index: int) -> None:
        """Queue the dense product with the i-th copies: what F.linear runs, without its allocation."""
        place = index % len(self.xs)
        torch.mm(self.xs[place], self.weights_t[place], out=self.ys[place])

    def times(self, call: Callable[[int], None], batches: int) -> list[float]:
        """Milliseconds of a call, one number for each batch of calls."""
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for index in range(3):
            call(index)
        found = []
        for _ in range(batches):
            first.record()
            for index in range(_CALLS):
                call(index)
            last.record()
            last.synchronize()
            found.append(first.elapsed_time(last) / _CALLS)
        return found

    def dense_milliseconds(self) -> float:
        """Median time of the dense product."""
        return statistics.median(self.times(self.dense_call, _FINAL_BATCHES))

    def compare(self, candidate: Candidate) -> tuple[float, float]:
        """Times of a candidate and of the dense product, measured in turns: clocks vary with heat."""
        plan = plans.create_plan(candidate.shape, candidate.algorithm)
        call = self.sparse_call(plan, self.operands(candidate.tiles), candidate.token_splits)
        sparse: list[float] = []
        dense: list[float] = []
        for _ in range(_FINAL_BATCHES):
            sparse += self.times(call, 1)
            dense += self.times(self.dense_call, 1)
        torch.cuda.synchronize(self.device)
        plan.destroy()
        return statistics.median(sparse), statistics.median(dense)

    def error(self, call: Callable[[int], None]) -> float:
        """Relative error of the sparse product for the first and the last tokens."""
        call(0)
        count = min(_CHECKED_TOKENS, self.tokens)
        x = torch.cat([self.xs[0][:count], self.xs[0][-count:]])
        y = torch.cat([self.ys[0][:count], self.ys[0][-count:]])
        return relative_error(y, torch.mm(x, self.pattern.t()))


def cache_bytes(device: torch.device) -> int:
    """Size of a GPU's last-level cache."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)
