"""L-GreCo's dynamic programme in plain torch: the readable definition, bit-identical to the C++ code.

Algorithm 1 of arXiv 2210.17357 without its slips (two options of the first layer in one cell, options above
the budget, no feasible cell).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

VERSION = 1


def plan(offsets: Tensor, cells: Tensor, costs: Tensor, capacity: int) -> Tensor:
    """The cheapest plan within ``capacity``; see `ds_efficient.ops.lgreco_planner.plan`."""
    layers = offsets.numel() - 1
    bounds = offsets.tolist()
    # table[l][e]: least cost of the first l layers whose cells sum to exactly e.
    table = [torch.full((capacity + 1,), torch.inf, dtype=torch.float64)]
    table[0][0] = 0.0
    options = [
        list(zip(cells[first:last].tolist(), costs[first:last].tolist(), strict=True))
        for first, last in itertools.pairwise(bounds)
    ]
    for layer in options:
        before, after = table[-1], torch.full((capacity + 1,), torch.inf, dtype=torch.float64)
        for cell, cost in layer:
            if cell <= capacity:
                reached = before[: capacity + 1 - cell] + cost
                after[cell:] = torch.minimum(after[cell:], reached)
        table.append(after)
    choices = torch.full((layers,), -1, dtype=torch.int64)
    least = table[-1].min()
    if not torch.isfinite(least):
        return choices
    total = int((table[-1] == least).nonzero()[0])  # the first of equally cheap sums
    for number in reversed(range(layers)):
        aim = float(table[number + 1][total])
        for option, (cell, cost) in enumerate(options[number]):
            if cell <= total and float(table[number][total - cell]) + cost == aim:
                choices[number] = option
                total -= cell
                break
    return choices
