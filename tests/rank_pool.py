"""Ranks for distributed tests: a test costs seconds instead of imports.

A fork server imports torch, DeepSpeed and megatron-core once; `RankPool(size).run("module:function", *args)`
forks `size` ranks from it, each a fresh process with its own process group and global state. A rank that
raises, dies or exceeds the time-out fails the test with its number, its traceback and its last output.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT), str(ROOT / "launch"), str(ROOT / "tests")]
IMPORT_SECONDS = 120.0

_started = False
_numbers = itertools.count(97 * os.getpid())


class RankError(AssertionError):
    """A rank failed; the message names it."""


def free_port() -> int:
    """Return a port that nothing listens on, another one at each call.

    Not one that the system hands out by itself: it could give it to somebody else before it is used.
    Processes that run tests beside each other have ranges of their own.
    """
    first, last = 10000, 29000
    width = (last - first) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    first += width * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(width):
        port = first + next(_numbers) % width
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise RankError(f"no port from {first} to {first + width} is free")


def _rank(
    target: str, args: Sequence[Any], environment: dict[str, str], pipe: Connection, output: str
) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    sys.path[:0] = [path for path in PATHS if path not in sys.path]
    try:
        module, _, name = target.partition(":")
        pipe.send(("result", getattr(importlib.import_module(module), name)(*args)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of process groups must not hold the rank back


def _context() -> Any:
    """Return the multiprocessing context whose server has everything imported."""
    global _started
    context = mp.get_context("forkserver")
    if not _started:
        paths = [*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        # Asking NVML leaves CUDA uninitialised, so that the forked ranks can use the GPU.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        context.set_forkserver_preload(["rank_preload"])
        _started = True
    return context


class RankPool:
    """Runs functions on a number of ranks."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, target: str, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``module:function`` with `args` on every rank; return the results in rank order.

        Raises:
            RankError: naming the first rank that failed.
        """
        timeout += 0.0 if _started else IMPORT_SECONDS
        context = _context()
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
            processes, pipes = [], []
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                environment = self._environment(rank, port)
                arguments = (target, args, environment, theirs, f"{folder}/{rank}.log")
                process = context.Process(target=_rank, args=arguments, name=f"rank {rank}")
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            try:
                return self._collect(processes, pipes, time.monotonic() + timeout, Path(folder))
            finally:
                for process, pipe in zip(processes, pipes, strict=True):
                    process.kill()
                    process.join()
                    pipe.close()

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }

    def _collect(
        self, processes: list[Any], pipes: list[Connection], deadline: float, folder: Path
    ) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.size:
            waiting = [pipes[rank] for rank in range(self.size) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = sorted(set(range(self.size)) - set(results))
                raise self._error(silent[0], f"no answer in time (silent ranks: {silent})", folder)
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    kind, value = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    processes[rank].join(5)
                    code = processes[rank].exitcode
                    raise self._error(rank, f"died with exit code {code}", folder) from None
                if kind == "error":
                    raise self._error(rank, value, folder)
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def _error(self, rank: int, message: str, folder: Path) -> RankError:
        path = folder / f"{rank}.log"
        output = path.read_text(errors="replace").splitlines()[-40:] if path.is_file() else []
        text = "\n".join(output)
        return RankError(f"rank {rank} of {self.size}: {message}\nits last output:\n{text}")


def run_script(argv: Sequence[str]) -> int:
    """Run ``launch/pretrain_gpt.py`` in this rank; return its exit status."""
    import pretrain_gpt

    return int(pretrain_gpt.run([str(argument) for argument in argv]))


def run_script_with_output(argv: Sequence[str]) -> tuple[int, str]:
    """Run ``launch/pretrain_gpt.py`` in this rank; return its exit status and what it wrote to stderr."""
    import contextlib
    import io

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = run_script(argv)
    return status, errors.getvalue()
