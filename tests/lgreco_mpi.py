"""One process of ``distributed/test_lgreco_mpi.py``: reduces over MPI and saves what it found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lgreco_ranks
import numpy as np

from ds_efficient.lgreco import QSGD, PowerSGD, Raw, TopK

SHAPES = {"wide": (33, 65), "bias": (65,), "square": (64, 64)}


def main(folder: str) -> None:
    """Reduce as `lgreco_ranks.reduce_alone` does, over MPI."""
    for ours, theirs in (("RANK", "RANK"), ("WORLD_SIZE", "SIZE"), ("LOCAL_RANK", "LOCAL_RANK")):
        os.environ[ours] = os.environ[f"OMPI_COMM_WORLD_{theirs}"]
    found = lgreco_ranks.reduce_alone([QSGD(4), TopK(0.05), PowerSGD(3), Raw()], SHAPES, "mpi")
    arrays = {
        f"{number}/{step}/{name}": value
        for number, steps in enumerate(found)
        for step, values in enumerate(steps)
        for name, value in values.items()
    }
    np.savez(Path(folder, f"{os.environ['RANK']}.npz"), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
