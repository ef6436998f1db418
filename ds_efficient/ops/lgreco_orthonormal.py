"""Orthonormal columns for many thin matrices in one call.

Cholesky-QR in float64, at least twice, with a rule for columns that depend on those before them: see
``csrc/lgreco/orthonormal_common.h``; the readable form is `ds_efficient.ops.lgreco_orthonormal_reference`.
On CUDA one launch does all of them; those of more than 4096 rows are shared by several blocks of threads, in
seven launches whatever their number.

The result is that of Gram-Schmidt. Its bits are the same from call to call on one kind of device, and differ
between the kinds, since sums are added in another order.

Also an operator, ``torch.ops.ds_efficient.lgreco_orthonormalize_``, with a fake implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import lgreco_orthonormal_reference as reference
from ds_efficient.ops.lgreco_orthonormal_native import CpuLibrary, CudaLibrary
from ds_efficient.ops.lgreco_orthonormal_reference import MOST_COLUMNS
from ds_efficient.ops.native import is_plain
from ds_efficient.ops.registration import define_operators

__all__ = ["BACKENDS", "MOST_COLUMNS", "orthonormalize_"]

BACKENDS = ("auto", "native", "reference")
_MOST_ROWS = 1 << 30


def orthonormalize_(matrices: Sequence[Tensor], *, backend: str = "auto") -> None:
    """Make the columns of every matrix orthonormal in place; on CUDA without waiting for the device.

    Args:
        matrices: each (n, r) float32, contiguous, 1 <= r <= n, r <= 64, sizes of any mixture, on one device,
            none overlapping another. The span of the columns stays, but for a column of which less than 1e-6
            of its norm is left beside those before it, zeros above all: it is replaced by the part of a unit
            vector that is orthogonal to all others. Where a number is not finite, the whole matrix becomes
            NaN.
        backend: ``"auto"`` (compiled code; on the CPU plain torch where no compiler is found, which is logged
            once), ``"native"`` (compiled code or an error), ``"reference"`` (plain torch, which waits for the
            device).

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")
    if not matrices:
        return
    for index, matrix in enumerate(matrices):
        _check(index, matrix, matrices[0].device)
    plain = [matrix.detach() if matrix.requires_grad else matrix for matrix in matrices]
    known = is_plain(plain[0]) and not plain[0].is_meta
    run = _orthonormalize if known else torch.ops.ds_efficient.lgreco_orthonormalize_
    run(plain, backend)


def _check(index: int, matrix: Tensor, device: torch.device) -> None:
    fits = matrix.dim() == 2 and 1 <= matrix.shape[1] <= min(MOST_COLUMNS, matrix.shape[0])
    if not fits or matrix.shape[0] >= _MOST_ROWS:
        raise UserError(
            f"matrices[{index}] has shape {tuple(matrix.shape)}; expected (n, r) with 1 <= r <= n < "
            f"{_MOST_ROWS} and r <= {MOST_COLUMNS}"
        )
    if matrix.dtype != torch.float32 or not matrix.is_contiguous() or matrix.device != device:
        raise UserError(
            f"matrices[{index}] is {matrix.dtype} with strides {matrix.stride()} on {matrix.device}; "
            f"expected contiguous torch.float32 on the device of matrices[0], {device}"
        )


def _orthonormalize(matrices: Sequence[Tensor], backend: str) -> None:
    device = matrices[0].device
    library = (CudaLibrary if device.type == "cuda" else CpuLibrary).for_device(device, backend)
    if library is not None:
        library.orthonormalize(matrices)
        return
    for matrix in matrices:
        reference.orthonormalize_(matrix)


def _fake(matrices: Sequence[Tensor], backend: str) -> None:
    return None


OPERATORS = define_operators(
    ("lgreco_orthonormalize_(Tensor(a!)[] matrices, str backend) -> ()", _orthonormalize, _fake)
)
