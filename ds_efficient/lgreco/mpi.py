"""The collectives over MPI, through mpi4py (``pip install mpi4py``; processes started by ``mpirun``).

On host memory; `ds_efficient.lgreco.transport.HostStaging` brings the tensors of a GPU there. MPI has no
bfloat16 and no float16: these are summed in float32, so that their bytes double.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.lgreco.transport import Handle, Tally

_DIRECT = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)


def import_mpi() -> Any:
    """Return mpi4py's module MPI.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py raises RuntimeError where it finds no libmpi
        raise UserError(
            f'lgreco.backend "mpi": mpi4py cannot be imported ({error}); install Open MPI or MPICH and '
            'mpi4py (pip install mpi4py), or use "auto"'
        ) from error
    return MPI


class MpiTransport:
    """MPI.

    Args:
        ranks: of the data-parallel group, as torch.distributed numbers them, in the group's order; None for
            all processes in MPI's order.

    Raises:
        UserError: mpi4py is missing, or MPI does not know these ranks.
    """

    name = "mpi"

    def __init__(self, ranks: Sequence[int] | None = None) -> None:
        self._mpi = import_mpi()
        world = self._mpi.COMM_WORLD
        if ranks is None:
            self._comm = world.Dup()
        else:
            own = dist.get_rank() if dist.is_initialized() else world.Get_rank()
            places = {known: place for place, known in enumerate(world.allgather(own))}
            if any(rank not in places for rank in ranks):
                raise UserError(
                    f'lgreco.backend "mpi": MPI has {world.Get_size()} processes, which are ranks '
                    f"{sorted(places)}, and the data-parallel group is {list(ranks)}; start all processes by "
                    'one mpirun (launch/mpi/pretrain.sh), or use "auto"'
                )
            group = world.Get_group().Incl([places[rank] for rank in ranks])
            self._comm = world.Create_group(group)
        self.rank, self.ranks = self._comm.Get_rank(), self._comm.Get_size()
        self.sent = Tally()

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place."""
        self.sent.control += 2 * (self.ranks - 1) / self.ranks * tensor.nbytes
        host = tensor.cpu().contiguous()
        self._start(host).wait()
        if host is not tensor:
            tensor.copy_(host)

    def start_all_reduce(self, tensor: Tensor) -> Handle:
        """Sum in place."""
        if tensor.dtype in _DIRECT:
            self.sent.all_reduced(tensor.nbytes, self.ranks)
            return self._start(tensor)
        wide = tensor.to(torch.float32)
        self.sent.all_reduced(wide.nbytes, self.ranks)
        return _Narrowing(self._start(wide), wide, tensor)

    def _start(self, tensor: Tensor) -> _Request:
        values = tensor.numpy()
        return _Request(self._comm.Iallreduce(self._mpi.IN_PLACE, values, op=self._mpi.SUM), values)

    def start_all_gather(self, payload: Tensor) -> tuple[Tensor, Handle]:
        """Payloads of all ranks."""
        self.sent.gradients += (self.ranks - 1) * payload.nbytes
        payload = payload.contiguous()
        out = payload.new_empty(self.ranks, payload.numel())
        source, target = payload.numpy(), out.numpy()
        return out, _Request(self._comm.Iallgather(source, target), source, target)

    def start_all_to_all(
        self, payload: Tensor, sizes: Sequence[int], received: Sequence[int]
    ) -> tuple[Tensor, Handle]:
        """Bytes for this rank."""
        self.sent.gradients += sum(sizes) - sizes[self.rank]
        out = payload.new_empty(sum(received))
        source, target = payload.contiguous().numpy(), out.numpy()
        request = self._comm.Ialltoallv([source, list(sizes)], [target, list(received)])
        return out, _Request(request, source, target)


class _Request:
    """MPI's request, and the memory that it works on."""

    def __init__(self, request: Any, *memory: Any) -> None:
        self._request, self._memory = request, memory

    def wait(self) -> None:
        self._request.Wait()


class _Narrowing:
    """A sum in float32 that goes back into a shorter type."""

    def __init__(self, handle: Handle, wide: Tensor, target: Tensor) -> None:
        self._handle, self._wide, self._target = handle, wide, target

    def wait(self) -> None:
        self._handle.wait()
        self._target.copy_(self._wide)
