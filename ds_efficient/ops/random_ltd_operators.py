"""Operators ``torch.ops.ds_efficient.ltd_*``; `ds_efficient.ops.random_ltd` checks arguments and calls them.

``gather``, ``scatter``, ``spread``, ``erase`` and ``split`` are linear, and each one's derivative is made of
the others, to any order:

    gather(x)         part                     dx = spread(dpart)
    spread(part)      zeros, part at index     dpart = gather(dy)
    scatter(x, part)  x, part at index         dx, dpart = split(dy)
    erase(x)          x, zeros at index        dx = erase(dy)
    split(x)          erase(x), gather(x)      dx = scatter(drest, dpart)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import random_ltd_reference as reference
from ds_efficient.ops.native import is_plain
from ds_efficient.ops.random_ltd_native import Library
from ds_efficient.ops.registration import define_operators

_UNSIGNED = 2**64 - 1


# ---- what the operators run ----


def sample(
    keys: Sequence[int], length: int, keep: int, batch: int, device: torch.device, backend: str
) -> Tensor:
    """Run `ds_efficient.ops.random_ltd.sample_layers`, arguments checked."""
    if device.type == "meta":
        return _sample_fake(keys, length, keep, batch, device, backend)
    numbers = [key & _UNSIGNED for key in keys]
    library = Library.for_device(device, backend)
    if library is None:
        return reference.sample(numbers, length, keep, batch, device)
    out = _sample_fake(keys, length, keep, batch, device, backend)
    return library.sample(numbers, length, out) if out.numel() else out


def gather(x: Tensor, index: Tensor, batch_first: bool, backend: str) -> Tensor:
    """The rows of ``x`` at ``index``, contiguous."""
    library = _library(x, index, x.shape[1 if batch_first else 0], backend)
    if library is None:
        return reference.gather(x, index, batch_first)
    part = _gather_fake(x, index, batch_first, backend)
    return library.gather(_dense(x), index.contiguous(), batch_first, part) if part.numel() else part


def put(x: Tensor, part: Tensor, index: Tensor, batch_first: bool, backend: str) -> None:
    """Write ``part`` over the rows of ``x`` at ``index``."""
    library = _library(x, index, x.shape[1 if batch_first else 0], backend)
    if part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        part = part.clone()
    if library is None:
        reference.put(x, part, index, batch_first)
    elif part.numel():
        library.put(x, _dense(part), index.contiguous(), batch_first)


def scatter(x: Tensor, part: Tensor, index: Tensor, batch_first: bool, backend: str) -> Tensor:
    """``x`` with the rows at ``index`` replaced by ``part``, in new memory."""
    library = _library(x, index, x.shape[1 if batch_first else 0], backend)
    if library is None:
        return reference.scatter(x, part, index, batch_first)
    out = _like(x)
    if not out.numel():
        return out
    return library.scatter(_dense(x), _dense(part), index.contiguous(), batch_first, out)


def spread(part: Tensor, index: Tensor, length: int, batch_first: bool, backend: str) -> Tensor:
    """Zeros of ``length`` positions with ``part`` at ``index``."""
    library = _library(part, index, length, backend)
    if library is None:
        return reference.spread(part, index, length, batch_first)
    out = _spread_fake(part, index, length, batch_first, backend)
    if not out.numel():
        return out
    return library.scatter(None, _dense(part), index.contiguous(), batch_first, out)


def erase(x: Tensor, index: Tensor, batch_first: bool, backend: str) -> Tensor:
    """``x`` with zeros at ``index``, in new memory."""
    library = _library(x, index, x.shape[1 if batch_first else 0], backend)
    if library is None:
        return reference.erase(x, index, batch_first)
    out = _like(x)
    return library.scatter(_dense(x), None, index.contiguous(), batch_first, out) if out.numel() else out


def split(x: Tensor, index: Tensor, batch_first: bool, backend: str) -> tuple[Tensor, Tensor]:
    """`erase` and `gather` in one pass."""
    library = _library(x, index, x.shape[1 if batch_first else 0], backend)
    if library is None:
        return reference.split(x, index, batch_first)
    out, part = _split_fake(x, index, batch_first, backend)
    if out.numel():
        library.split(_dense(x), index.contiguous(), batch_first, out, part)
    return out, part


def _library(x: Tensor, index: Tensor, length: int, backend: str) -> Library | None:
    """The library, or None for the reference; on the CPU the values of ``index`` are checked first.

    On CUDA the kernels check them, since reading them here would wait for the device.
    """
    if index.device.type == "cpu" and index.numel():
        least, most = index[:, 0].min(), index[:, -1].max()
        if least < 0 or most >= length or not (index[:, 1:] > index[:, :-1]).all():
            raise UserError(
                f"index is not ascending within 0 .. {length - 1} in every row; it must name distinct "
                "positions in order, as sample_tokens returns them"
            )
    return Library.for_device(x.device, backend)


def _dense(x: Tensor) -> Tensor:
    """``x`` with everything behind the first two dimensions contiguous, the bits in memory as they count."""
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    return x if x.is_contiguous() or has_dense_rows(x) else x.contiguous()


def has_dense_rows(x: Tensor) -> bool:
    """Whether everything behind the first two dimensions is contiguous."""
    expected = 1
    if not x.numel():
        return True
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# ---- fake implementations ----


def _sample_fake(
    keys: Sequence[int], length: int, keep: int, batch: int, device: torch.device, backend: str
) -> Tensor:
    return torch.empty(len(keys), batch, keep, dtype=torch.int64, device=device)


def _gather_fake(x: Tensor, index: Tensor, batch_first: bool, backend: str) -> Tensor:
    return x.new_empty(reference.with_positions(x, index.shape[1], batch_first))


def _put_fake(x: Tensor, part: Tensor, index: Tensor, batch_first: bool, backend: str) -> None:
    return None


def _scatter_fake(x: Tensor, part: Tensor, index: Tensor, batch_first: bool, backend: str) -> Tensor:
    return _like(x)


def _spread_fake(part: Tensor, index: Tensor, length: int, batch_first: bool, backend: str) -> Tensor:
    return part.new_empty(reference.with_positions(part, length, batch_first))


def _erase_fake(x: Tensor, index: Tensor, batch_first: bool, backend: str) -> Tensor:
    return _like(x)


def _split_fake(x: Tensor, index: Tensor, batch_first: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _like(x), _gather_fake(x, index, batch_first, backend)


# ---- derivatives: what autograd functions and operators share ----


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the index and the constants; `inputs` are those of an operator."""
    *tensors, batch_first, backend = inputs
    index = next(t for t in reversed(tensors) if isinstance(t, Tensor))
    ctx.save_for_backward(index)
    ctx.rest = (batch_first, backend)
    ctx.length = inputs[0].shape[1 if batch_first else 0]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return differentiable("spread", grad, index, ctx.length, *ctx.rest), None, None, None


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return differentiable("gather", grad, index, *ctx.rest), None, None, None, None


