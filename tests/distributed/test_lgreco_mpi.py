"""The reducer over MPI: the same results as over gloo, with processes that mpirun starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rank_pool import RankPool, free_port

from ds_efficient.errors import UserError
from ds_efficient.lgreco import QSGD, PowerSGD, Raw, TopK, mpi

pytestmark = pytest.mark.distributed

SHAPES = {"wide": (33, 65), "bias": (65,), "square": (64, 64)}
ROOT = Path(__file__).resolve().parents[2]
# Beside the environment (tests/run.sh): DeepSpeed starts MPI wherever it can import mpi4py.
MPI = Path(sys.prefix) / "mpi"
PACKAGES = MPI / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(MPI / "bin"), os.environ.get("PATH", "")]))
LACKING = [
    *([] if MPIRUN else ["mpirun"]),
    *([] if importlib.util.find_spec("mpi4py") or (PACKAGES / "mpi4py").is_dir() else ["mpi4py"]),
]


@pytest.mark.skipif(bool(LACKING), reason=f"needs {' and '.join(LACKING)}")
def test_mpi_and_gloo_give_the_same_means_errors_and_bytes(tmp_path: Path) -> None:
    own = [str(ROOT), str(ROOT / "tests"), str(ROOT / "launch"), str(PACKAGES)]
    paths = os.pathsep.join([*own, os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **{f"{name}_ALLOW_RUN_AS_ROOT{more}": "1" for name in ("OMPI", "PRTE") for more in ("", "_CONFIRM")},
    }
    assert MPIRUN is not None
    command = [MPIRUN, "--oversubscribe", "-np", "2", sys.executable, "-m", "lgreco_mpi", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    compressors = [QSGD(4), TopK(0.05), PowerSGD(3), Raw()]
    gloo = RankPool(2).run("lgreco_ranks:reduce_alone", compressors, SHAPES)
    for rank, found in enumerate(gloo):
        saved = np.load(tmp_path / f"{rank}.npz")
        names = [
            (f"{number}/{step}/{name}", value)
            for number, steps in enumerate(found)
            for step, values in enumerate(steps)
            for name, value in values.items()
        ]
        assert set(saved) == {name for name, _ in names} and len(names) > 40
        for name, value in names:
            assert np.array_equal(saved[name], value), name


def test_without_mpi4py_the_backend_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r'lgreco.backend "mpi": mpi4py cannot be imported.*use "auto"'):
        mpi.MpiTransport([0, 1])
