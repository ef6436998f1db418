"""Token dropping: keyed choice of the kept tokens, and moving their rows out of a hidden state and back.

A hidden state ``x`` is (batch, length, ...) where ``batch_first``, else (length, batch, ...), of any dtype
and strides; ``index`` (batch, keep) int64 names the kept positions of each sample, ascending, as
`sample_tokens` returns them. Gradients are those of plain indexing, for each function alone and for every
other consumer of ``x``, to any order. Values are copied, so that all backends agree bit for bit. Source:
random-LTD, arXiv 2211.11586.

`apply_to_kept` does a whole layer: it saves two passes over the hidden state in the backward pass against
`gather_tokens` and `scatter_tokens`, which autograd has to treat apart.

The operators ``torch.ops.ds_efficient.ltd_*`` do the work and have fake implementations and derivatives, so
that FakeTensor and ``torch.compile`` see them. An ``index`` that does not ascend within the length raises
UserError on the CPU and stops the kernel on CUDA, where reading it would wait for the device.

``backend`` of every function: ``"auto"`` (compiled code; on the CPU plain torch where no compiler is found,
which is logged once), ``"native"`` (compiled code or an error), ``"reference"`` (plain torch).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.ops import random_ltd_operators as operators
from ds_efficient.ops.keyed_random import BACKENDS, MAX_CHOICES, signed_key
from ds_efficient.ops.native import is_plain

OPERATORS = operators.LIBRARY  # the operators exist as long as this object


def sample_tokens(
    length: int,
    keep: int,
    batch: int,
    *,
    key: Key | int,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Choose the tokens that a layer keeps: uniformly without replacement, each sample on its own.

    Args:
        length: tokens of a sample, 0 <= length < 2^31.
        keep: tokens kept of each, 0 <= keep <= length.
        batch: samples.
        key: `Key` or 64-bit integer, 0 <= key < 2^64: another one for each layer, step, micro-batch and
            data-parallel rank, the same one on all tensor-parallel ranks. The result is a pure function of
            the arguments, and that of fewer samples is its beginning.
        device: where the result is made.
        backend: see the module.

    Returns:
        (batch, keep) int64, each row ascending and distinct; what `keyed_random.sample_k_of_n` returns.

    Raises:
        UserError: an argument is out of range.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    return sample_layers(length, keep, batch, [key], device, backend=backend).view(batch, keep)


def sample_layers(
    length: int,
    keep: int,
    batch: int,
    keys: Sequence[Key | int],
    device: torch.device | str = "cpu",
    *,
    backend: str = "auto",
) -> Tensor:
    """`sample_tokens` for one key a layer, bit for bit, in one launch for each 256 layers.

    Returns:
        (layers, batch, keep) int64.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")
    if not 0 <= length <= MAX_CHOICES:
        raise UserError(f"length={length} is out of range; allowed: 0 <= length <= {MAX_CHOICES}")
    if not 0 <= keep <= length:
        raise UserError(f"keep={keep} is out of range; allowed: 0 <= keep <= length={length}")
    if batch < 0:
        raise UserError(f"batch={batch} is negative")
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    numbers = [signed_key(key) for key in keys]
    return torch.ops.ds_efficient.ltd_sample(numbers, length, keep, batch, place, backend)


