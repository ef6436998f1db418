"""PowerSGD: a gradient matrix as the product of two thin factors, which can be all-reduced.

Power steps towards the leading right singular vectors, as in Vogels et al., arXiv 1905.13727, and L-GreCo,
arXiv 2210.17357: P = M Q, averaged over the ranks and orthogonalised; Q = M^T P, averaged; the gradient is
P Q^T. The mean of the ranks' matrices is never formed. All arithmetic is in float32 (in TF32 where torch is
told to allow it in products); a tensor of more than two dimensions counts as a matrix of its first by the
others. A gradient with a number that is not finite gives factors of NaN: the caller keeps the Q of before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.lgreco.compressors import check_dtype, result_tensor
from ds_efficient.ops import keyed_random, lgreco_orthonormal

Reduce = Callable[[Tensor], object]


class Factors(NamedTuple):
    """A low-rank matrix p q^T: p (n, r) with orthonormal columns, q (m, r), both float32."""

    p: Tensor
    q: Tensor


def _alone(_: Tensor) -> None:
    """The mean over one rank."""


@dataclass(frozen=True)
class PowerSGD:
    """Low rank; needs error feedback.

    Args:
        rank: columns of the factors, >= 1; of a matrix (n, m) at most min(n, m), where it is exact.
        power_steps: times that P and Q are computed and averaged, >= 1. With one step and a warm start the
            subspace follows the gradient over the steps of training; each further step costs as many bytes.

    Raises:
        UserError: an argument is out of range.
    """

    rank: int
    power_steps: int = 1

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("power_steps", self.power_steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value} is out of range; allowed: integers from 1 on")

    def columns(self, shape: Sequence[int]) -> int:
        """Rank for a tensor of this shape, r = min(rank, n, m).

        Raises:
            UserError: the tensor has fewer than two dimensions.
        """
        return min(self.rank, *_matrix_shape(shape))

    def first_q(self, shape: Sequence[int], key: Key | int, *, device: torch.device | str = "cpu") -> Tensor:
        """Q to start from, (m, r) float32 standard normal by key: the same on every rank with the same key.

        Raises:
            UserError: the tensor has fewer than two dimensions.
        """
        _, m = _matrix_shape(shape)
        return keyed_random.normal(key, (m, self.columns(shape)), device=torch.device(device))

    def resized_q(self, q: Tensor, shape: Sequence[int], key: Key | int) -> Tensor:
        """Warm start after a change of rank: the columns of ``q`` that remain, and new ones by key.

        Columns are ordered by singular value only roughly; all ranks must pass the same ``q``.
        """
        r = self.columns(shape)
        if q.shape[1] >= r:
            return q[:, :r].contiguous()
        fresh = self.first_q(shape, key, device=q.device)[:, q.shape[1] :]
        size = torch.linalg.vector_norm(q) / math.sqrt(q.numel())
        return torch.cat((q, fresh * torch.where(size > 0, size, 1.0)), 1)

    def compress(self, tensor: Tensor, q: Tensor, reduce: Reduce = _alone) -> Factors:
        """Factors of the mean of the ranks' tensors.

        Args:
            tensor: (n, ...) float32, bfloat16 or float16: this rank's gradient with its fed-back error.
            q: (m, r) float32, the same on all ranks: `first_q`, or ``q`` of the step before (warm start).
            reduce: averages a float32 tensor over the ranks in place. By default there is one rank.

        Returns:
            p and q, the same on all ranks where ``reduce`` leaves the same bits on all.

        Raises:
            UserError: shapes do not go together, or another dtype.
        """
        check_dtype(tensor.dtype)
        n, m = _matrix_shape(tensor.shape)
        if tuple(q.shape) != (m, self.columns(tensor.shape)) or q.dtype != torch.float32:
            raise UserError(
                f"q is {q.dtype} of shape {tuple(q.shape)}; expected torch.float32 of shape "
                f"({m}, {self.columns(tensor.shape)}) for a tensor of shape {tuple(tensor.shape)}, "
                f"rank {self.rank}"
            )
        matrix = tensor.detach().reshape(n, m).to(torch.float32)
        p = q
        for _ in range(self.power_steps):
            p = matrix @ q
            reduce(p)
            p = orthonormal(p)
            q = matrix.T @ p
            reduce(q)
        return Factors(p, q)

    def decompress(
        self,
        factors: Factors,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        weight: float = 1.0,
        accumulate: bool = False,
    ) -> Tensor:
        """``weight`` * p q^T in ``dtype``, or in ``out``, over it or added to it; rounded once.

        Raises:
            UserError: factors, ``out`` and shape do not go together.
        """
        n, m = _matrix_shape(shape)
        r = self.columns(shape)
        if tuple(factors.p.shape) != (n, r) or tuple(factors.q.shape) != (m, r):
            raise UserError(
                f"factors have shapes {tuple(factors.p.shape)} and {tuple(factors.q.shape)}; expected "
                f"({n}, {r}) and ({m}, {r}) for a tensor of shape {tuple(shape)}"
            )
        out, accumulate = result_tensor(out, shape, dtype, factors.p.device, accumulate)
        value = (factors.p @ factors.q.T).mul_(weight).view(out.shape)
        return out.copy_(value.add_(out.to(torch.float32)) if accumulate else value)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Bytes that a rank gives to the reductions of one call: power_steps * 4 r (n + m)."""
        return self.power_steps * 4 * self.columns(shape) * sum(_matrix_shape(shape))


def orthonormal(p: Tensor) -> Tensor:
    """Orthonormal columns (n, r), n >= r, in new memory; see `orthonormal_`."""
    made = p.clone(memory_format=torch.contiguous_format)
    orthonormal_([made])
    return made


def orthonormal_(matrices: Sequence[Tensor]) -> None:
    """Make the columns of every matrix orthonormal in place: many layers in one call, on CUDA in one launch.

    Up to 64 columns by `ds_efficient.ops.lgreco_orthonormal`, more by Householder's reflections, one matrix
    after the other. The span of the columns stays; a matrix of lower rank, zero above all, is completed to r
    columns; one with a number that is not finite becomes NaN.

    Args:
        matrices: each (n, r) float32, n >= r, contiguous, on one device.

    Raises:
        UserError: a matrix does not fit.
        OpBuildError: the compiled code cannot be built on CUDA.
    """
    small = [matrix for matrix in matrices if matrix.shape[-1] <= lgreco_orthonormal.MOST_COLUMNS]
    lgreco_orthonormal.orthonormalize_(small)
    for matrix in matrices:
        if matrix.shape[-1] > lgreco_orthonormal.MOST_COLUMNS:
            matrix.copy_(_by_reflections(matrix))


def _by_reflections(p: Tensor) -> Tensor:
    bad = ~torch.isfinite(p).all()
    # Only the span counts: the scale keeps squares from under- and overflowing.
    size = p.abs().amax()
    safe = torch.where(bad | (size == 0), 1.0, size)
    found = torch.linalg.qr(torch.where(bad, 0.0, p / safe)).Q
    return torch.where(bad, torch.nan, found)


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) < 2 or not math.prod(shape):
        raise UserError(f"a tensor of shape {tuple(shape)} is no matrix; send it raw")
    return shape[0], math.prod(shape[1:])
