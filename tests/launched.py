"""Runs under the real ``deepspeed`` launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from rank_pool import free_port

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "pretrain_gpt.py"


@contextmanager
def launched(argv: list[str], log: Path, script: Path = SCRIPT) -> Iterator[subprocess.Popen[bytes]]:
    """Start `script` on two ranks; stdout and stderr go to `log`. What is left at the end is killed."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command += ["--master_port", str(free_port()), str(script), *argv]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
    try:
        yield process
    finally:
        for child in [*_descendants(process.pid), process]:
            child.kill()
        process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def launch(argv: list[str], log: Path, script: Path = SCRIPT, timeout: float = 200.0) -> tuple[int, str]:
    """Run to the end; return exit status and output."""
    with launched(argv, log, script) as process:
        status = process.wait(timeout)
    return status, log.read_text(errors="replace")


def rank_process(launcher: int, rank: int) -> psutil.Process:
    """Return the process of a rank."""
    for child in _descendants(launcher):
        if child.environ().get("RANK") == str(rank) and str(SCRIPT) in " ".join(child.cmdline()):
            return child
    raise AssertionError(f"no process of rank {rank}")


def wait_for(condition: Callable[[], bool], seconds: float = 150.0) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def steps_done(folder: Path) -> int:
    """Return the last step in ``folder/run.jsonl``."""
    path = folder / "run.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line).get("step", 0) for line in lines), default=0)
