"""Rank-1 updates of many inverse Kronecker factors in one call.

A factor M is the inverse of an exponential mean F of outer products. When F becomes
gamma F + (1 - gamma) v v^T, its inverse becomes, with u = M v and q = v^T u (Sherman and Morrison),

    M <- (M - (1 - gamma) / (gamma + (1 - gamma) q) u u^T) / gamma

in O(d^2). Source: MKOR, arXiv 2306.01685; its printed equations 5 and 6 have a plus for the minus and gamma
for 1 / gamma twice, and are no inverse. Before the update a factor with a large entry is drawn towards the
identity (equation 9). Numbers, guards and memory traffic are described in ``csrc/mkor/mkor_common.h`` and
``mkor_cuda.cu``, the readable form is `ds_efficient.ops.mkor_reference`.

The function is also an operator, ``torch.ops.ds_efficient.mkor_update_``, with a fake implementation, so that
FakeTensor and ``torch.compile`` see it. It is not differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import mkor_operators as operators
from ds_efficient.ops.mkor_reference import BLENDED, LEFT, RESET, UPDATED
from ds_efficient.ops.native import is_plain

__all__ = ["BACKENDS", "BLENDED", "DTYPES", "LEFT", "RESET", "UPDATED", "update_"]

BACKENDS = ("auto", "native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = set(DTYPES)
_LARGEST_SIZE = 1 << 16
OPERATORS = operators.LIBRARY  # the operator exists as long as this object


def update_(
    matrices: Sequence[Tensor],
    vectors: Tensor,
    largest: Tensor,
    *,
    gamma: float,
    threshold: float = math.inf,
    zeta: float = 0.9,
    backend: str = "auto",
) -> Tensor:
    """Stabilise and update every factor in place; on CUDA without waiting for the device.

    Args:
        matrices: factors M, each (d, d), contiguous, symmetric positive definite, sizes of any mixture up to
            65536, all float32, all bfloat16 or all float16, on one device, none overlapping another. On CUDA
            only the entries on and below the diagonal are read; all are written.
        vectors: (sum of all d,) float32, contiguous: the vectors v one behind the other, as one exchange
            leaves them.
        largest: (number of factors,) float32, contiguous: the largest absolute entry of each M, 1 for the
            identity; updated in place. `torch.ones` at the beginning and the tensor of the call before later
            on, so that no pass over M is spent on it.
        gamma: weight of the old statistics, 0 < gamma <= 1. 1 changes nothing.
        threshold: a factor whose ``largest`` exceeds it becomes zeta M + (1 - zeta) I before the update.
        zeta: 0 <= zeta <= 1.
        backend: ``"auto"`` (compiled code; on the CPU plain torch where no compiler is found, which is logged
            once), ``"native"`` (compiled code or an error) or ``"reference"`` (plain torch).

    Returns:
        (number of factors,) int32: `UPDATED`, `BLENDED` (updated after the blend), `LEFT` or `RESET`. A
        factor is left as it was where v is not finite or its length times ``largest`` exceeds 1e35, and where
        M / gamma might overflow the type. It starts again from the identity where q < 0: rounding has cost it
        its definiteness, which half types allow in spite of the guard that an update leaves at least
        32 epsilon of the type times ``largest`` along v.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    _check_numbers(gamma, threshold, zeta, backend)
    _check_tensors(matrices, vectors, largest)
    matrices = [matrix.detach() if matrix.requires_grad else matrix for matrix in matrices]
    plain = is_plain(vectors) and not vectors.is_meta
    run = operators.update_ if plain else torch.ops.ds_efficient.mkor_update_
    outcome: Tensor = run(matrices, vectors, largest, gamma, threshold, zeta, backend)
    return outcome


def _check_numbers(gamma: float, threshold: float, zeta: float, backend: str) -> None:
    if not 0 < gamma <= 1:
        raise UserError(f"gamma={gamma} is not allowed; use a number above 0 and at most 1, for example 0.95")
    if not threshold > 0:
        raise UserError(f"threshold={threshold} is not allowed; use a positive number, for example 10")
    if not 0 <= zeta <= 1:
        raise UserError(f"zeta={zeta} is not allowed; use a number from 0 to 1, for example 0.9")
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")


def _check_tensors(matrices: Sequence[Tensor], vectors: Tensor, largest: Tensor) -> None:
    # All at once where all is well: this is the host's share of each call.
    where = largest.device
    shapes = [matrix.shape for matrix in matrices]
    kinds = {matrix.dtype for matrix in matrices}
    places = {matrix.device for matrix in matrices}
    fits = all(len(s) == 2 and s[0] == s[1] and 0 < s[0] <= _LARGEST_SIZE for s in set(shapes))
    fits = fits and len(kinds) <= 1 and kinds <= _KINDS and places <= {where}
    if not fits or not all([matrix.is_contiguous() for matrix in matrices]):
        _refuse(matrices, where)
    total = sum([shape[0] for shape in shapes])
    for name, tensor, count in (("vectors", vectors, total), ("largest", largest, len(matrices))):
        fits = tensor.shape == (count,) and tensor.dtype == torch.float32 and tensor.is_contiguous()
        if not fits or tensor.device != where:
            raise UserError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; expected "
                f"contiguous torch.float32 of shape ({count},) on {where}"
            )


def _refuse(matrices: Sequence[Tensor], where: torch.device) -> None:
    """Say which matrix does not fit."""
    for index, matrix in enumerate(matrices):
        shape, dtype = matrix.shape, matrix.dtype
        if matrix.dim() != 2 or shape[0] != shape[1] or not 0 < shape[0] <= _LARGEST_SIZE:
            raise UserError(
                f"matrices[{index}] has shape {tuple(shape)}; expected (d, d) with 1 <= d <= {_LARGEST_SIZE}"
            )
        if dtype not in DTYPES or dtype != matrices[0].dtype:
            raise UserError(
                f"matrices[{index}] is {dtype}, matrices[0] is {matrices[0].dtype}; expected one of "
                f"{', '.join(map(str, DTYPES))} for all"
            )
        if not matrix.is_contiguous() or matrix.device != where:
            raise UserError(
                f"matrices[{index}] has strides {matrix.stride()} on {matrix.device}; expected a contiguous "
                f"matrix on the device of largest, {where}"
            )
