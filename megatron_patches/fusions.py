"""Fewer passes over memory on a GPU, where megatron-core needs Transformer Engine or apex for it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_MARKER = "_ds_efficient_fused"


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
    """Let megatron-core's unfused rotary embedding run as one compiled kernel in each direction.

    Written as cat, mul, neg and add it took 50 of 353 ms of a 1.3 B training step on an H100. Compiled only
    for the usual layout; the others go through megatron-core's own function.

    Returns:
        Whether it was installed by this call.
    """
    from megatron.core.models.common.embeddings import rope_utils

    original = rope_utils._apply_rotary_pos_emb_bshd
    if getattr(original, _MARKER, False):
        return False
    compiled = torch.compile(rotate, dynamic=False)
    # Of dropped tokens each sample has angles of its own, and their number grows during the run.
    compiled_per_sample = torch.compile(rotate, dynamic=True)

    @functools.wraps(original)
    def fused(t: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mscale = kwargs.get("mscale", 1.0)
        others = {name: value for name, value in kwargs.items() if name != "mscale"}
        if args or any(others.values()) or not t.is_cuda:
            return original(t, freqs, *args, **kwargs)
        return (compiled if freqs.shape[1] == 1 else compiled_per_sample)(t, freqs, mscale)

    setattr(fused, _MARKER, True)
    rope_utils._apply_rotary_pos_emb_bshd = fused
    return True
