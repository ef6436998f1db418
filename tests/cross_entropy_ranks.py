"""What the ranks of the loss's tests run: a vocabulary in equal parts."""

from __future__ import annotations

import numpy as np
import torch

SHAPE, VOCABULARY = (5, 3), 24


def inputs(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (5, 3, 24), some large, targets in every part of the vocabulary, weights of the losses."""
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(*SHAPE, VOCABULARY, generator=generator)
    logits[0, 0] += 1000.0
    logits[1, 1] -= 300.0
    logits[2, 2, 7] = 80.0
    target = torch.arange(SHAPE[0] * SHAPE[1]).view(SHAPE) * 23 % VOCABULARY
    weights = torch.randn(SHAPE, generator=generator)
    return logits.to(dtype).to(device), target.to(device), weights.to(device)


def unusual(ranks: int) -> dict[str, np.ndarray]:
    """Return this rank's losses and gradient where the last half of the vocabulary is minus infinity.

    One target is no token's number. The losses' gradient is one number for all, as that of a sum.
    """
    import megatron_ranks
    from megatron.core import parallel_state, tensor_parallel

    from megatron_patches.cross_entropy import token_losses

    megatron_ranks.start(ranks)
    group = parallel_state.get_tensor_model_parallel_group()
    logits, target, _ = inputs(torch.float32)
    logits[..., VOCABULARY // 2 :] = float("-inf")
    target = target % (VOCABULARY // 2)
    target[4, 2] = -100
    part = logits.chunk(ranks, -1)[torch.distributed.get_rank(group)].contiguous()
    found: dict[str, np.ndarray] = {}
    for name in ("ours", "theirs"):
        own = part.clone().requires_grad_()
        if name == "ours":
            each = token_losses(own, target, group)
        else:
            each = tensor_parallel.vocab_parallel_cross_entropy(own.clone(), target)
        each.sum().backward()
        assert own.grad is not None
        found |= {f"{name} losses": each.detach().numpy(), f"{name} gradient": own.grad.numpy()}
    return found


def losses(ranks: int, dtype: str, megatrons: bool = False) -> dict[str, np.ndarray]:
    """Return this rank's losses and its part's gradient, by our function or megatron-core's plain one."""
    import megatron_ranks
    from megatron.core import parallel_state, tensor_parallel

    from megatron_patches.cross_entropy import token_losses

    megatron_ranks.start(ranks)
    group = parallel_state.get_tensor_model_parallel_group()
    logits, target, weights = inputs(getattr(torch, dtype))
    part = logits.chunk(ranks, -1)[torch.distributed.get_rank(group)].contiguous().requires_grad_()
    if megatrons:
        found = tensor_parallel.vocab_parallel_cross_entropy(part.clone(), target)
    else:
        found = token_losses(part, target, group)
    assert found.dtype == torch.float32
    (found * weights).sum().backward()
    assert part.grad is not None and part.grad.dtype == part.dtype
    return {"losses": found.detach().numpy(), "gradient": part.grad.float().numpy()}
