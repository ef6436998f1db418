"""Mixed-precision AdamW by hand, for measuring what a layer's training holds in memory."""

from __future__ import annotations

import torch
from torch import nn


class MixedAdamW:
    """AdamW on fp32 master copies of 16-bit parameters, with fp32 moments; the same for both layers.

    Args:
        parameters: to train.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [p.detach().float().clone() for p in parameters]
        self.first = [torch.zeros_like(m) for m in self.masters]
        self.second = [torch.zeros_like(m) for m in self.masters]
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float = 1e-4, decay: float = 0.1) -> None:
        """One update (betas 0.9 and 0.95, epsilon 1e-8)."""
        self.steps += 1
        for p, master, m, v in zip(self.parameters, self.masters, self.first, self.second, strict=True):
            assert p.grad is not None
            gradient = p.grad.float()
            m.lerp_(gradient, 0.1)
            v.mul_(0.95).addcmul_(gradient, gradient, value=0.05)
            scale = (v / (1 - 0.95**self.steps)).sqrt_().add_(1e-8)
            master.mul_(1 - lr * decay).addcdiv_(m, scale, value=-lr / (1 - 0.9**self.steps))
            p.copy_(master)

    def nbytes(self) -> int:
        """Bytes of parameters, gradients, masters and moments."""
        held = [*self.parameters, *self.masters, *self.first, *self.second]
        return sum(t.nbytes for t in held) + sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
