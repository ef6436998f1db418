"""What a log line says of speed and memory."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: of the GPU, or resident on a machine without one."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name() -> str:
    """Return the GPU's name, or ``"cpu"``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@dataclass
class Meter:
    """Measures steps between two log lines.

    Attributes:
        tokens_per_step: tokens of a global batch.
        flops_per_token: model FLOPs of forward and backward, dense-equivalent.
        world_size: ranks that share the work.
        peak_flops: dense peak of one device in FLOP/s, None where it is not known.
    """

    tokens_per_step: int
    flops_per_token: float
    world_size: int
    peak_flops: float | None
    _since: float = 0.0
    _steps: int = 0
    _excluded: float = 0.0

    def start(self) -> None:
        """Begin an interval."""
        self._since, self._steps, self._excluded = time.perf_counter(), 0, 0.0

    def count(self) -> None:
        """Count a step."""
        self._steps += 1

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not training (evaluation, saving)."""
        self._excluded += seconds

    def read(self) -> dict[str, float | None]:
        """Return ``seconds_per_step``, ``tokens_per_second``, ``model_tflops`` (a device) and ``mfu``."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = max(time.perf_counter() - self._since - self._excluded, 1e-9)
        steps = max(self._steps, 1)
        tokens_per_second = self.tokens_per_step * steps / seconds
        flops = tokens_per_second * self.flops_per_token / self.world_size
        return {
            "seconds_per_step": seconds / steps,
            "tokens_per_second": tokens_per_second,
            "model_tflops": flops / 1e12,
            "mfu": None if self.peak_flops is None else flops / self.peak_flops,
        }


def quantity(value: float) -> str:
    """Return a number in three digits with k, M, G or T: 12345 is ``12.3k``."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
