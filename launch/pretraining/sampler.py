"""From a dataset to batches: an order that depends on neither the ranks nor the loader processes.

megatron-core has shuffled its datasets already, so the order is sequential: optimizer step s uses samples
``[s * global_batch, (s + 1) * global_batch)`` at every data-parallel size, and a run resumes by the number of
samples consumed alone.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_efficient.errors import UserError


class PretrainingSampler(Sampler[list[int]]):
    """Lists of ``micro_batch_size`` indices for one data-parallel rank; whole batches only.

    Args:
        num_samples: length of the dataset.
        consumed_samples: samples that all ranks together have used before.
        micro_batch_size: samples a rank and pass.
        data_parallel_rank: this rank.
        data_parallel_size: ranks.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data-parallel rank {data_parallel_rank} of {data_parallel_size}")
        if micro_batch_size < 1 or consumed_samples < 0:
            raise ValueError(f"micro batch {micro_batch_size}, consumed samples {consumed_samples}")
        self._num_samples = num_samples
        self._consumed = consumed_samples
        self._micro = micro_batch_size
        self._rank = data_parallel_rank
        self._stride = micro_batch_size * data_parallel_size

    def __len__(self) -> int:
        return max(0, self._num_samples - self._consumed) // self._stride

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            begin = self._consumed + number * self._stride + self._rank * self._micro
            yield list(range(begin, begin + self._micro))


class PretrainingLoader:
    """Batches of a dataset in the sampler's order; every ``iter`` starts at ``consumed_samples`` again.

    Beyond the last whole batch the iterator raises UserError instead of ending: a loop that goes on too long
    must not silently see data again or stop early.
    """

    def __init__(self, dataset: Dataset, sampler: PretrainingSampler, num_workers: int) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._num_workers = num_workers

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # A generator of its own: a DataLoader would draw its base seed from the global one.
        loader: DataLoader = DataLoader(
            self._dataset,
            batch_sampler=self._sampler,
            num_workers=self._num_workers,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_start_worker,
        )
        if self._num_workers:
            _kill_workers_at_exit()
        batches = iter(loader)
        for _ in range(len(self._sampler)):
            yield _next(batches)
        raise UserError(
            f"the data is used up: the dataset has {len(self._dataset)} samples, "  # type: ignore[arg-type]
            f"of which {len(self._sampler)} batches a rank could be made; "
            "--train-iters or --eval-iters was smaller when it was built"
        )


def _next(batches: Any) -> dict[str, torch.Tensor]:
    try:
        return next(batches)
    except UserError as error:
        # From a loader process it comes with that process's trace in front; the message is the last part.
        message = str(error).rsplit("UserError: ", 1)[-1].strip()
        raise UserError(message) from None


def _start_worker(worker: int) -> None:
    """Loader processes leave signals to the process that owns them: it saves first, then ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@functools.cache
def _kill_workers_at_exit() -> None:
    """Replace multiprocessing's end of daemons, a SIGTERM and an endless wait: loader processes ignore it.

    An iterator that is still referenced at exit, as by the traceback of an error, has not ended them itself.
    """

    def kill() -> None:
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    atexit.register(kill)


def make_loader(
    dataset: Dataset,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int,
) -> PretrainingLoader:
    """Return the batches of one data-parallel rank from ``consumed_samples`` on.

    Args:
        dataset: as ``build_datasets`` returns it.
        consumed_samples: samples that all ranks together have used before.
        micro_batch_size: samples a rank and pass; tensors get it as first dimension.
        data_parallel_rank, data_parallel_size: place among the ranks.
        num_workers: loader processes; 0 reads in this process. The batches are the same.

    Raises:
        UserError: nothing is left of the dataset.
    """
    sampler = PretrainingSampler(
        len(dataset),  # type: ignore[arg-type]
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    if len(sampler) == 0:
        raise UserError(
            f"the data is used up: the dataset has {len(dataset)} samples, {consumed_samples} are consumed, "  # type: ignore[arg-type]
            f"a batch of all ranks takes {micro_batch_size * data_parallel_size}"
        )
    return PretrainingLoader(dataset, sampler, num_workers)
