"""Stops a run whose enabled technique does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_efficient.core.technique import Evidence, Technique
from ds_efficient.errors import InactiveTechnique


def collect(techniques: Sequence[Technique[Any]]) -> dict[str, Evidence]:
    """Return each technique's evidence on this rank."""
    return {technique.name: technique.evidence() for technique in techniques}


def require_activity(evidence: dict[str, Evidence], step: int) -> None:
    """Raise unless every technique that is due acted on some rank.

    Collective over all ranks: a pipeline stage may hold no layer that a technique means.

    Args:
        evidence: `collect`'s result.
        step: optimizer steps done, for the message.

    Raises:
        InactiveTechnique: on every rank, naming the techniques.
    """
    names = list(evidence)
    if not names:
        return
    acted = [bool(evidence[name].acted or not evidence[name].due) for name in names]
    flags = torch.tensor(acted, dtype=torch.int32)
    if dist.is_initialized() and dist.get_world_size() > 1:
        if dist.get_backend() == "nccl":
            flags = flags.cuda()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    idle = [name for name, flag in zip(names, flags.tolist(), strict=True) if not flag]
    if idle:
        lines = [f"{name}: {evidence[name].summary}" for name in idle]
        raise InactiveTechnique(
            f"enabled but without any effect after {step} steps, so the run stops:\n  "
            + "\n  ".join(lines)
            + "\n  Look at `ds_efficient plan` for the modules it should act on, or disable the section."
        )
