"""The rotary position embedding in plain torch: the readable definition."""

from __future__ import annotations

import torch
from torch import Tensor

VERSION = 1


def turn(t: Tensor, angles: Tensor, index: Tensor | None, mscale: float, transposed: bool) -> Tensor:
    """Turn ``t`` (S, B, H, D) by ``angles``, or by the transposed matrix; new memory.

    Args:
        t: see the function.
        angles: (L, R) or (L, 1 or B, 1, R).
        index: (B, S) rows of ``angles``; None: the rows in order.
        mscale: factor of sines and cosines.
        transposed: the transposed matrix, which gives the gradient.
    """
    wide = torch.float64 if t.dtype == torch.float64 else torch.float32
    positions, samples, _, width = t.shape
    table = angles[:, None, None] if angles.dim() == 2 else angles
    rotated = table.shape[-1]
    if index is None:
        found = table[:positions]
    else:
        whole = table.expand(-1, samples, 1, rotated)
        found = whole[index.T, torch.arange(samples, device=index.device)]
    found = found.to(wide)
    cosine_a, cosine_b = (found.cos() * mscale).chunk(2, dim=-1)
    sine_a, sine_b = (found.sin() * mscale).chunk(2, dim=-1)
    if transposed:
        sine_a, sine_b = -sine_b, -sine_a
    x = t.to(wide)
    a, b, rest = x.split((rotated // 2, rotated // 2, width - rotated), dim=-1)
    turned = (a * cosine_a - b * sine_a, b * cosine_b + a * sine_b, rest)
    return torch.cat(turned, dim=-1).to(t.dtype)
