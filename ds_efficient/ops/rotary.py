"""Rotary position embedding of queries and keys whose positions may be any: dropped tokens leave gaps.

The operator ``torch.ops.ds_efficient.rotary`` does the work and has a fake implementation and a derivative,
so that FakeTensor and ``torch.compile`` see it. It reads the angles of the whole sequence where they lie,
and keeps no activations for the backward pass, which turns the other way. Sines, cosines, products and sums
are float32 (float64 for float64), and the result is rounded once; backends agree up to rounding in these.

Source: RoFormer, arXiv 2104.09864, equation 34, in the layout of two halves: channel j is turned with channel
j + R / 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import rotary_reference as reference
from ds_efficient.ops.keyed_random import BACKENDS
from ds_efficient.ops.native import is_plain
from ds_efficient.ops.registration import define_operators
from ds_efficient.ops.rotary_native import DTYPES, MOST_ANGLES, Library


def rotary_embedding(
    t: Tensor, angles: Tensor, index: Tensor | None = None, *, mscale: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Turn the first R channels of every head by the angles of its token; the others are copied.

    Args:
        t: (S, B, H, D) float32, bfloat16, float16 or float64, of any strides.
        angles: (L, R) or (L, 1 or B, 1, R) float32, radians; no gradient. R is even, at most D and 2048.
        index: (B, S) int64, the row of ``angles`` for each token. None: the rows in order, S <= L.
        mscale: factor of sines and cosines.
        backend: ``"auto"`` (compiled code; on the CPU plain torch where no compiler is found, which is
            logged once), ``"native"`` (compiled code or an error), ``"reference"`` (plain torch).

    Returns:
        Shape and dtype of ``t``, contiguous, in new memory.

    Raises:
        UserError: an argument does not fit; on the CPU also an ``index`` outside of ``angles``, which stops
            the kernel on CUDA, where reading it here would wait for the device.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    problem = _problem(t, angles, index, backend)
    if problem:
        raise UserError(problem)
    return _differentiable(t, angles, index, mscale, False, backend)


def _problem(t: Tensor, angles: Tensor, index: Tensor | None, backend: str) -> str | None:
    """What does not fit."""
    if backend not in BACKENDS:
        return f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}"
    if t.dim() != 4 or t.dtype not in DTYPES:
        return (
            f"t is {t.dtype} of shape {tuple(t.shape)}; expected (positions, samples, heads, channels) of "
            + ", ".join(map(str, DTYPES))
        )
    positions, samples, _, width = t.shape
    sizes = angles.shape
    whole = len(sizes) == 2 or (len(sizes) == 4 and sizes[2] == 1 and sizes[1] in (1, samples))
    if not whole or angles.dtype != torch.float32 or angles.device != t.device or angles.requires_grad:
        needs = " that needs a gradient" if angles.requires_grad else ""
        return (
            f"angles is {angles.dtype} of shape {tuple(sizes)} on {angles.device}{needs}; expected "
            f"torch.float32 of shape (L, R), (L, 1, 1, R) or (L, {samples}, 1, R) on {t.device}, constant"
        )
    if sizes[-1] % 2 or not 2 <= sizes[-1] <= min(width, MOST_ANGLES):
        return (
            f"angles has {sizes[-1]} channels; expected an even number from 2 to {min(width, MOST_ANGLES)} "
            f"for t with {width} channels"
        )
    if index is None:
        if positions > sizes[0]:
            return f"angles has {sizes[0]} positions, t has {positions}; pass index, or as many as t has"
    elif index.dtype != torch.int64 or index.shape != (samples, positions) or index.device != t.device:
        return (
            f"index is {index.dtype} of shape {tuple(index.shape)} on {index.device}; expected torch.int64 "
            f"of shape {(samples, positions)} on {t.device}"
        )
    return None


def turn(
    t: Tensor, angles: Tensor, index: Tensor | None, mscale: float, transposed: bool, backend: str
) -> Tensor:
    """Run the operator, arguments checked; ``transposed``: by the transposed matrix."""
    if index is not None and index.device.type == "cpu" and index.numel():
        least, most = int(index.min()), int(index.max())
        if least < 0 or most >= angles.shape[0]:
            raise UserError(
                f"index has values from {least} to {most}; angles has positions 0 .. {angles.shape[0] - 1}"
            )
    library = Library.for_device(t.device, backend)
    if library is None:
        return reference.turn(t, angles, index, mscale, transposed)
    out = _turn_fake(t, angles, index, mscale, transposed, backend)
    if not out.numel():
        return out
    if t.is_neg():
        t = t.resolve_neg()
    if t.stride(-1) != 1:
        t = t.contiguous()
    if angles.stride(-1) != 1:
        angles = angles.contiguous()
    return library.turn(t, angles, index if index is None else index.contiguous(), mscale, transposed, out)


def _turn_fake(
    t: Tensor, angles: Tensor, index: Tensor | None, mscale: float, transposed: bool, backend: str
) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep all but ``t``: the operator is linear in it."""
    _, angles, index, *ctx.rest = inputs
    ctx.save_for_backward(angles, index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    angles, index = ctx.saved_tensors
    mscale, transposed, backend = ctx.rest
    return _differentiable(grad, angles, index, mscale, not transposed, backend), None, None, None, None, None


class _Rotary(torch.autograd.Function):
    """In the old form, since the new one costs 30 microseconds a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Run the operator."""
        _remember(ctx, inputs, None)
        return turn(*inputs)

    backward = staticmethod(_backward)


def _differentiable(t: Tensor, *arguments: Any) -> Tensor:
    """Call the operator; without the dispatcher where nobody needs to see it."""
    if not is_plain(t) or t.device.type == "meta":
        return torch.ops.ds_efficient.rotary(t, *arguments)
    if t.requires_grad and torch.is_grad_enabled():
        return _Rotary.apply(t, *arguments)
    return turn(t, *arguments)


LIBRARY = define_operators(
    (
        "rotary(Tensor t, Tensor angles, Tensor? index, float mscale, bool transposed, str backend)"
        " -> Tensor",
        turn,
        _turn_fake,
    )
)
torch.library.register_autograd("ds_efficient::rotary", _backward, setup_context=_remember, lib=LIBRARY)
