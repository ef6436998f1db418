"""Where a training step of ``launch/pretrain_gpt.py`` spends its GPU time, by kernel and by kind.

python tests/perf/profile_step.py --output FILE [--step 10] -- ARGUMENTS OF pretrain_gpt.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

KINDS = (
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "cublas")),
    ("attention", ("flash", "fmha", "attention")),
    ("communication", ("nccl",)),
    ("optimizer", ("multi_tensor", "adam")),
    ("norms and sums", ("norm", "reduce")),
    ("compiled", ("triton",)),
    ("copies", ("memcpy", "copy", "memset", "cat")),
)


def kind_of(name: str) -> str:
    """Return the kind of a kernel by its name."""
    lowered = name.lower()
    return next(
        (kind for kind, words in KINDS if any(word in lowered for word in words)), "other elementwise"
    )


def summary(profile: Any, wall: float) -> str:
    """Return the table of kinds and of the thirty longest kernels, in milliseconds."""
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profile.events():
        # torch marks the optimizer's span on the device too, which would count its kernels twice
        span = getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.")
        if str(event.device_type).endswith("CUDA") and not span:
            kernels[event.name][0] += event.device_time_total / 1e3
            kernels[event.name][1] += 1
    kinds: dict[str, float] = defaultdict(float)
    for name, (milliseconds, _) in kernels.items():
        kinds[kind_of(name)] += milliseconds
    busy = sum(kinds.values())
    lines = [f"wall {wall * 1e3:.1f} ms, kernels {busy:.1f} ms"]
    lines += [f"{value:9.2f}  {kind}" for kind, value in sorted(kinds.items(), key=lambda item: -item[1])]
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:30]
    lines += [f"{value:9.2f}  {int(count):5d}x  {name[:120]}" for name, (value, count) in longest]
    return "\n".join(lines)


def main() -> int:
    """Train with one step profiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--step", type=int, default=10)
    parser.add_argument("training", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    import pretrain_gpt
    import torch
    from pretraining.steps import PlainRunner

    original: Callable[[Any, Iterator[Any]], torch.Tensor] = PlainRunner.train_step
    steps = 0

    def train_step(self: PlainRunner, batches: Iterator[Any]) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps != arguments.step:
            return original(self, batches)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            begin = time.perf_counter()
            loss = original(self, batches)
            torch.cuda.synchronize()
            wall = time.perf_counter() - begin
        text = summary(profile, wall)
        arguments.output.write_text(text + "\n")
        print(text, flush=True)
        return loss

    PlainRunner.train_step = train_step  # type: ignore[method-assign]
    training = [argument for argument in arguments.training if argument != "--"]
    return int(pretrain_gpt.run(training))


if __name__ == "__main__":
    sys.exit(main())
