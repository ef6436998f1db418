"""What ranks can only find out together: clocks, shared folders, and the all-reduce."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

_ROUNDS = 10
_SEEN_WITHIN = 5.0  # seconds; network file systems show new files late
_PERIOD = 7  # of the pattern that is reduced


@dataclass(frozen=True)
class Clock:
    """Offset of a host's clock against rank 0's, in seconds, with the bound of its error."""

    offset: float
    error: float


def clock_offset(peer: int, clock: Callable[[], float] = time.time) -> Clock | None:
    """Measure the clock of rank `peer` against rank 0's; call on both.

    Rank 0 notes its time, asks, and notes its time again. The peer's answer was written in between, so the
    offset is known to half of the shortest round trip (Cristian's algorithm).

    Returns:
        The result on rank 0, None on the peer.
    """
    box = torch.zeros(1, dtype=torch.float64)
    if dist.get_rank() != 0:
        for _ in range(_ROUNDS):
            dist.recv(box, src=0)
            box[0] = clock()
            dist.send(box, dst=0)
        return None
    best = Clock(0.0, float("inf"))
    for _ in range(_ROUNDS):
        begin = clock()
        dist.send(box, dst=peer)
        dist.recv(box, src=peer)
        end = clock()
        if (end - begin) / 2 < best.error:
            best = Clock(float(box[0]) - (begin + end) / 2, (end - begin) / 2)
    return best


@dataclass(frozen=True)
class Folder:
    """A folder as one host sees it.

    Attributes:
        path: of the folder.
        shared: whether a file that rank 0 made shows here; True on rank 0 itself.
        filesystem: type of the file system, for example ``"nfs4"``.
        problem: why it cannot be used, or empty.
    """

    path: str
    shared: bool
    filesystem: str
    problem: str = ""


def filesystem_of(path: Path) -> str:
    """Return the type of the file system that holds `path` (or will hold it), or ``"unknown"``."""
    best, kind = "", "unknown"
    real = os.path.realpath(path)
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return kind
    for line in mounts:
        fields = line.split()
        where = fields[1].encode().decode("unicode_escape")
        inside = real == where or real.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best):
            best, kind = where, fields[2]
    return kind


def look_at_folder(path: Path, leader: bool, broadcast: Callable[[str], str]) -> Folder:
    """Find out whether `path` is one folder for all hosts; call on every rank.

    Args:
        path: as this rank names it.
        leader: whether this rank is its host's first, which looks; the others wait.
        broadcast: gives every rank rank 0's text.
    """
    first = dist.get_rank() == 0
    problem = _writable(path) if leader else ""
    nonce = broadcast(f".check_cluster-{uuid.uuid4().hex}" if first else "")
    file = path / nonce
    if first and not problem:
        file.write_text(nonce)
    dist.barrier()
    seen = first or (leader and _appears(file, nonce))
    dist.barrier()
    if first:
        file.unlink(missing_ok=True)
    return Folder(str(path), seen, filesystem_of(path), problem)


def _writable(path: Path) -> str:
    probe = path / f".check_cluster-{os.getpid()}-{uuid.uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror or error}"
    return ""


def _appears(file: Path, content: str) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN
    while True:
        try:
            if file.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline or not file.parent.is_dir():
            return False
        os.listdir(file.parent)  # makes NFS ask the server anew
        time.sleep(0.1)


@dataclass(frozen=True)
class Reduction:
    """One size of the all-reduce.

    Attributes:
        nbytes: size of each rank's tensor (fp32).
        seconds: of one all-reduce, on the slowest rank.
        correct: whether every rank got the right sum.
        algorithm_gbps: nbytes / seconds, in GB/s.
        bus_gbps: times 2 (n - 1) / n: the traffic of each rank's link, comparable between world sizes.
    """

    nbytes: int
    seconds: float
    correct: bool
    algorithm_gbps: float
    bus_gbps: float


def reduction_sizes(largest: int) -> list[int]:
    """Return the sizes in bytes that are measured: 4 KiB times powers of 16, and `largest`."""
    sizes = [4096 * 16**power for power in range(8)]
    return [*(size for size in sizes if size < largest), largest]


def all_reduce(
    sizes: Sequence[int], device: torch.device, reduce: Callable[[torch.Tensor], object] | None = None
) -> list[Reduction]:
    """Sum known numbers over all ranks, compare with the exact result, and time it.

    Args:
        sizes: bytes.
        device: where the tensors are; NCCL needs a GPU.
        reduce: the all-reduce under test; torch.distributed's without.
    """
    reduce = reduce or dist.all_reduce
    world = dist.get_world_size()
    results = []
    for nbytes in sizes:
        pattern = torch.arange(nbytes // 4, device=device).remainder_(_PERIOD).float()
        own = pattern * (dist.get_rank() + 1)
        tensor = own.clone()
        reduce(tensor)
        # Small integers: exact in fp32 up to thousands of ranks, in any order of the sum.
        correct = torch.equal(tensor, pattern * (world * (world + 1) // 2))
        seconds = _seconds(tensor, reduce, rounds=20 if nbytes <= 1 << 20 else 5)
        agreed = torch.tensor([seconds, float(not correct)], dtype=torch.float64, device=device)
        # Not the function under test: what it gets wrong would hide here. MAX has no sum to get wrong.
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        seconds = float(agreed[0])
        speed = nbytes / seconds / 1e9
        results.append(Reduction(nbytes, seconds, not agreed[1], speed, speed * 2 * (world - 1) / world))
    return results


def _seconds(tensor: torch.Tensor, reduce: Callable[[torch.Tensor], object], rounds: int) -> float:
    def wait() -> None:
        if tensor.is_cuda:
            torch.cuda.synchronize()

    tensor.zero_()
    reduce(tensor)
    wait()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(rounds):
        reduce(tensor)
    wait()
    return (time.perf_counter() - begin) / rounds
