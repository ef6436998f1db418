"""Each layer's compression setting: the smallest total size under a common error budget.

Source: L-GreCo (arXiv 2210.17357), section 4 and Algorithm 1. Given error(l, c) and size(l, c) of option c of
layer l,

    minimise sum_l size(l, c_l)  subject to  sum_l error(l, c_l) <= budget.

The budget is divided into D buckets and the errors are rounded to whole ones, up, so that no plan exceeds the
budget; the paper leaves the rounding open. Rounding up can make feasible plans look infeasible, the default
among them, so the result of the dynamic programme is compared with the default and with the plan of the
least error, whose errors are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import lgreco_planner

Row: TypeAlias = "Tensor | NDArray[np.float64] | Sequence[float]"
Table: TypeAlias = "Tensor | NDArray[np.float64] | Sequence[Row]"
Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

_LARGEST = 1e290  # finite errors above it count as infinite: their sums could not be taken
TOLERANCE = 1e-9  # of the budget: what the sum of true errors may exceed it by, for rounding of sums


class Mixed(NamedTuple):
    """Options of several compressors side by side; see `mix_options`.

    Attributes:
        errors: one vector of errors a layer.
        sizes: one vector of sizes a layer.
        origins: one (options, 2) int64 a layer: compressor and the number of the option in its own table.
    """

    errors: list[Floats]
    sizes: list[Floats]
    origins: list[Integers]


def plan_compression(
    errors: Table,
    sizes: Table,
    budget: float,
    *,
    buckets: int = 10_000,
    default: int | Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Choose one option for each layer: least total size, total error within the budget.

    Args:
        errors: (L, k), or L vectors of any lengths: error of each option, >= 0. NaN and infinity mark options
            that cannot be used.
        sizes: of the same shape: what each option costs, finite and >= 0 (bytes; seconds for the time
            objective, see `ds_efficient.lgreco.timing`). Sizes of unusable options are not read.
        budget: largest sum of errors, usually `error_budget` of the default.
        buckets: number D of steps that the budget is divided into.
        default: the option, of all layers or of each, that the plan must not cost more than; without one only
            the budget binds.
        backend: as in `ds_efficient.ops.lgreco_planner.plan`.

    Returns:
        (L,) int64 on the CPU, the option of each layer. Always: the sum of the true errors is at most
        budget * (1 + 1e-9), and the total size is at most that of the default, if the default is within the
        budget. No plan whose errors sum to at most budget * (1 - L / D) costs less, and none at all where the
        errors are multiples of budget / D. A larger budget never costs more, nor does one more option unless
        the budget is less than L buckets above the least possible error. Of equal sizes the smaller error is
        preferred; the same arguments give the same plan on every machine.

    Raises:
        UserError: an argument does not fit, or no plan is within the budget; says what the least error is.
        OpBuildError: ``backend="native"`` and the compiled code cannot be built.
    """
    table, cost = _tables(errors, sizes)
    budget = _checked_budget(budget)
    if isinstance(buckets, bool) or not isinstance(buckets, int) or buckets < 1:
        raise UserError(f"buckets={buckets!r} is not allowed; it must be an integer >= 1")
    usual = None if default is None else _checked_default(default, table)
    layers = np.arange(len(table))
    plans = [_optimise(table, cost, budget, buckets, backend), usual, _least_error(table, cost)]
    found: list[tuple[float, float, int, Integers]] = []
    for order, plan in enumerate(plans):
        if plan is None:
            continue
        error = math.fsum(table[layers, plan])
        if error <= budget * (1 + TOLERANCE):
            found.append((math.fsum(cost[layers, plan]), error, order, plan))
    if not found:
        _refuse(table, budget)
    return torch.from_numpy(min(found, key=lambda one: one[:3])[3])


