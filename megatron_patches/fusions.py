"""Fewer passes over memory on a GPU, where megatron-core needs Transformer Engine or apex for it."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from ds_efficient.errors import OpBuildError
from ds_efficient.ops.random_ltd import gather_rotary, gather_tokens
from ds_efficient.ops.rotary import rotary_embedding
from ds_efficient.ops.rotary_native import DTYPES, Library
from megatron_patches.replacing import is_replaced, replace

logger = logging.getLogger(__name__)

_ROTARY = "_apply_rotary_pos_emb_bshd"  # of megatron-core's rope_utils
_KEPT = "_ds_efficient_kept"


def rotate(t: Tensor, freqs: Tensor, mscale: float = 1.0) -> Tensor:
    """Apply the rotary embedding to the first ``freqs.shape[-1]`` channels, the rest unchanged.

    RoFormer (Su et al. 2021), equation 34, in the two-halves layout of megatron-core.

    Args:
        t: (S, B, H, D).
        freqs: (S, 1, 1, R) or (S, B, 1, R) angles in radians, R even and at most D.
        mscale: factor of cosine and sine.
    """
    width = freqs.shape[-1]
    turned, rest = t[..., :width], t[..., width:]
    cos = (torch.cos(freqs) * mscale).to(t.dtype)
    sin = (torch.sin(freqs) * mscale).to(t.dtype)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def fuse_rotary_embedding() -> bool:
    """Let megatron-core's unfused rotary embedding run as one kernel in each direction.

    Written as cat, mul, neg and add it took 50 of 353 ms of a 1.3 B training step on an H100. On a GPU the
    usual layout takes `ds_efficient.ops.rotary`, or where its kernel cannot be built, which is logged once,
    one that torch compiles; other layouts go through megatron-core's own function.

    Returns:
        Whether it was installed by this call.
    """
    from megatron.core.models.common.embeddings import rope_utils

    if is_replaced(rope_utils, _ROTARY):
        return False
    original = rope_utils._apply_rotary_pos_emb_bshd
    compiled = torch.compile(rotate, dynamic=False)

    def fused(t: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept = getattr(freqs, _KEPT, None)
        mscale = kwargs.get("mscale", 1.0)
        usual = not args and not any(value for name, value in kwargs.items() if name != "mscale")
        if kept is not None:
            if usual:
                return rotary_embedding(t, freqs, kept, mscale=mscale)
            return original(t, _gathered(freqs, kept), *args, **kwargs)
        if not usual or not t.is_cuda:
            return original(t, freqs, *args, **kwargs)
        if _fits(t, freqs) and _has_kernel(t.device):
            return rotary_embedding(t, freqs, mscale=mscale)
        return compiled(t, freqs, mscale)

    replace(rope_utils, _ROTARY, fused)
    return True


def rotary_is_fused() -> bool:
    """Whether `fuse_rotary_embedding` is in force, which alone understands `at_kept`."""
    from megatron.core.models.common.embeddings import rope_utils

    return is_replaced(rope_utils, _ROTARY)


def at_kept(angles: Tensor, index: Tensor) -> Tensor | None:
    """Rotary angles with the kept tokens noted on them, which costs no copy.

    megatron-core hands its layers' angles to its rotary embedding as they are, in training; what would use
    them otherwise fails with their length, that of the whole sequence.

    Args:
        angles: (L, 1 or B, 1, R).
        index: (B, S) int64, the kept positions of each sample.

    Returns:
        A tensor of its own with the memory of ``angles``, or None for angles of another kind, to be gathered.
    """
    if angles.dim() != 4 or angles.shape[2] != 1 or angles.shape[1] not in (1, index.shape[0]):
        return None
    if angles.dtype != torch.float32 or angles.requires_grad:
        return None
    noted = angles.detach()  # others share the tensor itself, in this layer's time and later
    setattr(noted, _KEPT, index)
    return noted


def _gathered(angles: Tensor, index: Tensor) -> Tensor:
    """(S, B, 1, R) of the kept tokens."""
    if angles.shape[1] == 1:
        return gather_rotary(angles.squeeze(1), index, batch_first=False)
    return gather_tokens(angles, index, batch_first=False)


def _fits(t: Tensor, freqs: Tensor) -> bool:
    """Whether `rotary_embedding` computes this; the remainder of its conditions holds in megatron-core."""
    return (
        t.dtype in DTYPES
        and freqs.dtype == torch.float32
        and not freqs.requires_grad
        and t.dim() == freqs.dim() == 4
        and freqs.shape[0] == t.shape[0]
        and freqs.shape[1] in (1, t.shape[1])
        and freqs.shape[2] == 1
    )


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    """Whether there is a kernel for a device; says once why not."""
    try:
        return Library.for_device(device, "native") is not None
    except OpBuildError as error:
        logger.warning(
            "the rotary embedding runs as torch compiles it, with more time on the host: %s", error
        )
        return False
