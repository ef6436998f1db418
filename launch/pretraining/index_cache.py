"""megatron-core's index cache: built once, whole or absent, and given to the nodes that do not see it.

megatron-core builds its sample indices on global rank 0 and lets the other ranks read the files, which fails
on a node with a file system of its own; it takes a half-written file for a finished one; and its file names
do not depend on the data, so indices of an older dataset at the same prefix would be used. Here every cache
is a folder named after everything that decides its content, built under another name and renamed, and its
files are sent to the nodes that lack it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ds_efficient.errors import UserError

_SEND_BYTES = 1 << 26
_VISIBLE_SECONDS = 3.0


@dataclass(frozen=True)
class ParallelInfo:
    """What the data side has to know of the layout of the ranks; the defaults are a single process.

    Attributes:
        rank, world_size: among all ranks.
        local_rank: among the ranks of this node.
        data_parallel_rank, data_parallel_size: among the ranks that read different samples.
        tensor_parallel_rank: rank 0 reads for its group.
        is_first_stage, is_last_stage: of the pipeline; others need no tokens.
        host_group: a gloo group of all ranks; None is the default group, which must be gloo then.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    is_first_stage: bool = True
    is_last_stage: bool = True
    host_group: dist.ProcessGroup | None = None

    def reads_data(self, attention_mask: bool = False) -> bool:
        """Whether this rank reads batches: tensor rank 0 of the stages that need them (all, with a mask)."""
        return self.tensor_parallel_rank == 0 and (
            self.is_first_stage or self.is_last_stage or attention_mask
        )


def agree(problem: str | None, parallel: ParallelInfo) -> None:
    """Raise UserError on all ranks if any has a problem, so that none waits for a rank that gave up."""
    problems: list[str | None] = [problem]
    if parallel.world_size > 1:
        problems = [None] * parallel.world_size
        dist.all_gather_object(problems, problem, group=parallel.host_group)
    found = list(dict.fromkeys(text for text in problems if text))
    if found:
        raise UserError("; ".join(found))


def attempt(action: Callable[[], None], parallel: ParallelInfo, *, where: bool) -> None:
    """Run ``action`` on the ranks that are asked to, then agree on the outcome."""
    problem = None
    if where:
        try:
            action()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--data-cache-path: {error.filename or ''}: {error.strerror or error}"
    agree(problem, parallel)


def cache_folder(cache: str, key: str) -> Path:
    """Return the folder of one set of indices; where it exists it is complete."""
    return Path(cache) / key


def ensure_cache(cache: str, key: str, build: Callable[[str], None], parallel: ParallelInfo) -> Path:
    """Return the folder with the indices, visible on every node.

    Args:
        cache: folder of all caches, the same path on every node.
        key: hash of what decides the content.
        build: builds into a folder; called on all ranks if global rank 0 finds nothing, must write on rank 0
        only. parallel: layout of the ranks.

    Raises:
        UserError: the folder cannot be written.
    """
    final = cache_folder(cache, key)
    staging = final.with_name(f".{key}.{os.getpid()}")
    if _from_rank_zero(not final.is_dir(), parallel):
        name = str(_from_rank_zero(str(staging), parallel))
        attempt(lambda: staging.mkdir(parents=True), parallel, where=parallel.rank == 0)
        try:
            build(name)
            attempt(lambda: _rename(staging, final), parallel, where=parallel.rank == 0)
        finally:
            if parallel.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
    if parallel.world_size > 1:
        _distribute(final, staging, parallel)
    return final


def _rename(staging: Path, final: Path) -> None:
    try:
        os.rename(staging, final)
    except OSError:
        if not final.is_dir():  # else another run was faster; its indices are the same
            raise


def _from_rank_zero(value: object, parallel: ParallelInfo) -> object:
    if parallel.world_size == 1:
        return value
    values = [value if parallel.rank == 0 else None]
    dist.broadcast_object_list(values, src=0, group=parallel.host_group)
    return values[0]


def _distribute(final: Path, staging: Path, parallel: ParallelInfo) -> None:
    """Send the files of rank 0 to every node whose first rank does not see them."""
    receives = parallel.local_rank == 0 and parallel.rank != 0 and not _visible(final)
    wanted: list[bool] = [False] * parallel.world_size
    dist.all_gather_object(wanted, receives, group=parallel.host_group)
    if not any(wanted):
        return
    listing = (
        sorted((path.name, path.stat().st_size) for path in final.iterdir()) if parallel.rank == 0 else None
    )
    files = _from_rank_zero(listing, parallel)
    assert isinstance(files, list)
    attempt(lambda: staging.mkdir(parents=True), parallel, where=receives)
    for name, size in files:
        problem = _send_file(final / name, staging / name, size, receives, parallel)
        agree(problem, parallel)
    attempt(lambda: _rename(staging, final), parallel, where=receives)
    if receives:
        shutil.rmtree(staging, ignore_errors=True)


def _visible(final: Path) -> bool:
    """Whether the folder is here; a network file system may show it a little later."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not final.is_dir():
        if time.monotonic() > deadline:
            return False
        if final.parent.is_dir():
            os.listdir(final.parent)
        time.sleep(0.2)
    return True


def _send_file(source: Path, target: Path, size: int, receives: bool, parallel: ParallelInfo) -> str | None:
    """Broadcast one file in pieces; every rank takes part, so that a failed write stops no other."""
    problem: str | None = None
    reader = open(source, "rb") if parallel.rank == 0 else None
    try:
        writer = open(target, "wb") if receives else None
    except OSError as error:
        writer, problem = None, f"--data-cache-path: {target}: {error.strerror}"
    for begin in range(0, size, _SEND_BYTES):
        count = min(_SEND_BYTES, size - begin)
        if reader is not None:
            piece = torch.frombuffer(bytearray(reader.read(count)), dtype=torch.uint8)
        else:
            piece = torch.empty(count, dtype=torch.uint8)
        dist.broadcast(piece, src=0, group=parallel.host_group)
        if writer is not None and problem is None:
            try:
                writer.write(piece.numpy().tobytes())
            except OSError as error:
                problem = f"--data-cache-path: {target}: {error.strerror}"
    for stream in (reader, writer):
        if stream is not None:
            stream.close()
    return problem
