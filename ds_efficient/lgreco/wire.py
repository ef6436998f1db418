"""Averaging a set of gradients over the ranks: one collective sequence for each way of compression.

Each function is a generator that yields what it waits for (`ds_efficient.lgreco.transport.Handle`) whenever
it has started a collective, and leaves the mean in the gradients. Several run side by side, so that one
compresses while another one communicates. All ranks decode the same bytes, or the result of one all-reduce,
in the same order of ranks, so that they end with the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.lgreco.compressors import QSGD, TopK
from ds_efficient.lgreco.feedback import ErrorFeedback
from ds_efficient.lgreco.powersgd import orthonormal_
from ds_efficient.lgreco.transport import Handle, Transport
from ds_efficient.ops.lgreco_low_rank import project_back, rebuild
from ds_efficient.ops.lgreco_quantize import filled_up, whole_buckets

Waits = Iterator[Handle]
_KEPT_ELEMENTS = 1 << 23  # of scratch memory; single gradients above it are rare
_GATHERED_RANKS = 2
"""Up to so many ranks quantised gradients are gathered; with more they are reduced by parts."""


@dataclass
class Item:
    """One gradient.

    Attributes:
        name: of the parameter.
        gradient: this rank's, replaced by the mean.
        compressor: the layer's.
    """

    name: str
    gradient: Tensor
    compressor: object


class Scratch:
    """Memory that is used again, on the CPU: fresh pages cost more than what is written to them.

    Each name is used by one at a time. A GPU's allocator does the same by itself.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(count,), contents undefined; valid until the same name and dtype are asked for again."""
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < count:
            kept = torch.empty(count, dtype=dtype, device=device)
            if device.type == "cpu" and count <= _KEPT_ELEMENTS:
                self._kept[name, dtype] = kept
        return kept[:count]


@dataclass
class Shared:
    """What the ways of compression have in common in one call.

    Attributes:
        transport: the ranks.
        feedback: errors of this rank.
        key: of this call; each way folds in what it needs.
        scale: of the gradients (fp16); errors are kept without it.
        healthy: names of error-fed gradients, and whether their mean is finite, the same on every rank.
        scratch: memory for what lives between two waits.
    """

    transport: Transport
    feedback: ErrorFeedback
    key: Key
    scale: float
    healthy: list[tuple[list[str], Tensor]]
    scratch: Scratch


def raw(shared: Shared, items: Sequence[Item]) -> Waits:
    """All-reduce in the gradients' own dtype, which is one and the same."""
    flat = torch.cat([item.gradient.reshape(-1) for item in items])
    yield shared.transport.start_all_reduce(flat)
    flat /= shared.transport.ranks
    _spread(flat, items, [item.gradient.numel() for item in items])


def quantised(shared: Shared, items: Sequence[Item], compressor: QSGD) -> Waits:
    """Quantise all gradients, which have one dtype, in one call; unbiased, without error feedback.

    Each gradient is filled up to whole quantisation buckets by its last element, which changes no scale. Two
    ranks exchange their payloads. More of them reduce by parts: each rank gets all ranks' codes of its part,
    averages, quantises the mean again, and gathers. That sends 2 (n-1)/n payloads instead of n - 1.
    """
    transport, bucket = shared.transport, compressor.bucket
    gradients = [item.gradient for item in items]
    key = shared.key.fold("qsgd", compressor.bits, transport.rank)
    payload = compressor.compress_parts(gradients, key)
    if transport.ranks <= _GATHERED_RANKS:
        everyone, handle = transport.start_all_gather(payload)
        yield handle
        compressor.decompress_parts_(everyone, gradients, weight=1 / transport.ranks)
    else:
        lengths = [whole_buckets(gradient.numel(), bucket) for gradient in gradients]
        mean = yield from _reduced_by_parts(shared, compressor, payload, sum(lengths))
        _spread(mean, items, lengths)


