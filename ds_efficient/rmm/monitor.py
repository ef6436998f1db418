"""Noise of the sketched weight gradient, estimated without the layer's input, and the rows that it needs.

At a monitored step a layer has, beside what it saves anyway, the squared norms of its input's rows (B floats,
`squared_norms`). In the backward pass there are, for each block j of the sketch, the projections
``P = S_j^T X_j`` and ``Q = S_j^T Y_j``, the squared norms of Y's rows, and the estimated gradient
``G = sum_j Q_j^T P_j``. Of the three numbers that `ds_efficient.rmm.variance` needs of each block,
``f_j = ||X_j||^2 ||Y_j||^2`` and ``r_j = sum_i ||x_i||^2 ||y_i||^2`` are known from the norms. The third,
``t_j = ||X_j^T Y_j||^2``, is estimated: with ``c_f f + c_t t + c_r r`` the variance of the block's estimate,

    E ||Q_j^T P_j||^2 = t_j + c_f f_j + c_t t_j + c_r r_j,   so that
    t_j ~ (||Q_j^T P_j||^2 - c_f f_j - c_r r_j) / (1 + c_t)  is unbiased, for every sketch;

``||Q_j^T P_j||^2`` is the sum over the elements of ``(Q_j Q_j^T) * (P_j P_j^T)``, two matrices of p x p. The
variances D_j^2 that follow are linear in t_j, hence unbiased too, and so is their sum D^2. Likewise, for all
rows together, ``E ||G||^2 = ||X^T Y||^2 + D^2`` gives ``t ~ ||G||^2 - D^2``, and with it SGD's own variance
``(B r - t) / (B - 1)``. Single estimates may be negative where the numbers are small; means over steps and
micro-batches are what the report shows.

The variances of micro-batches, of data-parallel ranks and of the tensor-parallel shards of one weight add up,
and so do the estimates. Gradients scaled by a factor have variances scaled by its square; ratios stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops.rmm_partition import ROUNDING, SKETCHES, Partition
from ds_efficient.rmm.variance import coefficients, padded

_CHUNK = 8  # blocks whose projections are in fp32 at a time
_FINITE = ("rows", "srht")  # their variance ends at 0, where every row is taken


@dataclass(frozen=True)
class Noise:
    """What was found for one layer: sums over the micro-batches that were added up.

    Attributes:
        variance: of the sketch in use, D^2; 0 where the gradient was exact.
        sgd_variance: of the exact gradient (`ds_efficient.rmm.variance.sgd_variance`).
        scale: D^2 of the same sketch is ``scale / ratio``, or for "rows" and "srht"
            ``scale * (1 / ratio - 1)``, with the ratio the projected share of a block's rows.
        squared_gradient: squared norm of the exact gradient of a micro-batch.
    """

    variance: float
    sgd_variance: float
    scale: float
    squared_gradient: float

    @property
    def ratio(self) -> float:
        """D^2 / D^2_SGD; 0.0 where both are 0 or less, infinite where only the second is."""
        if self.sgd_variance > 0:
            return max(0.0, self.variance) / self.sgd_variance
        return math.inf if self.variance > 0 else 0.0


def squared_norms(x: Tensor) -> Tensor:
    """Return the squared norm of each row of x (rows, features): (rows,) in fp32, fp64 for fp64."""
    return torch.linalg.vector_norm(x.detach(), dim=1, dtype=_precise(x)).square()


def _squared_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=_precise(x)).double().square()


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.no_grad()
def measure(
    x_norms: Tensor,
    y_norms: Tensor,
    p: Tensor,
    q: Tensor,
    gradient: Tensor,
    parts: Partition,
    sketch: str,
    *,
    shards: int = 1,
) -> Tensor:
    """Estimate the noise of one weight gradient.

    The result stays on the device and nothing waits for it: add up those of micro-batches and ranks, then
    `read` them. Where there are several blocks it costs the products P P^T and Q Q^T of each in fp32.

    Args:
        x_norms: (shards * B,), `squared_norms` of the input.
        y_norms: (shards * B,), of the gradient of the output.
        p: (shards * parts.total, in), projection of the input; the input itself where `parts` is exact.
        q: (shards * parts.total, out), projection of the gradient of the output, or this itself.
        gradient: (out, in), the estimate ``q^T p``.
        parts: how the B rows of each shard are cut and projected.
        sketch: of `ds_efficient.ops.rmm.SKETCHES`.
        shards: ranks whose projected rows lie one below the other (sequence parallelism).

    Returns:
        (4,) fp64: the fields of `Noise`. All 0 where there are no rows.

    Raises:
        UserError: an unknown sketch, or one sampled row of several ("rows" with p = 1), which says nothing
            about t.
    """
    if sketch not in SKETCHES:
        raise UserError(f"sketch={sketch!r} is not known; allowed: {', '.join(SKETCHES)}")
    total = shards * parts.rows
    if not total:
        return torch.zeros(4, dtype=torch.float64, device=gradient.device)
    a, b = x_norms.double().view(shards, -1), y_norms.double().view(shards, -1)
    ps, qs = p.view(shards, -1, p.shape[-1]), q.view(shards, -1, q.shape[-1])
    variance, scale = a.new_zeros(()), a.new_zeros(())
    estimate = _squared_norm(gradient)
    whole = shards == 1 and parts.block >= parts.rows  # one block: its Q^T P is the gradient
    for rows, projected, at, at_p in _cuts(parts):
        f = _blocks(a[:, at], rows).sum(1) * _blocks(b[:, at], rows).sum(1)
        r = (_blocks(a[:, at], rows) * _blocks(b[:, at], rows)).sum(1)
        norms = (
            estimate
            if whole
            else squared_norm_of_product(_blocks(ps[:, at_p], projected), _blocks(qs[:, at_p], projected))
        )
        if parts.exact:
            t = norms
        else:
            c = coefficients(sketch, rows, projected)
            if 1 + c.t <= 0:
                raise UserError("one row sampled of several says nothing about the variance; use more rows")
            t = (norms - c.f * f - c.r * r) / (1 + c.t)
            variance = variance + c.variance(f, t, r).sum()
        scale = scale + _scale(sketch, rows, f, t, r).sum()
    squared = estimate - variance
    r_all = (a * b).sum()
    sgd = (total * r_all - squared) / (total - 1) if total > 1 else r_all * 0
    return torch.stack([variance, sgd, scale, squared])


def _cuts(parts: Partition) -> Iterator[tuple[int, int, slice, slice]]:
    """Rows and projected rows of a block, and the range of both: of the whole blocks, then of the last."""
    block = min(parts.block, parts.rows)
    projected = block if parts.exact else parts.projected
    whole, last = divmod(parts.rows, block)
    at, at_p = whole * block, whole * projected
    yield block, projected, slice(0, at), slice(0, at_p)
    if last:
        yield last, last if parts.exact else parts.last_projected, slice(at, None), slice(at_p, None)


def _blocks(x: Tensor, rows: int) -> Tensor:
    """(shards, blocks * rows, ...) to (shards * blocks, rows, ...)."""
    return x.reshape(-1, rows, *x.shape[2:])


def squared_norm_of_product(p: Tensor, q: Tensor) -> Tensor:
    """Return ||Q_j^T P_j||^2 of each block.

    Args:
        p: (blocks, rows, in).
        q: (blocks, rows, out).

    Returns:
        (blocks,) fp64; the products are made in fp32 (fp64 for fp64).
    """
    found = []
    for start in range(0, len(p), _CHUNK):
        grams = []
        for z in (p[start : start + _CHUNK], q[start : start + _CHUNK]):
            z = z.to(_precise(z))
            grams.append(torch.bmm(z, z.transpose(1, 2)).double())
        found.append((grams[0] * grams[1]).sum((1, 2)))
    return torch.cat(found)


def _scale(sketch: str, rows: int, f: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """`Noise.scale` of each block."""
    if sketch == "rows":
        return (rows * r - t) / max(1, rows - 1)
    if sketch == "gaussian":
        return (f + t) / rows
    return (f + t - 2 * r) / (max(1, padded(rows) - 1) if sketch == "srht" else rows)


def read(noise: Tensor) -> list[Noise]:
    """Return what was measured, in one copy from the device.

    Args:
        noise: (layers, 4), sums of results of `measure`.
    """
    return [Noise(*values) for values in noise.tolist()]


def rows_for_target(noise: Noise, target: float, block: int, sketch: str, *, min_rows: int = ROUNDING) -> int:
    """Rows of a block's projection whose variance is at most ``target`` times SGD's own.

    ``scale / ratio <= target * sgd_variance`` solved for the ratio (for "rows" and "srht"
    ``scale * (1 / ratio - 1)``), times the block. A ragged last block counts as a whole one would, in
    proportion. Where rows have similar norms D^2 / D^2_SGD is about 1 / ratio (1 / ratio - 1 for "rows"), so
    useful targets are above 1: 8 is about an eighth of the rows.

    Args:
        noise: of the layer, over one step or several.
        target: largest D^2 / D^2_SGD wanted, above 0.
        block: rows of a block, at least 1.
        sketch: of `ds_efficient.ops.rmm.SKETCHES`.
        min_rows: the fewest to return.

    Returns:
        A multiple of 8, at most `block`, which stands for the exact gradient: where only that keeps to the
        target, as when all rows contribute the same (SGD's variance is 0). `min_rows` where the sketch has no
        variance.

    Raises:
        UserError: a target of 0 or less, or that is no number, or a block without rows.
    """
    if not target > 0:
        raise UserError(f"target_variance_ratio={target}; allowed: above 0, for example 8")
    if block < 1:
        raise UserError(f"block={block}; allowed: 1 and more")
    fewest = min(min_rows, block)
    if noise.scale <= 0:
        return fewest
    allowed = target * noise.sgd_variance
    if allowed <= 0:
        return block
    if not math.isfinite(allowed):
        return fewest
    if sketch in _FINITE:
        full = padded(block) if sketch == "srht" else block
        wanted = Fraction(full) / (1 + Fraction(allowed) / Fraction(noise.scale))
    else:
        wanted = block * Fraction(noise.scale) / Fraction(allowed)
    rows = -(-math.ceil(wanted) // ROUNDING) * ROUNDING
    return min(block, max(fewest, rows))
