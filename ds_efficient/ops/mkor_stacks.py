"""Stacks of equal tensors: a view where they lie at equal distances in memory, so that nothing is copied.

ZeRO keeps the gradients of a rank in flat buffers, in the model's order, and an exchange brings them
in one: the gradients of one linear layer in all transformer layers are then one tensor with a first dimension
for these. So are the operands of factors of one size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def in_place(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view of equal tensors with a first dimension for them; None where there is none.

    Args:
        tensors: at least one, of one shape, type and device.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    if type(first) is not Tensor:  # a fake one lies nowhere
        return None
    size, number = first.element_size(), first.numel()
    places = [tensor.data_ptr() for tensor in tensors]
    step = places[1] - places[0]
    if step < number * size or step % size or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    if any(after - before != step for before, after in itertools.pairwise(places)):
        return None
    last = first.storage_offset() + step // size * (len(tensors) - 1) + number
    if last * size > first.untyped_storage().nbytes():  # memory of several owners
        return None
    return first.as_strided((len(tensors), *first.shape), (step // size, *first.stride()))


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Equal tensors as one with a first dimension for them, a view where that is possible."""
    view = in_place(tensors)
    return torch.stack(list(tensors)) if view is None else view


def stacked(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """`stack` in a type; None for None."""
    present = [tensor for tensor in tensors if tensor is not None]
    return stack(present).to(dtype) if present else None
