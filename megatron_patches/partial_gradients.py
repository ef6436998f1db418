"""Completes gradients that are only partial sums on each tensor-parallel rank.

With sequence parallelism each tensor-parallel rank sees a part of the tokens, so parameters that are
replicated over these ranks (norms, biases after a row-parallel linear) get a partial gradient. megatron-core
sums them in its own finalize step, which needs its own data-parallel wrapper; DeepSpeed does not know of
them at all, and training would go on with wrong gradients. One rule covers these and any parameter of ours
that is replicated while its input or output is cut: the attribute ``sequence_parallel`` or
``tensor_parallel_partial``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_SUMMED = "partial_gradient_is_summed"


def has_partial_gradient(parameter: torch.nn.Parameter) -> bool:
    """Return whether each tensor-parallel rank holds only a part of this parameter's gradient."""
    return bool(
        getattr(parameter, "sequence_parallel", False) or getattr(parameter, "tensor_parallel_partial", False)
    )


def sum_partial_gradients(model: torch.nn.Module, group: Any) -> list[str]:
    """Register a hook on each such parameter that sums its gradient over `group`.

    Call before the engine is built: the hook then runs before DeepSpeed accumulates, reduces or partitions,
    which makes it right under every ZeRO stage. A parameter that has the hook already is left alone.

    Args:
        model: the model of this rank, or a module of it.
        group: tensor-parallel process group.

    Returns:
        Names of the parameters that got the hook.
    """
    if group is None or dist.get_world_size(group) == 1:
        return []

    def complete(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=group)
        return total

    names = []
    for name, parameter in model.named_parameters():
        wanted = parameter.requires_grad and has_partial_gradient(parameter)
        if wanted and not getattr(parameter, _SUMMED, False):
            parameter.register_hook(complete)
            setattr(parameter, _SUMMED, True)
            names.append(name)
    return names
