"""Products with 2:4 sparse operands through cached plans."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import cusparselt_library as lt
from ds_efficient.ops import cusparselt_plans as plans
from ds_efficient.ops.cusparselt_cache import (
    algorithm_key,
    cache,
    choice_key,
    kept_algorithm,
    kept_choice,
)
from ds_efficient.ops.cusparselt_operand import Layout, SparseOperand, find_layout, is_current
from ds_efficient.ops.cusparselt_plans import Plan
from ds_efficient.ops.registration import define_operators

TOKEN_MULTIPLE = 16


def padded_tokens(tokens: int) -> int:
    """Tokens of the product that runs for ``tokens`` of them."""
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


class Product:
    """How a layout multiplies one number of tokens.

    Attributes:
        plan: for one tile and one part of the tokens.
        tokens: after padding.
        starts: byte offsets in operand, x and y of each call.
        settled: whether the plan's algorithm is the result of a search, or no search is wanted.
        seen: address of the operand of the first call.
    """

    __slots__ = ("plan", "seen", "settled", "starts", "tokens")

    def __init__(self, plan: Plan, tokens: int, starts: tuple[tuple[int, int, int], ...]) -> None:
        self.plan, self.tokens, self.starts = plan, tokens, starts
        self.settled = plan.algorithm is not None
        self.seen = 0


def multiply(operand: SparseOperand, x: Tensor) -> Tensor:
    """y = x S^T on torch's current stream. Has no gradient: call it from a `torch.autograd.Function`.

    Any number of tokens is allowed; one that is no multiple of 16 costs a copy of x, padded with zeros.

    Args:
        operand: S, (rows, k).
        x: (tokens, k), of the operand's dtype and on its device.

    Returns:
        (tokens, rows), contiguous.

    Raises:
        UserError: shapes, dtypes or devices do not fit, the operand has no pattern, or x needs a gradient.
    """
    # Traced and faked tensors, and dispatch modes, need to see an operator; it costs some microseconds.
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        return torch.ops.ds_efficient.slope_sparse_multiply(
            operand.buffer, x, operand.rows, operand.k, operand.tiles
        )
    if not operand.has_pattern:
        raise UserError("the sparse operand has no pattern yet; call set_pattern first")
    return _multiply(operand.buffer, x, operand.layout)


def _multiply(buffer: Tensor, x: Tensor, layout: Layout) -> Tensor:
    shape = x.shape
    if (
        len(shape) != 2
        or shape[1] != layout.k
        or x.dtype is not layout.dtype
        or x.device != layout.device
        or (x.requires_grad and torch.is_grad_enabled())
    ):
        raise UserError(_misfit(x, layout))
    if is_current(layout.index):
        return _run(buffer, x, shape[0], layout)
    with lt.device_guard(layout.index):
        return _run(buffer, x, shape[0], layout)


def _run(buffer: Tensor, x: Tensor, tokens: int, layout: Layout) -> Tensor:
    """The product, on the current device. Every microsecond here is paid in each product of a step."""
    product = layout.products.get(tokens)
    if product is None:
        if tokens == 0:
            return x.new_empty((0, layout.rows))
        product = _new_product(layout, tokens)
    if product.tokens != tokens:
        given, x = x, x.new_zeros((product.tokens, layout.k))
        x[:tokens] = given
    first_x = x.data_ptr()
    if first_x % plans.ALIGNMENT or not x.is_contiguous():
        x = x.clone(memory_format=torch.contiguous_format)
        first_x = x.data_ptr()
    y = x.new_empty((product.tokens, layout.rows))
    operand, first_y = buffer.data_ptr(), y.data_ptr()
    lane = plans.current_lane(layout.device, layout.index)
    if not product.settled:
        _settle(product, operand, first_x, first_y, lane)
    run = product.plan.run
    for start_operand, start_x, start_y in product.starts:
        run(operand + start_operand, first_x + start_x, first_y + start_y, lane)
    return y if product.tokens == tokens else y[:tokens]


def _misfit(x: Tensor, layout: Layout) -> str:
    """What is wrong with x; only called when something is."""
    if x.dim() != 2 or x.shape[1] != layout.k:
        return f"x has shape {tuple(x.shape)}; expected (tokens, {layout.k})"
    if x.dtype is not layout.dtype:
        return f"x is {x.dtype}, the sparse operand {layout.dtype}"
    if x.device != layout.device:
        return f"x is on {x.device}, the sparse operand on {layout.device}"
    return "the sparse product has no gradient; call it from a torch.autograd.Function"


def new_starts(layout: Layout, padded: int, splits: int) -> tuple[tuple[int, int, int], ...]:
    """Byte offsets in operand, x and y of the calls that make up a product."""
    part, size = padded // splits, layout.dtype.itemsize
    return tuple(
        (
            tile * layout.stride,
            split * part * layout.k * size,
            (split * part * layout.rows + tile * layout.tile_rows) * size,
        )
        for tile in range(layout.tiles)
        for split in range(splits)
    )


def _new_product(layout: Layout, tokens: int) -> Product:
    """Resolve a number of tokens seen for the first time, by what is known from measurements."""
    padded = padded_tokens(tokens)
    tuned = kept_choice(choice_key(layout.rows, layout.k, padded, layout.dtype, layout.index))
    splits = tuned.token_splits if tuned is not None and tuned.tiles == layout.tiles else 1
    if splits < 1 or padded % (splits * TOKEN_MULTIPLE):
        splits = 1
    shape = layout.tile_shape(padded // splits)
    plan = plans.find_plan(shape, kept_algorithm(shape))
    product = Product(plan, padded, new_starts(layout, padded, splits))
    layout.products[tokens] = product
    return product


def _settle(product: Product, operand: int, x: int, y: int, lane: plans.Lane) -> None:
    """Search an algorithm when an operand multiplies this number of tokens for the second time.

    The search takes a fraction of a second, too much for a number of tokens that occurs once (the rest of a
    data set). It writes y, which the product then overwrites.
    """
    if product.seen != operand:
        if not product.seen:
            product.seen = operand
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    product.settled = True
    shape = product.plan.shape
    known = plans.find_plan(shape, None)
    if known.algorithm is None:
        found = plans.search(shape, operand, x, y, lane)
        if found is None:
            return
        cache.put({algorithm_key(shape): found._asdict()})
        known = plans.replace_plan(shape, found)
    product.plan = known


def _multiply_op(buffer: Tensor, x: Tensor, rows: int, k: int, tiles: int) -> Tensor:
    return _multiply(buffer, x, find_layout(rows, k, x.dtype, x.device, tiles))


def _multiply_fake(buffer: Tensor, x: Tensor, rows: int, k: int, tiles: int) -> Tensor:
    return x.new_empty((x.shape[0], rows))


_LIBRARY = define_operators(
    (
        "slope_sparse_multiply(Tensor operand, Tensor x, SymInt rows, SymInt k, SymInt tiles) -> Tensor",
        _multiply_op,
        _multiply_fake,
    ),
    dispatch_key="CUDA",
)
