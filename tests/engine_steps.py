"""What ranks of the techniques' tests do with an engine: a step over micro-batches, a hash of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_efficient.core import deepspeed_compat as compat


def parameter_dtype(engine: Any) -> torch.dtype:
    """Return the type of the parameters that the model computes with."""
    return next(iter(engine.module.parameters())).dtype


def step_over(engine: Any, micro_batches: Iterable[Tensor]) -> float:
    """Run one optimizer step over this rank's micro-batches; return the mean loss of all ranks."""
    parts = list(micro_batches)
    total = torch.zeros(())
    for part in parts:
        loss = engine(part)
        engine.backward(loss)
        engine.step()
        total += loss.detach() / len(parts) / dist.get_world_size()
    dist.all_reduce(total)
    return float(total)


def digest(engine: Any) -> str:
    """Return a hash of all parameters and buffers."""
    hashed = hashlib.sha256()
    with compat.whole(engine.module.parameters()):
        for name, value in sorted(engine.module.state_dict().items()):
            hashed.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
