"""Token dropping in plain torch: the readable definition, bit-identical to the C++ and CUDA code.

``x`` is (batch, length, ...) where ``batch_first``, else (length, batch, ...); ``index`` is (batch, keep).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_efficient.ops import keyed_random_reference

VERSION = 1


def sample(keys: Sequence[int], length: int, keep: int, batch: int, device: torch.device) -> Tensor:
    """Sorted choices of ``keep`` of ``length``: (layers, batch, keep) int64, one key a layer."""
    out = torch.empty(len(keys), batch, keep, dtype=torch.int64, device=device)
    for layer, key in zip(out, keys, strict=True):
        layer.copy_(keyed_random_reference.choice(key, 0, batch, length, keep, device))
    return out


def gather(x: Tensor, index: Tensor, batch_first: bool) -> Tensor:
    """The rows of ``x`` at ``index``."""
    return x[_positions(index, batch_first)].contiguous()


def put(x: Tensor, part: Tensor, index: Tensor, batch_first: bool) -> None:
    """Write ``part`` over the rows of ``x`` at ``index``."""
    x[_positions(index, batch_first)] = part


def scatter(x: Tensor, part: Tensor, index: Tensor, batch_first: bool) -> Tensor:
    """``x`` with the rows at ``index`` replaced by ``part``, in new memory."""
    out = x.clone(memory_format=torch.contiguous_format)
    put(out, part, index, batch_first)
    return out


def spread(part: Tensor, index: Tensor, length: int, batch_first: bool) -> Tensor:
    """Zeros with ``part`` at ``index``."""
    out = part.new_zeros(with_positions(part, length, batch_first))
    put(out, part, index, batch_first)
    return out


def erase(x: Tensor, index: Tensor, batch_first: bool) -> Tensor:
    """``x`` with zeros at ``index``, in new memory."""
    out = x.clone(memory_format=torch.contiguous_format)
    out[_positions(index, batch_first)] = 0
    return out


def split(x: Tensor, index: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """`erase` and `gather`."""
    return erase(x, index, batch_first), gather(x, index, batch_first)


def with_positions(x: Tensor, length: int, batch_first: bool) -> list[int]:
    """The shape of ``x`` with ``length`` positions."""
    shape = list(x.shape)
    shape[1 if batch_first else 0] = length
    return shape


def _positions(index: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    sample = torch.arange(index.shape[0], device=index.device)
    return (sample[:, None], index) if batch_first else (index.T, sample[None, :])
