"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable

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
