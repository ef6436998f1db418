"""Fixtures shared by all tests."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from rank_pool import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def ranks() -> Callable[[int], RankPool]:
    """Return a function from a number of ranks to something that runs functions on them."""
    return RankPool


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fail instead of waiting for ever, as the interpreter would, for a process that a test left behind."""
    yield
    left = [process for process in multiprocessing.active_children() if not process.daemon]
    for process in left:
        process.kill()
    assert not left, f"the tests left {', '.join(f'{p.name} (pid {p.pid})' for p in left)}"
