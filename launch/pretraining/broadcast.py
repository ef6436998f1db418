"""Batches from the rank that read them to the ranks that need the same, in one collective."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
import torch.distributed as dist

_ALIGNMENT = 8  # bytes; the largest dtype here is int64

BatchSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]


def batch_specs(micro_batch_size: int, seq_length: int, *, attention_mask: bool = False) -> BatchSpecs:
    """Return shape and dtype of every tensor of a batch; the mask only where it is asked for."""
    shape = (micro_batch_size, seq_length)
    specs: BatchSpecs = {
        "tokens": (shape, torch.int64),
        "labels": (shape, torch.int64),
        "loss_mask": (shape, torch.float32),
        "position_ids": (shape, torch.int64),
    }
    if attention_mask:
        specs["attention_mask"] = ((micro_batch_size, 1, seq_length, seq_length), torch.bool)
    return specs


def broadcast_batch(
    batch: Mapping[str, torch.Tensor] | None,
    group: dist.ProcessGroup | None,
    src: int,
    specs: BatchSpecs,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Give every rank of ``group`` the batch of rank ``src``.

    All tensors travel as one buffer of bytes: one copy to the device and one collective, whatever the dtypes.

    Args:
        batch: tensors as in ``specs`` on rank ``src`` (others in it are left out), None elsewhere.
        group: ranks that need this batch; None stays in this process, without a collective.
        src: global rank that has it.
        specs: name -> (shape, dtype), equal on all ranks; see ``batch_specs``.
        device: where the result goes; NCCL groups need a GPU.

    Raises:
        ValueError: the batch is missing where it is needed, or is not as ``specs`` say.
    """
    alone = group is None or dist.get_world_size(group) == 1
    sender = alone or dist.get_rank() == src
    offsets, total = _layout(specs)
    if sender:
        buffer = _pack(batch, specs, offsets, total, device)
    else:
        buffer = torch.empty(total, dtype=torch.uint8, device=device)
    if not alone:
        dist.broadcast(buffer, src=src, group=group)
    result = {}
    for name, (shape, dtype) in specs.items():
        begin = offsets[name]
        size = prod(shape) * dtype.itemsize
        result[name] = buffer[begin : begin + size].view(dtype).view(shape)
    return result


def _layout(specs: BatchSpecs) -> tuple[dict[str, int], int]:
    offsets, end = {}, 0
    for name, (shape, dtype) in specs.items():
        offsets[name] = end
        size = prod(shape) * dtype.itemsize
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _pack(
    batch: Mapping[str, torch.Tensor] | None,
    specs: BatchSpecs,
    offsets: dict[str, int],
    total: int,
    device: torch.device,
) -> torch.Tensor:
    if batch is None:
        raise ValueError("the sending rank has no batch")
    pinned = device.type == "cuda"
    buffer = torch.zeros(total, dtype=torch.uint8, pin_memory=pinned)
    for name, (shape, dtype) in specs.items():
        tensor = batch.get(name)
        if tensor is None or tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            found = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"batch[{name!r}]: expected {tuple(shape)} {dtype}, found {found}")
        begin = offsets[name]
        buffer[begin : begin + tensor.numel() * dtype.itemsize].view(dtype).copy_(tensor.reshape(-1))
    return buffer.to(device, non_blocking=pinned)
