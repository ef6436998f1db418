"""The rank-1 update of an inverse Kronecker factor in plain torch, beside ``csrc/mkor/mkor_common.h``.

The compiled code does the same with sums in another order. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

VERSION = 1
UPDATED, BLENDED, LEFT = 0, 1, 2


def updated(
    matrix: Tensor, vector: Tensor, largest: Tensor, gamma: float, threshold: float, zeta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """New factor, its largest absolute entry, the outcome.

    Args:
        matrix: (d, d) symmetric positive definite, any floating dtype.
        vector: (d,).
        largest: () largest absolute entry of ``matrix``.
        gamma, threshold, zeta: see `ds_efficient.ops.mkor.update_`.

    Returns:
        In the dtypes of ``matrix`` and ``largest``, and int32; arithmetic in float32, for a float64 matrix
        in float64.
    """
    exact = matrix.dtype if matrix.dtype == torch.float64 else torch.float32
    stored, v = matrix.to(exact), vector.to(exact)
    blend = largest > threshold
    identity = torch.eye(len(v), dtype=exact, device=matrix.device)
    m = torch.where(blend, zeta * stored + (1 - zeta) * identity, stored)
    u = m @ v
    q = u.double() @ v.double()
    denominator = gamma + (1 - gamma) * q
    # A positive definite matrix has its largest entry on the diagonal, and the update only lowers that.
    bound = torch.where(blend, zeta * largest.double() + (1 - zeta), largest.double()) / gamma
    sound = (denominator > 0) & denominator.isfinite() & (bound <= 3.38e38)
    w = (((1 - gamma) / (gamma * denominator)).sqrt() * u.double()).to(exact)
    new = torch.where(sound, (m / gamma - torch.outer(w, w)).to(matrix.dtype), matrix)
    outcome = torch.where(sound, blend.to(torch.int32), LEFT)
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
