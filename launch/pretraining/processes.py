"""The processes of a run: torch.distributed, and the groups that the layout cuts the ranks into."""

from __future__ import annotations

import argparse
import datetime
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.errors import UserError
from pretraining.datasets import ParallelInfo


def start_processes(args: argparse.Namespace) -> None:
    """Start torch.distributed; a single process needs no launcher."""
    compat.quiet_logging()
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", _free_port()),
    ):
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    backend = args.distributed_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl" and not torch.cuda.is_available():
        raise UserError("--distributed-backend nccl: needs a GPU, and torch sees none; use gloo")
    compat.init_distributed(backend, args.distributed_timeout_minutes)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@dataclass(frozen=True)
class Parallel:
    """Ranks and groups of this process.

    Attributes:
        info: what the data side has to know.
        tensor_group: ranks that share a layer, or None where each layer is whole.
        tensor_source: global rank of the group's first member.
        data_group: ranks that read different samples.
        device: of batches and losses.
    """

    info: ParallelInfo
    tensor_group: Any
    tensor_source: int
    data_group: Any
    device: torch.device


def start_model_parallel(args: argparse.Namespace) -> Parallel:
    """Cut the ranks into groups and seed the dropout streams as Megatron-LM does."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_patches.cpu_compat import install

    install()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
    )
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    timeout = datetime.timedelta(minutes=args.distributed_timeout_minutes)
    info = ParallelInfo(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=int(os.environ["LOCAL_RANK"]),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
        # What this group carries stays off the GPU and costs no synchronisation.
        host_group=dist.new_group(backend="gloo", timeout=timeout),
    )
    gpu = torch.cuda.is_available()
    return Parallel(
        info=info,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        tensor_source=parallel_state.get_tensor_model_parallel_src_rank(),
        data_group=parallel_state.get_data_parallel_group(),
        device=torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"),
    )
