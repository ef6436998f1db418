"""The rank-1 update of an inverse Kronecker factor in plain torch, beside ``csrc/mkor/mkor_common.h``.

The compiled code does the same with sums in another order. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

VERSION = 2
UPDATED, BLENDED, LEFT, RESET = 0, 1, 2, 3
ROUNDING = 32
"""What an update leaves of M along v at least, in epsilons of the stored type times the largest entry."""
LONGEST = 1e35
"""A vector is left out whose length times the largest entry of M exceeds this: sums could overflow."""
_RUN = 1 << 20  # elements that are turned into float64 at a time


def updated(
    matrix: Tensor,
    vector: Tensor,
    largest: Tensor,
    gamma: float,
    threshold: float,
    zeta: float,
    stored_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """New factor, its largest absolute entry, the outcome.

    Args:
        matrix: (d, d) symmetric positive definite, any floating dtype.
        vector: (d,).
        largest: () largest absolute entry of ``matrix``.
        gamma, threshold, zeta: see `ds_efficient.ops.mkor.update_`.
        stored_dtype: type whose rounding and range the guards are for; that of ``matrix`` unless given.

    Returns:
        In the dtypes of ``matrix`` and ``largest``, and int32; arithmetic in float32, for a float64 matrix
        in float64.
    """
    exact = matrix.dtype if matrix.dtype == torch.float64 else torch.float32
    kind = torch.finfo(stored_dtype or matrix.dtype)
    stored, v = matrix.to(exact), vector.to(exact)
    identity = torch.eye(len(v), dtype=exact, device=matrix.device)
    blend = largest > threshold
    m = torch.where(blend, zeta * stored + (1 - zeta) * identity, stored)
    # A positive definite matrix has its largest entry on the diagonal, and the update only lowers that.
    bound = torch.where(blend, zeta * largest.double() + (1 - zeta), largest.double())
    u = m @ v
    q, square = u.double() @ v.double(), v.double() @ v.double()
    sound = q.isfinite() & (square.sqrt() * bound <= LONGEST) & (bound / gamma <= kind.max)
    lost = sound & (q < 0)
    floor = gamma * ROUNDING * kind.eps * bound * square
    weight = torch.minimum((1 - gamma) / (gamma + (1 - gamma) * q), (q - floor) / q.square())
    weight = torch.where(q > floor, weight, 0.0)
    w = ((weight / gamma).sqrt() * u.double()).to(exact)
    new = torch.where(lost, identity, m / gamma - torch.outer(w, w)).to(matrix.dtype)
    new = torch.where(sound, new, matrix)
    outcome = torch.where(lost, RESET, torch.where(sound, blend.to(torch.int32), LEFT))
    return new, torch.where(sound, new.abs().max().to(largest.dtype), largest), outcome.to(torch.int32)


def update_(
    matrices: Sequence[Tensor],
    vectors: Tensor,
    largest: Tensor,
    gamma: float,
    threshold: float,
    zeta: float,
) -> Tensor:
    """`ds_efficient.ops.mkor.update_`, factor by factor."""
    outcomes = torch.empty(len(matrices), dtype=torch.int32, device=largest.device)
    parts = vectors.split([len(matrix) for matrix in matrices])
    for index, (matrix, vector) in enumerate(zip(matrices, parts, strict=True)):
        new, most, outcome = updated(matrix, vector, largest[index], gamma, threshold, zeta)
        matrix.copy_(new)
        largest[index] = most
        outcomes[index] = outcome
    return outcomes


def rescale_(
    gradients: Sequence[Tensor], products: Sequence[Tensor], counts: Sequence[int], subtract: bool = False
) -> Tensor:
    """`ds_efficient.ops.mkor_precondition.rescale_`, layer by layer."""
    sums = torch.empty(len(counts), 3, dtype=torch.float64, device=gradients[0].device)
    first = 0
    if subtract:
        products = [_difference(g, p) for g, p in zip(gradients, products, strict=True)]
    for index, count in enumerate(counts):
        pairs = list(zip(gradients[first : first + count], products[first : first + count], strict=True))
        first += count
        mine = sums[index]
        mine.zero_()
        for g, p in pairs:
            mine[0] += torch.linalg.vector_norm(g, dtype=torch.float64).square()
            mine[1] += torch.linalg.vector_norm(p, dtype=torch.float64).square()
            for a, b in zip(g.flatten().split(_RUN), p.flatten().split(_RUN), strict=True):
                mine[2] += torch.dot(a.double(), b.double())
        scale = (mine[0] / mine[1]).sqrt()
        usable = scale.isfinite() & (scale > 0) & (mine[2] > 0)
        for g, p in pairs:
            wide = p if p.dtype == torch.float64 else p.float()
            most = torch.finfo(g.dtype).max
            scaled = (wide * scale.to(wide.dtype)).clamp_(-most, most)
            g.copy_(torch.where(usable, scaled.to(g.dtype), g))
    return sums


def _difference(g: Tensor, p: Tensor) -> Tensor:
    """``g - p``, not rounded to a half type."""
    return g - p if g.dtype == torch.float64 else g.float() - p.float()