def _erase_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return differentiable("erase", grad, index, *ctx.rest), None, None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    of_x, of_part = ctx.needs_input_grad[:2]
    dx = dpart = None
    if of_x and of_part:
        dx, dpart = differentiable("split", grad, index, *ctx.rest)
    elif of_x:
        dx = differentiable("erase", grad, index, *ctx.rest)
    elif of_part:
        dpart = differentiable("gather", grad, index, *ctx.rest)
    return dx, dpart, None, None, None


def _split_backward(ctx: Any, rest: Tensor, part: Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return differentiable("scatter", rest, part, index, *ctx.rest), None, None, None


def _function(name: str, run: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """An autograd function of an operator; its old form, since the new one costs 30 microseconds a call."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        _remember(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{name.title()}Tokens", (torch.autograd.Function,), methods)


_BACKWARD: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gather": (gather, _gather_backward),
    "spread": (spread, _spread_backward),
    "erase": (erase, _erase_backward),
    "scatter": (scatter, _scatter_backward),
    "split": (split, _split_backward),
}
_FUNCTIONS = {name: _function(name, *both) for name, both in _BACKWARD.items()}


def differentiable(name: str, x: Tensor, *arguments: Any) -> Any:
    """Call an operator by name, differentiably; without the dispatcher where nobody needs to see it."""
    if is_plain(x) and x.device.type != "meta":
        # An autograd function costs the host 20 microseconds, also where nothing is recorded, as in backward.
        run = _FUNCTIONS[name].apply if torch.is_grad_enabled() else _BACKWARD[name][0]
        return run(x, *arguments)
    return getattr(torch.ops.ds_efficient, f"ltd_{name}")(x, *arguments)


class PutTokens(torch.autograd.Function):
    """``scatter`` into ``x`` itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Tensor, index: Tensor, batch_first: bool, backend: str) -> Tensor:
        """Write, and tell autograd."""
        run = put if is_plain(x) and x.device.type != "meta" else torch.ops.ds_efficient.ltd_put_
        run(x, part, index, batch_first, backend)
        ctx.mark_dirty(x)
        _remember(ctx, (x, part, index, batch_first, backend), x)
        return x

    backward = staticmethod(_scatter_backward)


class TakeTokens(torch.autograd.Function):
    """The kept rows, and ``x`` for `ReturnTokens` alone, whose gradient it takes in one pass.

    Of the gradient of its second result the rows at ``index`` do not count: `ReturnTokens` leaves there what
    it does not need to erase.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, batch_first: bool, backend: str) -> tuple[Tensor, Tensor]:
        """(kept rows, x)."""
        ctx.set_materialize_grads(False)
        _remember(ctx, (x, index, batch_first, backend), None)
        return gather(x, index, batch_first, backend), x.detach()

    @staticmethod
    def backward(ctx: Any, part: Tensor | None, rest: Tensor | None) -> tuple[Any, ...]:
        """Gradient of ``x``: ``part`` at the kept rows, ``rest`` elsewhere."""
        (index,) = ctx.saved_tensors
        dx = None
        if part is not None and rest is not None:
            dx = differentiable("scatter", rest, part, index, *ctx.rest)
        elif part is not None:
            dx = differentiable("spread", part, index, ctx.length, *ctx.rest)
        elif rest is not None:
            dx = differentiable("erase", rest, index, *ctx.rest)
        return dx, None, None, None


class ReturnTokens(torch.autograd.Function):
    """``scatter`` into the second result of `TakeTokens`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Tensor, index: Tensor, batch_first: bool, backend: str) -> Tensor:
        """New memory."""
        _remember(ctx, (x, part, index, batch_first, backend), None)
        return scatter(x, part, index, batch_first, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradient as it came, for `TakeTokens` to use the dropped rows of, and its kept rows."""
        (index,) = ctx.saved_tensors
        of_x, of_part = ctx.needs_input_grad[:2]
        dpart = differentiable("gather", grad, index, *ctx.rest) if of_part else None
        return grad if of_x else None, dpart, None, None, None


_X, _PART, _END = "Tensor x, Tensor index", "Tensor part, Tensor index", "bool batch_first, str backend"
LIBRARY = define_operators(
    (
        "ltd_sample(int[] keys, SymInt length, SymInt keep, SymInt batch, Device device, str backend)"
        " -> Tensor",
        sample,
        _sample_fake,
    ),
    (f"ltd_gather({_X}, {_END}) -> Tensor", gather, _gather_fake),
    (f"ltd_put_(Tensor(a!) x, {_PART}, {_END}) -> ()", put, _put_fake),
    (f"ltd_scatter(Tensor x, {_PART}, {_END}) -> Tensor", scatter, _scatter_fake),
    (f"ltd_spread({_PART}, SymInt length, {_END}) -> Tensor", spread, _spread_fake),
    (f"ltd_erase({_X}, {_END}) -> Tensor", erase, _erase_fake),
    (f"ltd_split({_X}, {_END}) -> (Tensor, Tensor)", split, _split_fake),
)
for _name, (_, _backward) in _BACKWARD.items():
    torch.library.register_autograd(
        f"ds_efficient::ltd_{_name}", _backward, setup_context=_remember, lib=LIBRARY
    )
