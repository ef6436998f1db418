"""The loss on a GPU against megatron-core's fused one, torch's, and the memory floor.

``python tests/perf/cross_entropy.py [--output docs/results/data]`` prints a table and writes
``cross_entropy_<device name>.csv``. Forward and backward pass for 8 x 2048 tokens and a vocabulary of 50304
in bfloat16. Floor: the logits read once in each direction and their gradient written, at the bandwidth of a
copy measured in the same run. Memory is the peak beside the logits. Needs a GPU and megatron-core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measuring import ROOT, benchmark, copy_rate, medians_in_turns
from torch import Tensor, distributed

sys.path.insert(0, str(ROOT))

from megatron_patches.cross_entropy import token_losses

TOKENS, VOCABULARY = (2048, 8), 50304


def measure(device: torch.device) -> Iterator[dict[str, Any]]:
    """All rows."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    group = distributed.group.WORLD
    rate = copy_rate(device)
    logits = torch.randn(*TOKENS, VOCABULARY, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(VOCABULARY, TOKENS, device=device)

    def torchs(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x.flatten(0, 1).float(), target.flatten(), reduction="none")

    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda x: token_losses(x, target, group),
        "megatron-core, fused": lambda x: fused_vocab_parallel_cross_entropy(x, target, group),
        "torch, from float32": torchs,
    }

    def both(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(losses[name](logits).mean(), logits)

    memory = {}
    for name in losses:
        both(name)()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(name)()
        memory[name] = torch.cuda.max_memory_allocated() - before
    times = medians_in_turns({name: both(name) for name in losses}, device)
    floor = 3 * logits.nbytes / rate
    for name, milliseconds in times.items():
        yield {
            "loss": name, "tokens": target.numel(), "vocabulary": VOCABULARY, "dtype": "bfloat16",
            "milliseconds": milliseconds, "floor_milliseconds": floor,
            "times_the_floor": milliseconds / floor,
            "speedup_over_megatron": times["megatron-core, fused"] / milliseconds,
            "peak_memory": memory[name], "memory_of_logits": logits.nbytes,
        }  # fmt: skip
    distributed.destroy_process_group()


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    print(
        f"{row['loss']:>22}: {row['milliseconds']:7.3f} ms, {row['times_the_floor']:5.2f} x the floor, "
        f"{row['peak_memory'] / row['memory_of_logits']:5.2f} times the logits' memory",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(benchmark("cross_entropy", "Benchmark the loss.", measure, show))
