"""The time objective of L-GreCo: what a byte of each bucket costs, from measured synchronisation times.

Source: arXiv 2210.17357, section 4 ("time-based objective"): the plan makes sum_l size(l, c_l) * T(l) small
    instead of
the size, where T is the coefficient of l's bucket in a linear regression of measured times on bytes. The
coefficients
here are not negative: more bytes never save time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ds_efficient.errors import UserError

Floats = NDArray[np.float64]
_TOLERANCE = 1e-10  # relative: below it a residual's slope counts as zero


@dataclass(frozen=True)
class SynchronisationModel:
    """Seconds of a step's synchronisation = latency + sum over buckets of seconds_per_byte * bytes.

    Attributes:
        latency: seconds that no byte accounts for.
        seconds_per_byte: one coefficient a bucket, >= 0; 0 where its transfer is hidden behind the backward
            pass.
        r_squared: share of the times' variance that the model explains, at most 1.
        samples: measurements it was fitted to.
    """

    latency: float
    seconds_per_byte: tuple[float, ...]
    r_squared: float
    samples: int

    def predict(self, sizes: ArrayLike) -> Floats:
        """Seconds of each sample: (samples, buckets) bytes -> (samples,)."""
        return self.latency + _array(sizes) @ np.asarray(self.seconds_per_byte)

    def costs(self, sizes: Sequence[ArrayLike] | ArrayLike, buckets: Sequence[int]) -> list[Floats]:
        """Seconds of each option, the ``sizes`` of `ds_efficient.lgreco.plan_compression`.

        Args:
            sizes: (L, k), or L vectors of any lengths: bytes of each option.
            buckets: (L,) the bucket in which each layer is sent.

        Raises:
            UserError: a bucket is unknown, or the numbers of layers differ.
        """
        rows = [_array(row) for row in sizes]  # type: ignore[union-attr]
        if len(rows) != len(buckets):
            raise UserError(
                f"sizes has {len(rows)} layers, buckets {len(buckets)}; expected one bucket a layer"
            )
        known = len(self.seconds_per_byte)
        for layer, bucket in enumerate(buckets):
            if not 0 <= bucket < known:
                raise UserError(
                    f"buckets: layer {layer} is in bucket {bucket}; the model knows 0 .. {known - 1}"
                )
        return [row * self.seconds_per_byte[bucket] for row, bucket in zip(rows, buckets, strict=True)]


def fit_synchronisation(sizes: ArrayLike, seconds: ArrayLike) -> SynchronisationModel:
    """Fit the model by least squares with coefficients >= 0.

    Args:
        sizes: (samples, buckets) bytes sent for each bucket; between the samples the buckets must vary
            independently (send them with randomly chosen settings).
        seconds: (samples,) measured time of the synchronisation, the warm-up left out.

    Raises:
        UserError: shapes do not fit, numbers are not finite, or the samples cannot tell the buckets apart.
    """
    x, y = _array(sizes), _array(seconds)
    if x.ndim != 2 or y.shape != (x.shape[0],):
        raise UserError(
            f"sizes has shape {x.shape}, seconds {y.shape}; expected (samples, buckets) and (samples,)"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError("sizes and seconds must be finite; leave failed measurements out")
    samples, buckets = x.shape
    if samples < buckets + 1:
        raise UserError(
            f"{samples} samples cannot fit {buckets} buckets and a latency; measure at least {buckets + 1}"
        )
    design = np.concatenate([np.ones((samples, 1)), x], axis=1)
    scale = np.abs(design).max(axis=0)
    if not scale.all() or np.linalg.matrix_rank(design / scale) < buckets + 1:
        raise UserError(
            "sizes: the samples cannot tell the buckets apart; vary each bucket's bytes independently"
        )
    coefficients = _nonnegative_least_squares(design / scale, y) / scale
    residual = float(((y - design @ coefficients) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    r_squared = 1.0 - residual / spread if spread else 1.0
    latency, *slopes = (float(value) for value in coefficients)
    return SynchronisationModel(latency, tuple(slopes), r_squared, samples)


def _nonnegative_least_squares(a: Floats, y: Floats) -> Floats:
    """argmin |a x - y| over x >= 0 by Lawson and Hanson's active sets (1974); independent columns."""
    count = a.shape[1]
    x, free = np.zeros(count), np.zeros(count, dtype=bool)
    slope = a.T @ y
    bound = _TOLERANCE * float(np.abs(slope).max(initial=0.0))
    for _ in range(3 * count):  # one variable becomes free in each turn; the customary limit
        candidates = np.where(free, -np.inf, slope)
        best = int(candidates.argmax())
        if candidates[best] <= bound:
            break
        free[best] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(a[:, free], y, rcond=None)[0]
            if (trial[free] > 0).all():
                break
            # Go towards the trial until the first variable becomes zero, and fix it there.
            below = np.flatnonzero(free & (trial <= 0))
            steps = x[below] / (x[below] - trial[below] + np.finfo(float).tiny)
            x = x + steps.min() * (trial - x)
            free[below[steps == steps.min()]] = False
            x[~free] = 0.0
        x = trial
        slope = a.T @ (y - a @ x)
    return x


def _array(values: ArrayLike) -> Floats:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)
