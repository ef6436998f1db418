"""What ranks of a `RankPool` do in the tests of ``check_cluster.py``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from preflight import measure


def check(argv: Sequence[str]) -> int:
    """Run ``check_cluster.py`` in this rank; return its exit status."""
    import check_cluster

    return int(check_cluster.run([str(argument) for argument in argv]))


def offset_of_clock(ahead: float) -> measure.Clock | None:
    """Measure a clock of rank 1 that is `ahead` seconds ahead."""
    dist.init_process_group("gloo")
    shift = ahead * dist.get_rank()
    return measure.clock_offset(1, clock=lambda: time.time() + shift)


def reductions(spoil_at: int | None) -> list[measure.Reduction]:
    """Check an all-reduce that on rank 1 loses one element of tensors of `spoil_at` bytes."""
    dist.init_process_group("gloo")

    def reduce(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)
        if dist.get_rank() == 1 and 4 * tensor.numel() == spoil_at:
            tensor[-1] += 1.0

    return measure.all_reduce([4, 64, 4096], torch.device("cpu"), reduce)


def folder(paths: Sequence[str]) -> measure.Folder:
    """Look at the folder of this rank."""
    dist.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()

    def broadcast(text: str) -> str:
        if dist.get_rank() == 0:
            store.set("nonce", text)
        return store.get("nonce").decode()

    return measure.look_at_folder(Path(paths[dist.get_rank()]), True, broadcast)
