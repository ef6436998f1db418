"""How far a sketched weight gradient is from the exact one: formulas for every sketch.

With X (B, in) the input of a linear layer and Y (B, out) the gradient of its output, the weight gradient
``Y^T X`` is estimated by ``(S^T Y)^T (S^T X)``. The estimate is unbiased, and its variance, the mean of
``||(S^T Y)^T (S^T X) - Y^T X||_F^2``, depends on three numbers only: f = ||X||_F^2 ||Y||_F^2,
t = ||X^T Y||_F^2 and r = sum_i ||x_i||^2 ||y_i||^2. With p the rows of the projection:

========== ==================================================== ===========================================
sketch     variance                                             S
========== ==================================================== ===========================================
gaussian   (f + t) / p                                          independent normals, variance 1/p
rademacher (f + t - 2 r) / p                                    independent signs / sqrt(p)
count      (f + t - 2 r) / p                                    one sign in a random column of each row
srht       (f + t - 2 r) / p * (n - p) / (n - 1)                random signs, Hadamard matrix of n rows (B
                                                                rounded up to a power of two), p of its
                                                                rows without replacement, / sqrt(p)
rows       (B - p) / p * (B r - t) / (B - 1)                    p of B rows without replacement, sqrt(B/p)
========== ==================================================== ===========================================

All are exact. A block-diagonal S, with blocks drawn independently, has the sum over its blocks, each with the
f, t, r, B and p of its own rows.

The derivation, for the first: with s a standard normal vector, A = X X^T and C = Y Y^T,
``E[(s^T A s)(s^T C s)] = tr A tr C + 2 tr(A C) = f + 2 t``, of which t is the squared mean; the mean over p
independent columns divides what is left by p. For SRHT: ``(S S^T)_ij = d_i d_j g(i xor j)``, where g(k) is
the mean of row k of the Hadamard matrix over the p chosen columns. Of the products of two such elements, ij
and kl, the signs' mean leaves k = i, l = j and k = j, l = i, both with the factor E[g(i xor j)^2]. For every
i != j this is the variance of a mean of p of n values without replacement, half of them 1 and half -1:
(n - p) / (p (n - 1)). So the variance is this times the sum over i != j of
||x_i||^2 ||y_j||^2 + <x_i, x_j><y_i, y_j>, which is f + t - 2 r.

Source: arXiv 2201.13195, whose Eq. 11 has the first with a minus sign (`printed_variance`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops.rmm_partition import SKETCHES, Partition


class Coefficients(NamedTuple):
    """The variance of one block is ``f * <its f> + t * <its t> + r * <its r>``."""

    f: float
    t: float
    r: float

    def variance(self, f: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Variance of blocks with these f, t and r (any shape)."""
        return self.f * f + self.t * t + self.r * r


def coefficients(sketch: str, rows: int, projected: int) -> Coefficients:
    """Return the coefficients of f, t and r for one block.

    Args:
        sketch: of `SKETCHES`.
        rows: rows of the block, at least 1.
        projected: rows of its projection, at least 1.

    Raises:
        UserError: an unknown sketch, or a projection that it cannot make.
    """
    if sketch not in SKETCHES:
        raise UserError(f"sketch={sketch!r} is not known; allowed: {', '.join(SKETCHES)}")
    limit = padded(rows) if sketch == "srht" else rows
    if projected < 1 or (sketch in ("srht", "rows") and projected > limit):
        raise UserError(
            f"rows={projected} of the projection of a block of {rows} rows; allowed for sketch {sketch!r}: "
            f"1 to {limit if sketch in ('srht', 'rows') else 'any number'}"
        )
    if sketch == "gaussian":
        return Coefficients(1 / projected, 1 / projected, 0.0)
    if sketch == "rows":
        scale = (rows - projected) / (projected * (rows - 1)) if rows > 1 else 0.0
        return Coefficients(0.0, -scale, scale * rows)
    scale = 1 / projected
    if sketch == "srht":
        scale *= (limit - projected) / (limit - 1) if limit > 1 else 0.0
    return Coefficients(scale, scale, -2 * scale)


def padded(rows: int) -> int:
    """Rows of the Hadamard matrix of a block: the next power of two."""
    return 1 << max(0, rows - 1).bit_length()