def _reduced_by_parts(
    shared: Shared, compressor: QSGD, payload: Tensor, count: int
) -> Generator[Handle, None, Tensor]:
    transport, blocks = shared.transport, count // compressor.bucket
    ends = [(rank + 1) * blocks // transport.ranks for rank in range(transport.ranks)]
    starts = [0, *ends[:-1]]
    own = ends[transport.rank] - starts[transport.rank]
    parts = [_part(payload, compressor, blocks, a, b) for a, b in zip(starts, ends, strict=True)]
    size = parts[transport.rank].numel()
    received, handle = transport.start_all_to_all(
        torch.cat(parts), [part.numel() for part in parts], [size] * transport.ranks
    )
    yield handle
    part = torch.empty(own * compressor.bucket, dtype=torch.float32, device=payload.device)
    rows = received.view(transport.ranks, size)
    compressor.decompress(rows, part.shape, out=part, weight=1 / transport.ranks)
    again = compressor.compress(part, shared.key.fold("qsgd again", compressor.bits, transport.rank))
    most = max(one.numel() for one in parts)
    everyone, handle = transport.start_all_gather(torch.nn.functional.pad(again, (0, most - size)))
    yield handle
    mean = shared.scratch("mean", count, torch.float32, payload.device)
    for rank, (a, b) in enumerate(zip(starts, ends, strict=True)):
        target = mean[a * compressor.bucket : b * compressor.bucket]
        compressor.decompress(everyone[rank, : parts[rank].numel()], target.shape, out=target)
    return mean


def quantised_slices(
    shared: Shared, items: Sequence[Item], compressor: QSGD, slices: dict[str, Tensor]
) -> Waits:
    """Quantise the gradients and give each rank the mean of its slices only, as ZeRO 3 cuts them.

    Args:
        shared: of the call.
        items: of one dtype; they stay as they are.
        compressor: of all of them.
        slices: takes this rank's slice of each mean by name, flat, in the gradients' dtype.
    """
    transport, bucket = shared.transport, compressor.bucket
    parts: list[Tensor] = []
    blocks = []  # for each rank
    for rank in range(transport.ranks):
        before = sum(part.numel() for part in parts)
        for item in items:
            flat = item.gradient.reshape(-1)
            start, end = slice_of(flat.numel(), rank, transport.ranks)
            parts += filled_up(flat[start:end], bucket)
        blocks.append((sum(part.numel() for part in parts) - before) // bucket)
    flat = torch.cat(parts)
    payload = compressor.compress(flat, shared.key.fold("qsgd slices", compressor.bits, transport.rank))
    cuts = [sum(blocks[:rank]) for rank in range(transport.ranks + 1)]
    cut = [_part(payload, compressor, cuts[-1], a, b) for a, b in itertools.pairwise(cuts)]
    size = cut[transport.rank].numel()
    received, handle = transport.start_all_to_all(
        torch.cat(cut), [one.numel() for one in cut], [size] * transport.ranks
    )
    yield handle
    mean = torch.empty(blocks[transport.rank] * bucket, dtype=torch.float32, device=flat.device)
    rows = received.view(transport.ranks, size)
    compressor.decompress(rows, mean.shape, out=mean, weight=1 / transport.ranks)
    offset = 0
    for item in items:
        start, end = slice_of(item.gradient.numel(), transport.rank, transport.ranks)
        slices[item.name] = mean[offset : offset + end - start].to(item.gradient.dtype)
        offset += -(-(end - start) // bucket) * bucket


def slice_of(elements: int, rank: int, ranks: int) -> tuple[int, int]:
    """The part of a flat tensor that ZeRO 3 keeps on a rank: ceil(elements / ranks), fewer at the end."""
    each = -(-elements // ranks)
    start = min(elements, rank * each)
    return start, min(elements, start + each)


def largest(shared: Shared, items: Sequence[Item]) -> Waits:
    """Gather the largest entries of each rank's gradient and fed-back error, in the gradients' one dtype."""
    transport = shared.transport
    sent = items[0].gradient.dtype
    payloads = [_largest_of(shared, item, _of(item, TopK)) for item in items]
    everyone, handle = transport.start_all_gather(torch.cat(payloads))
    yield handle
    pieces = everyone.split([payload.numel() for payload in payloads], dim=1)
    finite = []
    for item, rows in zip(items, pieces, strict=True):
        gradient, compressor, weight = item.gradient, _of(item, TopK), 1 / transport.ranks
        direct = gradient.dtype == torch.float32 and gradient.is_contiguous()
        mean = compressor.decompress(
            rows, gradient.shape, out=gradient if direct else None, weight=weight, sent=sent
        )
        if not direct:
            gradient.copy_(mean)
        finite.append(torch.isfinite(compressor.values(rows, gradient.shape, sent)).all())
    shared.healthy.append(([item.name for item in items], torch.stack(finite).all()))


def _largest_of(shared: Shared, item: Item, compressor: TopK) -> Tensor:
    """The payload, in the gradient's scale and dtype; what is lost by the shorter type is fed back too."""
    feedback, gradient, scale = shared.feedback, item.gradient, shared.scale
    if gradient.dtype == torch.float32 and scale == 1:
        return feedback.compress(item.name, gradient, compressor)
    corrected = feedback.corrected(item.name, gradient, unscale=1 / scale)
    payload = compressor.compress((corrected * scale).to(gradient.dtype))
    sent = compressor.decompress(payload, gradient.shape, weight=1 / scale, sent=gradient.dtype)
    feedback.record(item.name, corrected, sent)
    return payload


def low_rank(
    shared: Shared,
    items: Sequence[Item],
    q_of: Callable[[Item], Tensor],
    keep_q: Callable[[str, Tensor], None],
) -> Waits:
    """All-reduce the factors of each gradient and fed-back error; one power step.

    Args:
        shared: of the call.
        items: gradients of at least two dimensions.
        q_of: the factor to start from, the same on all ranks.
        keep_q: takes the new factor, the start of the next call.
    """
    transport, feedback = shared.transport, shared.feedback
    starts = [q_of(item).T.contiguous() for item in items]  # (r, m), for speed
    like = starts[0]
    left, ps = _stacked(
        [(item.gradient.shape[0], len(q)) for item, q in zip(items, starts, strict=True)], like
    )
    corrected = [
        feedback.projected(item.name, item.gradient, q, p, unscale=1 / shared.scale)
        for item, q, p in zip(items, starts, ps, strict=True)
    ]
    yield transport.start_all_reduce(left)
    orthonormal_(ps)
    right, rows = _stacked([(q.shape[0], q.shape[1]) for q in starts], like)
    for matrix, p, q in zip(corrected, ps, rows, strict=True):
        project_back(matrix, p, q)
    yield transport.start_all_reduce(right)
    right /= transport.ranks

    def scratch(count: int) -> Tensor:
        return shared.scratch("mean", count, torch.float32, like.device)

    for item, error, p, q in zip(items, corrected, ps, rows, strict=True):
        rebuild(item.gradient, error, p, q, scale=shared.scale, scratch=scratch)
        feedback.keep(item.name, error)
        keep_q(item.name, q.T)
    shared.healthy.append(([item.name for item in items], torch.isfinite(right).all()))


def _stacked(shapes: Sequence[tuple[int, int]], like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One vector, and matrices that are its pieces."""
    flat = torch.empty(sum(rows * columns for rows, columns in shapes), dtype=like.dtype, device=like.device)
    pieces = flat.split([rows * columns for rows, columns in shapes])
    return flat, [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _part(payload: Tensor, compressor: QSGD, blocks: int, start: int, end: int) -> Tensor:
    """The payload of some of the blocks: their scales, then their codes."""
    each = compressor.bucket * compressor.bits // 8
    scales = compressor.nbytes((blocks * compressor.bucket,)) - blocks * each
    scale = scales // blocks
    return torch.cat(
        [payload[start * scale : end * scale], payload[scales + start * each : scales + end * each]]
    )


def _spread(flat: Tensor, items: Sequence[Item], lengths: Sequence[int]) -> None:
    for item, piece in zip(items, flat.split(list(lengths)), strict=True):
        gradient = item.gradient
        gradient.copy_(piece[: gradient.numel()].view(gradient.shape))


def _of(item: Item, kind: type[TopK]) -> TopK:
    assert isinstance(item.compressor, kind), item.name
    return item.compressor
