"""How large the compression error of every option of a layer would be, simulated without error feedback.

Source: L-GreCo, arXiv 2210.17357, section 4: the error is the norm of what compressing and decompressing the
accumulated gradient loses. The paper's code measures low rank only, by random power iteration, on rank 0's
local gradient. Here:

- quantised: compressed and decompressed, for every number of bits;
- largest entries: one selection of the most; the error of every density is a sum of what it leaves out;
- low rank: one power iteration of the largest rank, and the spectrum of what it finds; the error of a smaller
  rank is that of the best matrix of this rank in the subspace found. A warm start leads PowerSGD to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.lgreco.compressors import QSGD, TopK
from ds_efficient.lgreco.feedback import ErrorKind, compression_error
from ds_efficient.lgreco.options import Option, wire_bytes
from ds_efficient.lgreco.powersgd import PowerSGD

POWER_STEPS = 3
_OVERSAMPLING = 8  # columns beside the largest rank: they make its last singular values exact sooner


class Exchange(Protocol):
    """The data-parallel group, as far as it is needed here.

    Attributes:
        rank: number of this rank in the group.
        ranks: size of the group.
    """

    rank: int
    ranks: int

    def all_reduce(self, tensor: Tensor) -> object:
        """Replace a contiguous float32 or float64 tensor by its sum over the ranks; the same bits on all."""


class Alone:
    """The group of one rank."""

    rank = 0
    ranks = 1

    def all_reduce(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""


class ErrorTable(NamedTuple):
    """Errors of the options of each layer, the same on every rank.

    Attributes:
        errors: one (options,) float64 tensor a layer, on the CPU. All NaN where the gradient is zero, so that
            nothing is known of its later ones, or not finite.
        norms: (layers,) float64, of the averaged gradients.
        nbytes: what a rank sent for it, as `ds_efficient.lgreco.options.wire_bytes` counts.
    """

    errors: list[Tensor]
    norms: Tensor
    nbytes: int


def layer_errors(gradient: Tensor, options: Sequence[Option], key: Key, kind: ErrorKind = "l2") -> Tensor:
    """Errors of one layer's options.

    Args:
        gradient: the layer's averaged gradient, float32, at least two dimensions.
        options: what it may be sent as.
        key: of what the simulated compressors draw.
        kind: norm of the error or its square.

    Returns:
        (options,) float64 on the gradient's device. Raw is 0; all are NaN where a number is not finite.
    """
    gradient = gradient.detach().to(torch.float32)
    bad = ~torch.isfinite(gradient).all()
    safe = torch.where(bad, 0.0, gradient)
    found = torch.zeros(len(options), dtype=torch.float64, device=gradient.device)
    for compressor, measure in (("powersgd", _low_rank), ("topk", _largest), ("qsgd", _quantised)):
        places = [place for place, option in enumerate(options) if option.compressor == compressor]
        if places:
            settings = [options[place].setting for place in places]
            found[places] = measure(safe, settings, key.fold(compressor))
    return torch.where(bad, torch.nan, found.square() if kind == "l2_squared" else found)


def measure_errors(
    gradients: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    options: Mapping[str, Sequence[Option]],
    key: Key,
    *,
    exchange: Exchange,
    kind: ErrorKind = "l2",
) -> ErrorTable:
    """Errors of all layers, each simulated by one rank.

    Args:
        gradients: this rank's gradient of each layer, float32, by name. Each is read once, in the order of
            ``shapes``, let go of before the next, and overwritten. One that is missing counts as zeros.
        shapes: of each layer, the same on all ranks.
        options: of each layer.
        key: the same on all ranks; what is drawn depends on the layer's name and not on who simulates it.
        exchange: the ranks.
        kind: as in `layer_errors`.
    """
    counts = [len(options[name]) for name in shapes]
    efforts = [_effort(math.prod(shape), options[name]) for name, shape in shapes.items()]
    owner = share_layers(efforts, exchange.ranks)
    table = torch.zeros(sum(counts) + len(counts), dtype=torch.float64)
    *rows, norms = table.split([*counts, len(counts)])
    sent = table.nbytes
    for number, (name, shape) in enumerate(shapes.items()):
        gradient = gradients[name].contiguous() if name in gradients else torch.zeros(tuple(shape))
        exchange.all_reduce(gradient)
        sent += gradient.nbytes
        if owner[number] == exchange.rank:
            gradient.div_(exchange.ranks)
            norms[number] = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            errors = layer_errors(gradient, options[name], key.fold(name), kind)
            rows[number].copy_(torch.where(norms[number] > 0, errors.cpu(), torch.nan))
        del gradient
    exchange.all_reduce(table)
    return ErrorTable(rows, norms, -(-2 * (exchange.ranks - 1) * sent // exchange.ranks))


def share_layers(efforts: Sequence[float], ranks: int) -> list[int]:
    """The rank that simulates each layer: the largest layer first, always to the rank with the least work.

    Args:
        efforts: relative work of each layer, >= 0.
        ranks: number of ranks, >= 1.

    Returns:
        A rank for each layer; no rank has more than 4/3 of the least possible (Graham, 1969).
    """
    loads, owner = [0.0] * ranks, [0] * len(efforts)
    for number in sorted(range(len(efforts)), key=lambda number: (-efforts[number], number)):
        owner[number] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owner[number]] += efforts[number]
    return owner


def _effort(elements: int, options: Sequence[Option]) -> float:
    """Passes over the gradient, roughly, times its elements."""
    ranks = [option.setting for option in options if option.compressor == "powersgd"]
    passes = sum(1 for option in options if option.compressor == "qsgd") * 2.0
    passes += 8.0 if any(option.compressor == "topk" for option in options) else 0.0
    passes += (2 * POWER_STEPS * max(ranks) / 16) if ranks else 0.0
    return elements * (1.0 + passes)


def _low_rank(gradient: Tensor, ranks: Sequence[float], key: Key) -> Tensor:
    """Norms of what the best matrices of these ranks leave out, in the subspace of a power iteration."""
    power = PowerSGD(int(max(ranks)) + _OVERSAMPLING, POWER_STEPS)
    q = power.first_q(gradient.shape, key, device=gradient.device)
    # The columns of p are orthonormal, so the singular values of p^T m are those of q = m^T p.
    q = power.compress(gradient, q).q.to(torch.float64)
    squares = torch.linalg.eigvalsh(q.T @ q).flip(0).clamp_(min=0)
    total = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    kept = squares.cumsum(0)[[int(rank) - 1 for rank in ranks]]
    return (total - kept).clamp_(min=0).sqrt()


def _largest(gradient: Tensor, densities: Sequence[float], key: Key) -> Tensor:
    """Norms of what the largest entries leave out."""
    counts = [TopK(density).kept(gradient.shape) for density in densities]
    most = torch.topk(gradient.reshape(-1).abs(), max(counts)).values.to(torch.float64).square()
    rest = torch.linalg.vector_norm(gradient, dtype=torch.float64).square() - most.sum()
    rest = rest.clamp(min=0) if len(most) < gradient.numel() else torch.zeros_like(rest)
    # Summed from the smallest on, so that no differences are taken.
    left = torch.cat((rest.view(1), most.flip(0))).cumsum(0).flip(0)
    return left[counts].sqrt()


def _quantised(gradient: Tensor, bits: Sequence[float], key: Key) -> Tensor:
    """Norms of the quantisation error, with the rounding drawn by key."""
    found = []
    for number in bits:
        compressor = QSGD(int(number))
        payload = compressor.compress(gradient, key.fold(int(number)))
        found.append(compression_error(gradient, compressor.decompress(payload, gradient.shape)))
    return torch.stack(found)


def option_sizes(
    options: Sequence[Option], shape: Sequence[int], dtype: torch.dtype = torch.float32, *, ranks: int = 2
) -> list[int]:
    """Bytes of every option of a layer; arguments as in `ds_efficient.lgreco.options.wire_bytes`."""
    return [wire_bytes(option, shape, dtype, ranks=ranks) for option in options]
