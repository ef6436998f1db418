"""Ranks that stay alive between tests, so that a distributed test costs seconds instead of imports.

`RankPool(size)` starts `size` processes once. `pool.run("module:function", *args)` calls the function on every
rank inside a new process group (fresh port), and returns the ranks' results. A rank that raises, dies or
exceeds the time-out fails the test with its number, its traceback and its last output; the pool is then
started anew, so that one failure does not spoil the next test.
"""

from __future__ import annotations

import importlib
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
IMPORT_SECONDS = 180.0


class RankError(AssertionError):
    """A rank failed; the message names it."""


def free_port() -> int:
    """Return a port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _worker(rank: int, size: int, pipe: Connection, output: str) -> None:
    log = open(output, "a", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "tests")]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    while True:
        job = pipe.recv()
        if job is None:
            return
        target, args, port = job
        os.environ["MASTER_PORT"] = str(port)
        try:
            module, _, name = target.partition(":")
            result = getattr(importlib.import_module(module), name)(*args)
            pipe.send(("result", result))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
        finally:
            reset()


def reset() -> None:
    """Forget process groups, so that the next job may have other ones."""
    import torch.distributed as dist

    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is not None:
        comm.cdb = None
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        for name in ("mpu", "_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP"):
            if name in vars(groups):
                setattr(groups, name, {} if name == "_EXPERT_PARALLEL_GROUP" else None)
    if dist.is_initialized():
        dist.destroy_process_group()


class RankPool:
    """A fixed number of rank processes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix=f"ranks{size}_"))
        self._processes: list[mp.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, theirs, str(self._output(rank)))
            process = context.Process(target=_worker, args=arguments, daemon=False, name=f"rank {rank}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _output(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"

    def run(self, target: str, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``module:function`` with `args` on every rank; return the results in rank order.

        Raises:
            RankError: naming the first rank that failed.
        """
        if not self._processes:
            self._start()
            timeout += IMPORT_SECONDS
        port = free_port()
        for pipe in self._pipes:
            pipe.send((target, args, port))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.size:
            waiting = [self._pipes[rank] for rank in range(self.size) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = sorted(set(range(self.size)) - set(results))
                self._fail(silent[0], f"no answer within {timeout:.0f} s (silent ranks: {silent})")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    self._fail(rank, f"died with exit code {self._processes[rank].exitcode}")
                if kind == "error":
                    self._fail(rank, value)
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def _fail(self, rank: int, message: str) -> None:
        time.sleep(0.2)  # the last lines of the output
        output = self._output(rank).read_text(errors="replace").splitlines()[-40:]
        self.close()
        raise RankError(f"rank {rank} of {self.size}: {message}\nits last output:\n" + "\n".join(output))

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            try:
                pipe.send(None)
            except OSError:
                pass
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
        self._processes, self._pipes = [], []


def run_script(argv: Sequence[str]) -> int:
    """Run ``launch/pretrain_gpt.py`` in this rank; return its exit status."""
    import pretrain_gpt

    return int(pretrain_gpt.run([str(argument) for argument in argv]))