def error_budget(errors: Table, default: int | Sequence[int] | Tensor, *, alpha: float = 1.0) -> float:
    """The budget alpha * sum_l error(l, default_l): the error of a setting known to keep the accuracy.

    Args:
        errors: as in `plan_compression`.
        default: option of all layers or of each, for example what `Accordion` picks.
        alpha: factor, > 0.

    Raises:
        UserError: an argument does not fit, or a default is an option that cannot be used.
    """
    table, _ = _tables(errors, None)
    choice = _checked_default(default, table)
    chosen = table[np.arange(len(table)), choice]
    if not np.isfinite(chosen).all():
        layer = int(np.flatnonzero(~np.isfinite(chosen))[0])
        raise UserError(
            f"default: option {choice[layer]} of layer {layer} has no finite error; leave the layer out of "
            "the table or choose a default whose error is known"
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha={alpha} is not allowed; it must be > 0")
    return alpha * math.fsum(chosen)


def mix_options(tables: Sequence[tuple[Table, Table]]) -> Mixed:
    """Put the options of several compressors side by side, so that each layer gets its best compressor.

    Args:
        tables: (errors, sizes) of each compressor, as in `plan_compression`, for the same layers. A
            compressor that does not suit a layer has no options there, or only options of infinite error.

    Raises:
        UserError: the tables have different numbers of layers.
    """
    pairs = [(_rows("errors", errors), _rows("sizes", sizes)) for errors, sizes in tables]
    counts = {len(rows) for pair in pairs for rows in pair}
    if len(counts) != 1:
        raise UserError(
            f"tables: numbers of layers {sorted(counts)}; every compressor needs one "
            "row of errors and of sizes for each layer"
        )
    mixed = Mixed([], [], [])
    for layer in range(counts.pop()):
        mixed.errors.append(np.concatenate([errors[layer] for errors, _ in pairs]))
        mixed.sizes.append(np.concatenate([sizes[layer] for _, sizes in pairs]))
        origins = [
            np.stack([np.full(len(errors[layer]), number), np.arange(len(errors[layer]))], axis=1)
            for number, (errors, _) in enumerate(pairs)
        ]
        mixed.origins.append(np.concatenate(origins).astype(np.int64))
    return mixed


def _optimise(table: Floats, cost: Floats, budget: float, buckets: int, backend: str) -> Integers | None:
    """The dynamic programme on errors rounded up; None when nothing fits."""
    usable = table <= budget
    # A multiple of the step stays where it is in spite of its rounding, yet all layers together gain less
    # than half the tolerance of the budget.
    slack = min(1e-6, 0.5 * TOLERANCE * buckets / max(1, len(table)))
    share = np.divide(table, budget, out=np.zeros_like(table), where=usable & (budget > 0))
    cells = np.where(usable, np.maximum(np.ceil(share * buckets - slack), 0), np.inf)
    price = np.where(usable, cost, np.inf)
    # Only options that no other beats: in ascending order of cells the sizes must fall.
    order = np.lexsort((table, price, cells), axis=-1)
    price = np.take_along_axis(price, order, -1)
    cheapest = np.minimum.accumulate(price, axis=-1)
    keep = price < np.concatenate([np.full((len(table), 1), np.inf), cheapest[:, :-1]], axis=1)
    cells = np.take_along_axis(cells, order, -1)[keep].astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    choice = lgreco_planner.plan(
        torch.from_numpy(offsets.astype(np.int64)), torch.from_numpy(cells), torch.from_numpy(price[keep]),
        buckets, backend=backend,
    ).numpy()  # fmt: skip
    if (choice < 0).any():
        return None
    return np.asarray(order[keep][offsets[:-1] + choice], dtype=np.int64)


def _least_error(table: Floats, cost: Floats) -> Integers:
    """Each layer's option of the least error, of equal ones the smallest."""
    return np.asarray(np.lexsort((cost, table), axis=-1)[:, 0], dtype=np.int64)


def _refuse(table: Floats, budget: float) -> None:
    least = table.min(axis=1)
    unusable = np.flatnonzero(~np.isfinite(least))
    if len(unusable):
        raise UserError(
            f"errors: layer {unusable[0]} has no option with a finite error; give it an uncompressed option "
            "(error 0) or leave it out of the table"
        )
    raise UserError(
        f"budget={budget:g} cannot be met: the least possible sum of errors is {math.fsum(least):g}; raise "
        "the budget (alpha, or a default that compresses less) or widen the range of options"
    )


def _rows(name: str, table: Table) -> list[Floats]:
    """One float64 vector a layer."""
    if isinstance(table, Tensor):
        table = table.detach().to("cpu", torch.float64).numpy()
    rows = []
    for layer, row in enumerate(table):
        if isinstance(row, Tensor):
            row = row.detach().to("cpu", torch.float64).numpy()
        vector = np.asarray(row, dtype=np.float64)
        if vector.ndim != 1:
            raise UserError(f"{name}: row {layer} has {vector.ndim} dimensions; expected one vector a layer")
        rows.append(vector)
    return rows


def _tables(errors: Table, sizes: Table | None) -> tuple[Floats, Floats]:
    """Errors and sizes as (L, k), ragged rows filled up with unusable options; validated."""
    rows = _rows("errors", errors)
    costs = rows if sizes is None else _rows("sizes", sizes)
    lengths, others = [len(row) for row in rows], [len(row) for row in costs]
    if lengths != others:
        where = next(
            (i for i, pair in enumerate(zip(lengths, others, strict=False)) if len(set(pair)) > 1), None
        )
        detail = (
            f"{len(lengths)} and {len(others)} layers"
            if where is None
            else f"layer {where}: {lengths[where]} and {others[where]} options"
        )
        raise UserError(f"errors and sizes do not match: {detail}")
    if 0 in lengths:
        raise UserError(f"errors: layer {lengths.index(0)} has no options; every layer needs at least one")
    width = max(lengths, default=0)
    table, cost = np.full((2, len(rows), max(1, width)), np.inf)
    for layer, (row, price) in enumerate(zip(rows, costs, strict=True)):
        table[layer, : len(row)], cost[layer, : len(row)] = row, price
    table[np.isnan(table) | (table > _LARGEST)] = np.inf
    usable = np.isfinite(table)
    for name, wrong in (("errors", table < 0), ("sizes", usable & ~((cost >= 0) & (cost <= _LARGEST)))):
        if wrong.any():
            layer, option = (int(number) for number in np.argwhere(wrong)[0])
            value = (table if name == "errors" else cost)[layer, option]
            raise UserError(
                f"{name}: option {option} of layer {layer} is {value}; it must be finite and >= 0"
            )
    cost[~usable] = np.inf
    return table, cost


def _checked_budget(budget: float) -> float:
    budget = float(budget)
    if not (math.isfinite(budget) and budget >= 0):
        raise UserError(f"budget={budget} is not allowed; it must be a finite number >= 0")
    return budget


def _checked_default(default: int | Sequence[int] | Tensor, table: Floats) -> Integers:
    """The default option of each layer."""
    given = np.asarray(default)
    if given.dtype.kind not in "iu" and given.size:
        raise UserError(
            f"default={default!r} is not allowed; it must be the number of an option, or one a layer"
        )
    if given.ndim > 1 or (given.ndim == 1 and len(given) != len(table)):
        raise UserError(
            f"default has shape {given.shape}; expected one number, or one for each of {len(table)} layers"
        )
    choice = np.broadcast_to(given, (len(table),)).astype(np.int64)
    wrong = (choice < 0) | (choice >= table.shape[1])
    if wrong.any():
        layer = int(np.flatnonzero(wrong)[0])
        raise UserError(f"default: layer {layer} has no option {choice[layer]}; options are counted from 0")
    return choice
