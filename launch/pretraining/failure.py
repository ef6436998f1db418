"""How a run ends on a mistake or a failure: one message, and no rank left waiting for another."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time
from typing import Any

import torch.distributed as dist

from ds_efficient.errors import UserError

# Launchers look for dead processes every second and report the exit status of the first one they see.
_SECONDS_FOR_LAUNCHER = 4.0
_SECONDS_FOR_OTHER_RANKS = 3.0
_SECONDS_FOR_RANK_0 = 1.0
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")


def report(error: UserError) -> None:
    """Print the message on one of the ranks that have it, whichever these are.

    Before the processes know each other, the ranks of a node find the same mistakes; its first prints.
    """
    store = _store()
    if store is None:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            _print(str(error))
        return
    key = f"pretrain_gpt/message/{hashlib.sha256(str(error).encode()).hexdigest()}"
    try:
        first = _wait_for_rank_0(store, key) and store.add(key, 1) == 1
    except RuntimeError:  # rank 0, which keeps the store, is gone: it had another message
        first = True
    if first:
        _print(str(error))
    _let_others_report(store)


def is_lost_connection(error: Exception) -> bool:
    """Return whether `error` only says that another rank is gone."""
    if isinstance(error, dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def report_lost_connection() -> None:
    """Leave the exit status of the run to the rank that failed first."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a launcher ends this process here
    time.sleep(_SECONDS_FOR_LAUNCHER)
    _print("lost the connection to another rank, which ended; its message says why", always_rank=True)


def _store() -> Any:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def _wait_for_rank_0(store: Any, key: str) -> bool:
    """Give rank 0 the first right to print; return whether this rank may."""
    deadline = time.monotonic() + (_SECONDS_FOR_RANK_0 if dist.get_rank() else 0.0)
    while time.monotonic() < deadline:
        if store.add(key, 0) > 0:
            return False
        time.sleep(0.05)
    return True


def _let_others_report(store: Any) -> None:
    """Rank 0 keeps the store: it waits a moment for ranks with the same mistake."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        store.add("pretrain_gpt/failed", 1)
        deadline = time.monotonic() + _SECONDS_FOR_OTHER_RANKS
        while dist.get_rank() == 0 and time.monotonic() < deadline:
            if store.add("pretrain_gpt/failed", 0) >= dist.get_world_size():
                break
            time.sleep(0.05)
    except RuntimeError:
        return


def _print(message: str, *, always_rank: bool = False) -> None:
    rank = int(os.environ.get("RANK", "0"))
    where = f" (rank {rank} on {socket.gethostname()})" if rank or always_rank else ""
    print(f"pretrain_gpt.py{where}: {message}", file=sys.stderr, flush=True)
