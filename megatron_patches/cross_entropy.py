"""The loss over a vocabulary that tensor-parallel ranks share, without a softmax in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_patches.replacing import is_replaced, replace

_LOSS = "fused_vocab_parallel_cross_entropy"  # of megatron-core's language_module


def row_sums(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit m, sum_v exp(logits_v - m), and the target's logit minus m.

    Args:
        logits: (..., V), of this rank's part of the vocabulary.
        local: (...) integers, the target's place in this part, outside of 0 .. V - 1 where it is another's.

    Returns:
        Three tensors (...), float32; the last is 0 where the target is another part's. Where all logits are
        minus infinity, m is the least finite number, so that the sum is 0.
    """
    numbers = logits.float()
    most = numbers.amax(-1).clamp_min(torch.finfo(torch.float32).min)
    total = torch.exp(numbers - most.unsqueeze(-1)).sum(-1)
    place = local.clamp(0, logits.shape[-1] - 1)
    picked = torch.gather(logits, -1, place.unsqueeze(-1)).squeeze(-1).float() - most
    return most, total, torch.where(place == local, picked, 0.0)


def gradient(logits: Tensor, local: Tensor, most: Tensor, log_sum: Tensor, upstream: Tensor) -> Tensor:
    """Return (softmax - one-hot of the target) times ``upstream``, in the type of the logits.

    Args:
        logits, local: as of `row_sums`.
        most: (...) float32, the largest logit over the whole vocabulary.
        log_sum: (...) float32, the logarithm of the sum of exp(logit - most) over it.
        upstream: (...) gradient of the losses.
    """
    softmax = torch.exp(logits.float() - most.unsqueeze(-1) - log_sum.unsqueeze(-1))
    places = torch.arange(logits.shape[-1], device=logits.device)
    at_target = places == local.unsqueeze(-1)
    return (torch.where(at_target, softmax - 1.0, softmax) * upstream.unsqueeze(-1)).to(logits.dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _run(function: Callable[..., Any], logits: Tensor, *others: Tensor) -> Any:
    """Call with one dimension for all tokens: two compilations do for all numbers of them but one token.

    Beyond its limit of compilations (8, for types and vocabularies), torch runs the function as it is.
    """
    tokens = logits.shape[:-1]
    call = _compiled(function) if logits.is_cuda else function
    found = call(logits.flatten(0, -2), *(other.flatten() for other in others))
    if isinstance(found, tuple):
        return tuple(each.view(tokens) for each in found)
    return found.view(logits.shape)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Any) -> Tensor:
        ranks = torch.distributed.get_world_size(group)
        first = torch.distributed.get_rank(group) * logits.shape[-1]
        local = target - first
        whole = logits.detach()  # compiled alike with and without gradient
        most, total, picked = _run(row_sums, whole, local)
        if ranks > 1:
            here = most
            most = most.clone()
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
            inside = (local >= 0) & (local < logits.shape[-1])
            moved = here - most
            sums = torch.stack((total * torch.exp(moved), torch.where(inside, picked + moved, 0.0)))
            torch.distributed.all_reduce(sums, group=group)
            total, picked = sums
        log_sum = torch.log(total)
        ctx.save_for_backward(logits, local, most, log_sum)
        return log_sum - picked

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, *others = ctx.saved_tensors
        return _run(gradient, logits, *others, upstream), None, None


def token_losses(logits: Tensor, target: Tensor, group: Any) -> Tensor:
    """Return the cross entropy of every token.

    One pass over the logits in each direction, compiled by torch on a GPU: the softmax is computed anew in
    the backward pass. megatron-core's fused form keeps it in float32, and rounds its gradient to bfloat16
    whatever the type of the logits is.

    Args:
        logits: (S, B, V / ranks), this rank's equal share of the vocabulary.
        target: (S, B) integers, token numbers in the whole vocabulary; others are for tokens whose loss is
            multiplied by 0, as with megatron-core's own losses: what they give is finite, and no more.
        group: the tensor-parallel ranks.

    Returns:
        (S, B) float32, equal on all ranks.
    """
    losses: Tensor = _TokenLosses.apply(logits, target, group)
    return losses


def fuse_cross_entropy() -> bool:
    """Let models with ``cross_entropy_loss_fusion`` compute their loss with `token_losses`.

    Returns:
        Whether it was installed by this call.
    """
    from megatron.core.models.common.language_module import language_module

    if is_replaced(language_module, _LOSS):
        return False

    def fused(vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any) -> Tensor:
        return token_losses(vocab_parallel_logits, target, tp_group)

    replace(language_module, _LOSS, fused)
    return True
