"""Measured synchronisation times for the objective "time".

Source: L-GreCo, arXiv 2210.17357, section 4: "per-bucket coefficient of a linear regression of measured
synchronisation time on bucket bytes", with 5000 samples of 50 steps. There training steps are timed, with
randomly chosen settings; here buffers of random sizes are sent by themselves, which costs seconds. So no
transfer is hidden behind the backward pass: the coefficients say what a byte costs where nothing hides it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.lgreco.error_tables import Exchange
from ds_efficient.lgreco.timing import SynchronisationModel, fit_synchronisation
from ds_efficient.ops.keyed_random import uniform

SAMPLES_A_BUCKET = 4
_WARM_UP = 2
_LEAST = 1 / 64  # of a bucket: about what the strongest compression leaves


def measure_synchronisation(
    exchange: Exchange,
    bucket_bytes: Sequence[int],
    key: Key,
    *,
    device: torch.device | str = "cpu",
    samples: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SynchronisationModel:
    """Time all-reduces of random sizes and fit what a byte of each bucket costs; call it on all ranks.

    Args:
        exchange: the ranks.
        bucket_bytes: size of each bucket uncompressed, > 0; they are sent one after the other, as in a step.
        key: of the sizes, the same on all ranks.
        device: of the gradients; CUDA is waited for before the clock is read.
        samples: rounds over all buckets, by default four a bucket and at least eight.
        clock: seconds.

    Returns:
        The model of the mean over the ranks of the measured times: the same on all ranks.

    Raises:
        UserError: there is no bucket, one is empty, or the samples are too few.
    """
    if not bucket_bytes or min(bucket_bytes) <= 0:
        raise UserError(f"bucket_bytes={list(bucket_bytes)} is not allowed; expected sizes > 0")
    count = max(8, SAMPLES_A_BUCKET * len(bucket_bytes)) if samples is None else samples
    if count < len(bucket_bytes) + 1:
        raise UserError(
            f"samples={samples} cannot tell {len(bucket_bytes)} buckets apart; give {len(bucket_bytes) + 1} "
            "or more"
        )
    shares = _LEAST + (1 - _LEAST) * uniform(key, (count, len(bucket_bytes))).to(torch.float64)
    elements = (shares * torch.tensor(bucket_bytes, dtype=torch.float64) / 4).ceil().to(torch.int64)
    device = torch.device(device)
    buffer = torch.zeros(int(elements.max()), device=device)
    seconds = torch.zeros(count, dtype=torch.float64)
    for sample in range(-_WARM_UP, count):
        row = elements[max(0, sample)].tolist()
        _wait(device)
        begin = clock()
        for size in row:
            exchange.all_reduce(buffer[:size])
        _wait(device)
        if sample >= 0:
            seconds[sample] = clock() - begin
    exchange.all_reduce(seconds)
    return fit_synchronisation((4 * elements).to(torch.float64).numpy(), (seconds / exchange.ranks).numpy())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