def gather_tokens(x: Tensor, index: Tensor, *, batch_first: bool, backend: str = "auto") -> Tensor:
    """The rows of the kept tokens.

    Args:
        x: hidden state, see the module.
        index: (batch, keep) int64.
        batch_first: layout of ``x``.
        backend: see the module.

    Returns:
        (batch, keep, ...) or (keep, batch, ...), contiguous, in new memory.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    index = _checked(x, index, batch_first, backend)
    return operators.differentiable("gather", x, index, batch_first, backend)


def scatter_tokens(
    x: Tensor,
    part: Tensor,
    index: Tensor,
    *,
    batch_first: bool,
    in_place: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``x`` with the rows of the kept tokens replaced by ``part``; the others are bit-identical.

    Args:
        x, index, batch_first, backend: as in `gather_tokens`.
        part: (batch, keep, ...) or (keep, batch, ...), dtype of ``x``.
        in_place: write into ``x``, which moves only the kept rows. Allowed where autograd allows an in-place
            operation: ``x`` is no leaf that needs a gradient, and no other operation has saved it for its
            backward pass (autograd raises RuntimeError there). Do not use it on the input of a checkpointed
            region, which needs it once more.

    Returns:
        ``x`` if ``in_place``, else contiguous, new memory.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    index = _checked(x, index, batch_first, backend)
    _check_part(x, part, index, batch_first)
    if not in_place:
        return operators.differentiable("scatter", x, part, index, batch_first, backend)
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise UserError("in_place=True cannot overwrite a leaf that needs a gradient; use in_place=False")
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    if (overlaps and x.numel()) or not operators.has_dense_rows(x):
        raise UserError(
            f"in_place=True needs an x without gaps within a token; strides {x.stride()} have some, or share "
            "memory between tokens; use in_place=False"
        )
    return operators.PutTokens.apply(x, part, index, batch_first, backend)


def apply_to_kept(
    layer: Callable[[Tensor], Any], x: Tensor, index: Tensor, *, batch_first: bool, backend: str = "auto"
) -> Any:
    """Run a layer on the kept tokens only; the others pass unchanged.

    The same as ``scatter_tokens(x, layer(gather_tokens(x, index)), index)``, values and gradients, but the
    gradient of ``x`` is made in one pass that reads each row once.

    Args:
        layer: called with the kept rows; returns their new values in the same shape and dtype, or a tuple or
            list that begins with them.
        x, index, batch_first, backend: as in `gather_tokens`.

    Returns:
        What ``layer`` returned, with all tokens in the place of the kept ones.

    Raises:
        UserError: an argument, or what ``layer`` returned, does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    index = _checked(x, index, batch_first, backend)
    fused = is_plain(x) and x.device.type != "meta"
    if fused:
        part, rest = operators.TakeTokens.apply(x, index, batch_first, backend)
    else:
        part, rest = operators.differentiable("gather", x, index, batch_first, backend), x
    made = layer(part)
    out = made[0] if isinstance(made, (tuple, list)) else made
    _check_part(x, out, index, batch_first)
    if fused:
        y = operators.ReturnTokens.apply(rest, out, index, batch_first, backend)
    else:
        y = operators.differentiable("scatter", rest, out, index, batch_first, backend)
    if not isinstance(made, (tuple, list)):
        return y
    everything = (y, *made[1:])
    if hasattr(made, "_make"):  # a named tuple
        return made._make(everything)
    return type(made)(everything)


def gather_rotary(table: Tensor, index: Tensor, *, batch_first: bool, backend: str = "auto") -> Tensor:
    """Rows of a table over positions, such as rotary angles, at the kept positions of each sample.

    Args:
        table: (length, ...), the same for all samples; with a batch dimension use `gather_tokens`.
        index, batch_first, backend: as in `gather_tokens`.

    Returns:
        (batch, keep, ...) or (keep, batch, ...). The table is read in place, not repeated for each sample.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    if table.dim() < 1 or index.dim() != 2:
        raise UserError(
            f"table has shape {tuple(table.shape)}, index {tuple(index.shape)}; expected (length, ...) and "
            "(batch, keep)"
        )
    sample = 0 if batch_first else 1
    shape = [*table.shape[:sample], index.shape[0], *table.shape[sample:]]
    return gather_tokens(
        table.unsqueeze(sample).expand(shape), index, batch_first=batch_first, backend=backend
    )


def _checked(x: Tensor, index: Tensor, batch_first: bool, backend: str) -> Tensor:
    """Validate; return the index contiguous, so that it is copied at most once."""
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")
    if index.dim() != 2 or index.dtype != torch.int64 or index.device != x.device:
        raise UserError(
            f"index is {index.dtype} of shape {tuple(index.shape)} on {index.device}; expected torch.int64 "
            f"(batch, keep) on {x.device}, where x is"
        )
    order = ("batch", "length") if batch_first else ("length", "batch")
    if x.dim() < 2 or x.shape[0 if batch_first else 1] != index.shape[0]:
        raise UserError(
            f"x has shape {tuple(x.shape)}; expected ({order[0]}, {order[1]}, ...) with batch "
            f"{index.shape[0]} as index has it, since batch_first={batch_first}"
        )
    length = x.shape[1 if batch_first else 0]
    if index.shape[1] > length:
        raise UserError(f"index names {index.shape[1]} tokens of each sample, x has {length}")
    if length > MAX_CHOICES:
        raise UserError(f"x has {length} tokens a sample; allowed: at most {MAX_CHOICES}")
    return index.contiguous()


def _check_part(x: Tensor, part: Tensor, index: Tensor, batch_first: bool) -> None:
    expected = list(x.shape)
    expected[1 if batch_first else 0] = index.shape[1]
    if list(part.shape) != expected or part.dtype != x.dtype or part.device != x.device:
        raise UserError(
            f"the new rows are {part.dtype} of shape {tuple(part.shape)} on {part.device}; expected "
            f"{x.dtype} of shape {tuple(expected)} on {x.device}, as x; convert them before"
        )
