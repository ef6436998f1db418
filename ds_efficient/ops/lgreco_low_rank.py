"""The products of a low-rank exchange, with the error feedback that belongs to the first and the last.

On the CPU, up to rank 16, compiled code does each in one pass over the gradient
(``csrc/lgreco/low_rank_cpu.h``); elsewhere they are products of torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops.lgreco_orthonormal_native import CpuLibrary
from ds_efficient.ops.native import is_plain

MOST_RANK = 16
"""Up to here the compiled code is faster than torch's products."""


def project(
    x: Tensor, error: Tensor | None, q: Tensor, corrected: Tensor, p: Tensor, *, unscale: float = 1.0
) -> None:
    """Write ``unscale`` * x + error over ``corrected``, and its product with q^T over ``p``.

    Args:
        x: (n, ...) float32, bfloat16 or float16, m elements a row, any strides.
        error: float32, contiguous, the shape of ``x``; None for none.
        q: (r, m) float32, contiguous.
        corrected: float32, contiguous, the shape of ``x``; may be ``error``.
        p: (n, r) float32, contiguous.
        unscale: factor of ``x``.

    Raises:
        UserError: shapes do not go together, or a tensor is not float32 and contiguous.
    """
    _check(x, corrected, p, q)
    library = _library(x, q.shape[0])
    if library is not None:
        library.project(x.detach().contiguous(), error, unscale, q, corrected, p)
        return
    if error is None:
        corrected.copy_(x.detach()).mul_(unscale)
    else:
        torch.add(error, x.detach(), alpha=unscale, out=corrected)
    torch.mm(corrected.view(corrected.shape[0], -1), q.T, out=p)


def project_back(corrected: Tensor, p: Tensor, q: Tensor) -> None:
    """Write p^T times ``corrected`` over ``q``.

    Args:
        corrected: (n, ...) float32, contiguous, m elements a row.
        p, q: (n, r) and (r, m) float32, contiguous.

    Raises:
        UserError: shapes do not go together, or a tensor is not float32 and contiguous.
    """
    _check(corrected, corrected, p, q)
    library = _library(corrected, q.shape[0])
    if library is not None:
        library.project_back(corrected, p, q)
        return
    # As (r, n) x (n, m), several times as fast on a CPU as its transpose (m, n) x (n, r).
    torch.mm(p.T.contiguous(), corrected.view(corrected.shape[0], -1), out=q)


def rebuild(
    out: Tensor,
    error: Tensor,
    p: Tensor,
    q: Tensor,
    *,
    scale: float,
    scratch: Callable[[int], Tensor],
) -> None:
    """Take p q from ``error``, and write ``scale`` times it over ``out``: the same bits on all ranks.

    Args:
        out: (n, ...) float32, bfloat16 or float16, m elements a row, any strides.
        error: float32, contiguous, the shape of ``out``.
        p, q: (n, r) and (r, m) float32, contiguous.
        scale: factor.
        scratch: float32 memory for so many elements, whose alignment is the same on all ranks, since
            torch's products may depend on it in bits.

    Raises:
        UserError: shapes do not go together, or a tensor is not float32 and contiguous.
    """
    _check(out, error, p, q)
    library = _library(out, q.shape[0])
    if library is not None:
        written = (
            out.detach()
            if out.is_contiguous()
            else torch.empty_like(out, memory_format=torch.contiguous_format)
        )
        library.rebuild(p, q, error, scale, written)
        if written.data_ptr() != out.data_ptr():
            out.detach().copy_(written)
        return
    mean = scratch(out.numel()).view(p.shape[0], q.shape[1])
    torch.mm(p, q, out=mean)
    error.sub_(mean.view(error.shape))
    out.detach().copy_((mean if scale == 1 else mean.mul_(scale)).view(out.shape))


def _library(x: Tensor, rank: int) -> CpuLibrary | None:
    if x.device.type != "cpu" or rank > MOST_RANK or not is_plain(x):
        return None
    return CpuLibrary.for_device(x.device, "auto")


def _check(x: Tensor, whole: Tensor, p: Tensor, q: Tensor) -> None:
    shapes = [tuple(one.shape) for one in (x, whole, p, q)]
    together = p.dim() == q.dim() == 2 and p.shape == (x.shape[0], q.shape[0]) and q.shape[0] > 0
    if not together or whole.shape != x.shape or x.numel() != p.shape[0] * q.shape[1]:
        raise UserError(
            f"a gradient {shapes[0]}, its error {shapes[1]}, p {shapes[2]} and q {shapes[3]} do not go "
            "together; expected (n, ...) twice, (n, r) and (r, m)"
        )
    for name, one in (("error", whole), ("p", p), ("q", q)):
        if one.dtype != torch.float32 or not one.is_contiguous():
            raise UserError(
                f"{name} is {one.dtype} with strides {one.stride()}; expected contiguous torch.float32"
            )
