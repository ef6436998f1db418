"""One option a layer at the least cost, under a common budget of whole cells.

The dynamic programme of L-GreCo (arXiv 2210.17357, Algorithm 1) over errors that
`ds_efficient.lgreco.planner` has rounded to cells. Also an operator, ``torch.ops.ds_efficient.lgreco_plan``,
with a fake implementation. It runs on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import lgreco_planner_reference as reference
from ds_efficient.ops.lgreco_planner_native import Library
from ds_efficient.ops.registration import define_operators

__all__ = ["BACKENDS", "plan"]

BACKENDS = ("auto", "native", "reference")


def plan(offsets: Tensor, cells: Tensor, costs: Tensor, capacity: int, *, backend: str = "auto") -> Tensor:
    """The cheapest choice whose cells sum to at most ``capacity``.

    Args:
        offsets: (layers + 1,) int64 on the CPU; the options of layer l are offsets[l] .. offsets[l + 1] - 1.
        cells: (options,) int64 on the CPU, not negative.
        costs: (options,) float64 on the CPU, not negative, not NaN.
        capacity: cells to spend, not negative.
        backend: ``"auto"`` (compiled code; plain torch where no compiler is found, which is logged once),
            ``"native"`` (compiled code or an error), ``"reference"`` (plain torch).

    Returns:
        (layers,) int64: each layer's option, counted from 0 within the layer. Of equally cheap choices that
        of the fewest cells; where that leaves several, the last layer takes its first option that belongs to
        one, then the layer before, and so on. All -1 when no choice fits. Time O(options * capacity), memory
        8 bytes a layer and cell.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
        MemoryError: there is not enough memory.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")
    _check(offsets, cells, costs, capacity)
    return torch.ops.ds_efficient.lgreco_plan(offsets, cells, costs, capacity, backend)


def _check(offsets: Tensor, cells: Tensor, costs: Tensor, capacity: int) -> None:
    expected = (
        ("offsets", offsets, torch.int64),
        ("cells", cells, torch.int64),
        ("costs", costs, torch.float64),
    )
    for name, tensor, dtype in expected:
        if tensor.dim() != 1 or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise UserError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; expected a "
                f"vector of {dtype} on the CPU"
            )
    if (
        not offsets.numel()
        or offsets[0] != 0
        or offsets[-1] != cells.numel()
        or bool((offsets.diff() < 0).any())
    ):
        raise UserError(f"offsets must ascend from 0 to the number of options, {cells.numel()}")
    if costs.numel() != cells.numel():
        raise UserError(f"costs has {costs.numel()} elements, cells {cells.numel()}; one of each an option")
    if cells.numel() and (int(cells.min()) < 0 or not bool((costs >= 0).all())):
        raise UserError("cells and costs must be numbers >= 0")
    if capacity < 0:
        raise UserError(f"capacity={capacity} is negative; allowed: 0 or more cells")


def _plan(offsets: Tensor, cells: Tensor, costs: Tensor, capacity: int, backend: str) -> Tensor:
    library = Library.for_device(offsets.device, backend)
    if library is None:
        return reference.plan(offsets, cells, costs, capacity)
    out = _plan_fake(offsets, cells, costs, capacity, backend)
    return library.plan(offsets.contiguous(), cells.contiguous(), costs.contiguous(), capacity, out)


def _plan_fake(offsets: Tensor, cells: Tensor, costs: Tensor, capacity: int, backend: str) -> Tensor:
    return offsets.new_empty(offsets.shape[0] - 1)


OPERATORS = define_operators(
    (
        "lgreco_plan(Tensor offsets, Tensor cells, Tensor costs, int capacity, str backend) -> Tensor",
        _plan,
        _plan_fake,
    )
)