def sketch_variance(x: Tensor, y: Tensor, rows: int, sketch: str, block_size: int = 0) -> float:
    """Variance of the sketched weight gradient: the mean of its squared Frobenius distance to the exact one.

    Args:
        x: (B, in) or (..., in), input of the layer, any float type; computed in fp64.
        y: (B, out) or (..., out), gradient of the output, with the same leading sizes.
        rows: rows of the projection of each whole block; a last block of fewer rows has its share of them,
            rounded up.
        sketch: of `SKETCHES`.
        block_size: rows of x that are projected together; 0, or B and more: all.

    Returns:
        The variance, in units of the squared gradient; 0.0 for no rows at all, or where x or y is zero.

    Raises:
        UserError: sizes that do not fit, an unknown sketch, or a projection with too few or too many rows.
    """
    x, y = _flat(x, y)
    if block_size < 0:
        raise UserError(f"block_size={block_size} is negative; allowed: 0 (all rows together) or more")
    block = min(block_size, len(x)) or len(x)
    cuts = [(block, rows)] * (len(x) // block if block else 0)
    if block and len(x) % block:
        cuts.append((len(x) % block, -(-rows * (len(x) % block) // block)))
    return _sum_of_blocks(x, y, sketch, iter(cuts))


def partition_variance(x: Tensor, y: Tensor, parts: Partition, sketch: str) -> float:
    """`sketch_variance` with the blocks and projected rows of a partition; 0.0 where it is exact.

    Args:
        x: (B, in) or (..., in).
        y: (B, out) or (..., out).
        parts: how the B rows are cut (`ds_efficient.ops.rmm.partition`).
        sketch: of `SKETCHES`.

    Raises:
        UserError: sizes that do not fit, or an unknown sketch.
    """
    x, y = _flat(x, y)
    if parts.rows != len(x):
        raise UserError(f"the partition is one of {parts.rows} rows; x has {len(x)}")
    if parts.exact:
        return 0.0
    cuts = [(parts.block, parts.projected)] * (parts.rows // parts.block)
    if parts.last_rows:
        cuts.append((parts.last_rows, parts.last_projected))
    return _sum_of_blocks(x, y, sketch, iter(cuts))


def _sum_of_blocks(x: Tensor, y: Tensor, sketch: str, cuts: Iterator[tuple[int, int]]) -> float:
    total, start = x.new_zeros(()), 0
    for rows, projected in cuts:
        part = slice(start, start + rows)
        total += coefficients(sketch, rows, projected).variance(*_moments(x[part], y[part]))
        start += rows
    return float(total.clamp_min(0))  # rounding may leave less than 0 of what is 0


def sgd_variance(x: Tensor, y: Tensor) -> float:
    """Noise of the exact gradient itself: (B r - t) / (B - 1), Eq. 9 of the paper.

    It is the unbiased sample variance of the rows' contributions ``y_i x_i^T``, times B: an estimate of the
    variance of their sum, had the rows been drawn independently. Rows that are tokens of a few sequences
    are not independent, so it is a scale to compare with, not the noise of a training step.

    Args:
        x: (B, in) or (..., in).
        y: (B, out) or (..., out).

    Returns:
        The variance; 0.0 for fewer than two rows, which show no spread.

    Raises:
        UserError: sizes that do not fit.
    """
    x, y = _flat(x, y)
    if len(x) < 2:
        return 0.0
    _, t, r = _moments(x, y)
    return float(((len(x) * r - t) / (len(x) - 1)).clamp_min(0))


def correlation(x: Tensor, y: Tensor) -> float:
    """t / f = ||X^T Y||^2 / (||X||^2 ||Y||^2), from 0 to 1: Eq. 13 of the paper; 0.0 where f is 0.

    Args:
        x: (B, in) or (..., in).
        y: (B, out) or (..., out).

    Raises:
        UserError: sizes that do not fit.
    """
    x, y = _flat(x, y)
    f, t, _ = _moments(x, y)
    return float(t / f) if f else 0.0


def printed_variance(x: Tensor, y: Tensor, rows: int) -> float:
    """(f - t) / p: the paper's Eq. 11 as printed, which is NOT the variance of a Gaussian sketch.

    It is less than the right one, (f + t) / p, by the fraction 2 a / (1 + a) of it, with a the `correlation`.
    For comparison with the paper only.

    Args:
        x: (B, in) or (..., in).
        y: (B, out) or (..., out).
        rows: rows of the projection, p.

    Raises:
        UserError: sizes that do not fit, or p below 1.
    """
    if rows < 1:
        raise UserError(f"rows={rows} of the projection; allowed: 1 and more")
    f, t, _ = _moments(*_flat(x, y))
    return float((f - t) / rows)


def _flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() < 1 or x.shape[:-1] != y.shape[:-1]:
        raise UserError(
            f"x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)}: expected (..., in) and (..., out) "
            "with the same rows"
        )
    x, y = (z.detach().to(torch.float64).reshape(-1, z.shape[-1]) for z in (x, y))
    return x, y


def _moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f, t and r of a block."""
    a, b = x.square().sum(1), y.square().sum(1)
    return a.sum() * b.sum(), (x.t() @ y).square().sum(), (a * b).sum()
