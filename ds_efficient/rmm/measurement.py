"""What the layers' variances are over all ranks, and the ratios that follow: the same on every rank."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ds_efficient.rmm.monitor import Noise, read, rows_for_target
from ds_efficient.rmm.sketch import Sketch

logger = logging.getLogger(__name__)


class Measurement:
    """Collects `Sketch.noise`.

    Args:
        sketches: of this rank's layers by their names in the whole model; may be filled until `attach`.
    """

    def __init__(self, sketches: Mapping[str, Sketch]) -> None:
        self._sketches = sketches
        self._names: list[str] = []
        self._ranks: list[int] = []

    def attach(self) -> None:
        """Learn which ranks hold which layers; collective over all ranks."""
        held = _all_texts(json.dumps(sorted(self._sketches)))
        every = [name for text in held for name in json.loads(text)]
        self._names = sorted(set(every))
        self._ranks = [every.count(name) for name in self._names]

    def read(self) -> dict[str, Noise]:
        """Return what was measured since the last call for each layer of this rank; collective.

        Sums over micro-batches and tensor-parallel ranks; of data-parallel ranks too, so that ratios are
        over all of them.
        """
        device = next((s.noise.device for s in self._sketches.values() if s.noise is not None), _device())
        rows = [self._taken(name, device) for name in self._names]
        total = torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.float64, device=device)
        if _world() > 1:
            dist.all_reduce(total)
        found = dict(zip(self._names, read(total), strict=True))
        return {name: found[name] for name in self._sketches}

    def _taken(self, name: str, device: torch.device) -> Tensor:
        sketch = self._sketches.get(name)
        noise = None if sketch is None else sketch.noise
        if sketch is not None:
            sketch.noise = None
        return torch.zeros(4, dtype=torch.float64, device=device) if noise is None else noise.to(device)

    def choose(self, found: Mapping[str, Noise], target: float) -> None:
        """Give each layer the fewest rows that keep to the target; layers that share a sketch, the most.

        Args:
            found: result of `read`.
            target: `RmmConfig.target_variance_ratio`.
        """
        wanted: dict[int, float] = {}
        for name, sketch in self._sketches.items():
            noise = found[name]
            if not (sketch.tally.rows and math.isfinite(noise.scale) and math.isfinite(noise.sgd_variance)):
                continue  # the layer did not run, or the run diverges
            parts = sketch.partition(sketch.tally.rows)
            rows = rows_for_target(noise, target, parts.block, sketch.kind)
            group = id(sketch.leader or sketch)
            wanted[group] = max(wanted.get(group, 0.0), min(1.0, rows / parts.block))
        for name, sketch in self._sketches.items():
            ratio = wanted.get(id(sketch.leader or sketch))
            if ratio is not None and ratio != sketch.ratio:
                logger.debug("rmm: %s: ratio %.4g, was %.4g", name, ratio, sketch.ratio)
                sketch.ratio = ratio


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _device() -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def _all_texts(text: str) -> list[str]:
    """Return every rank's text."""
    if _world() == 1:
        return [text]
    place = _device() if dist.get_backend() == "nccl" else torch.device("cpu")
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(place)
    size = torch.tensor([data.numel()], device=place)
    sizes = [torch.zeros_like(size) for _ in range(_world())]
    dist.all_gather(sizes, size)
    longest = max(int(one) for one in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=place)
    padded[: data.numel()] = data
    pieces = [torch.empty_like(padded) for _ in range(_world())]
    dist.all_gather(pieces, padded)
    return [bytes(piece[: int(n)].cpu()).decode() for piece, n in zip(pieces, sizes, strict=True)]
