"""Collectives of the data-parallel group, with a count of the bytes that a rank sends.

One interface for torch.distributed (NCCL, gloo), for MPI (`ds_efficient.lgreco.mpi`) and for ranks
simulated in one process (`ds_efficient.lgreco.simulated`). A collective is started and waited for, so that it
runs beside the compression of the next tensors. Bytes are counted where a collective is started, as if it
were a ring: an all-reduce of B bytes sends 2 (n-1)/n B a rank, an all-gather of payloads of B bytes (n-1) B,
an all-to-all what goes to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ds_efficient.errors import UserError

# Newer versions of torch have another name for it, and warn of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when the result may be read, by the current stream where it is on a GPU."""


@dataclass
class Tally:
    """Bytes that this rank has sent.

    Attributes:
        gradients: by the collectives that were started for gradients.
        control: by everything else (error tables, plans).
    """

    gradients: float = 0.0
    control: float = 0.0

    def all_reduced(self, size: int, ranks: int) -> None:
        """Count an all-reduce of ``size`` bytes."""
        self.gradients += 2 * (ranks - 1) / ranks * size


class Transport(Protocol):
    """What the reducer needs of a group of ranks."""

    name: str
    rank: int
    ranks: int
    sent: Tally

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place, bytes counted as ``control``; any device."""

    def start_all_reduce(self, tensor: Tensor) -> Handle:
        """Sum a contiguous tensor in place."""

    def start_all_gather(self, payload: Tensor) -> tuple[Tensor, Handle]:
        """(ranks, bytes) uint8: the payloads of all ranks, which are as long as this one."""

    def start_all_to_all(
        self, payload: Tensor, sizes: Sequence[int], received: Sequence[int]
    ) -> tuple[Tensor, Handle]:
        """Bytes for this rank, one after the other.

        Args:
            payload: flat uint8, what goes to rank 0 first.
            sizes: bytes for each rank.
            received: bytes from each rank.
        """


class Done:
    """A handle of what is finished."""

    def wait(self) -> None:
        """Nothing to wait for."""


class TorchTransport:
    """torch.distributed.

    Args:
        group: process group, or None for all ranks.

    Raises:
        UserError: torch.distributed is not initialised.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_initialized():
            raise UserError(
                "lgreco: torch.distributed is not initialised; start it before (init_process_group of "
                "torch.distributed, or deepspeed.init_distributed)"
            )
        self._group = group
        self.name = str(dist.get_backend(group))
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sent = Tally()

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place; a tensor that is not where the backend works goes there and back."""
        self.sent.control += 2 * (self.ranks - 1) / self.ranks * tensor.nbytes
        if self.name == "nccl" and not tensor.is_cuda:
            moved = tensor.cuda()
            dist.all_reduce(moved, group=self._group)
            tensor.copy_(moved)
        elif self.name == "gloo" and tensor.is_cuda:
            moved = tensor.cpu()
            dist.all_reduce(moved, group=self._group)
            tensor.copy_(moved)
        else:
            dist.all_reduce(tensor, group=self._group)

    def start_all_reduce(self, tensor: Tensor) -> Handle:
        """Sum in place."""
        self.sent.all_reduced(tensor.nbytes, self.ranks)
        return _started(dist.all_reduce(tensor, group=self._group, async_op=True))

    def start_all_gather(self, payload: Tensor) -> tuple[Tensor, Handle]:
        """Payloads of all ranks."""
        self.sent.gradients += (self.ranks - 1) * payload.nbytes
        out = payload.new_empty(self.ranks * payload.numel())
        work = _all_gather(out, payload, group=self._group, async_op=True)
        return out.view(self.ranks, -1), _started(work)

    def start_all_to_all(
        self, payload: Tensor, sizes: Sequence[int], received: Sequence[int]
    ) -> tuple[Tensor, Handle]:
        """Bytes for this rank."""
        self.sent.gradients += sum(sizes) - sizes[self.rank]
        out = payload.new_empty(sum(received))
        work = dist.all_to_all_single(
            out, payload, list(received), list(sizes), group=self._group, async_op=True
        )
        return out, _started(work)


class _FromHost:
    """A collective on host memory whose result goes back to the device."""

    def __init__(self, handle: Handle, host: Tensor, device: Tensor) -> None:
        self._handle, self._host, self._device = handle, host, device

    def wait(self) -> None:
        self._handle.wait()
        self._device.copy_(self._host)


class HostStaging:
    """A transport that works on host memory, for tensors of a GPU.

    Args:
        inner: the transport.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.name, self.rank, self.ranks, self.sent = inner.name, inner.rank, inner.ranks, inner.sent

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place."""
        host = tensor.cpu()
        self._inner.all_reduce(host)
        tensor.copy_(host)

    def start_all_reduce(self, tensor: Tensor) -> Handle:
        """Sum in place."""
        host = tensor.cpu()
        return _FromHost(self._inner.start_all_reduce(host), host, tensor)

    def start_all_gather(self, payload: Tensor) -> tuple[Tensor, Handle]:
        """Payloads of all ranks."""
        host, handle = self._inner.start_all_gather(payload.cpu())
        out = torch.empty_like(host, device=payload.device)
        return out, _FromHost(handle, host, out)

    def start_all_to_all(
        self, payload: Tensor, sizes: Sequence[int], received: Sequence[int]
    ) -> tuple[Tensor, Handle]:
        """Bytes for this rank."""
        host, handle = self._inner.start_all_to_all(payload.cpu(), sizes, received)
        out = torch.empty_like(host, device=payload.device)
        return out, _FromHost(handle, host, out)


def _started(work: Any) -> Handle:
    """torch returns None for a collective that is finished."""
    return Done() if work is None else work


def make_transport(backend: str, group: Any, device: torch.device) -> Transport:
    """The transport of the section's ``backend``.

    Args:
        backend: "auto", "nccl", "gloo" or "mpi".
        group: the data-parallel group.
        device: of the gradients.

    Raises:
        UserError: the backend does not work with the group or on the device; names it.
    """
    if backend == "mpi":
        from ds_efficient.lgreco.mpi import MpiTransport

        inner = MpiTransport(dist.get_process_group_ranks(group) if dist.is_initialized() else None)
        return HostStaging(inner) if device.type == "cuda" else inner
    own = str(dist.get_backend(group))
    if backend in ("auto", own):
        found = TorchTransport(group)
        return HostStaging(found) if own == "gloo" and device.type == "cuda" else found
    if backend == "nccl":
        raise UserError(
            f'lgreco.backend "nccl": the data-parallel group uses {own} on {device.type}; NCCL needs GPUs '
            'and a group of its own kind (init_distributed with "nccl"). Use "auto"'
        )
    ranks = dist.get_process_group_ranks(group)
    beside = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    found = TorchTransport(beside)
    return HostStaging(found) if device.type == "cuda" else found
