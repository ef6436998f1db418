"""LAMB, which torch has not, and Muon in fp32: what MKOR is compared with in measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """LAMB (You and others, arXiv 1904.00962): Adam's step with decay, scaled to the weight's norm.

    The ratio of norms is at most 10, and 1 where either norm is zero.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * self._update(parameter, parameter.grad, group))

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        mean = state["mean"] / (1 - first ** state["step"])
        root = (state["square"] / (1 - second ** state["step"])).sqrt()
        update = mean / (root + group["eps"]) + group["weight_decay"] * parameter
        norms = parameter.norm(), update.norm()
        usable = (norms[0] > 0) & (norms[1] > 0)
        return update * torch.where(usable, (norms[0] / norms[1]).clamp_max(10), torch.ones_like(norms[0]))


class Float32Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with its products in fp32, for processors without fast bf16 products.

    Nesterov momentum of 0.95; five Newton-Schulz steps; updates scaled to the size of AdamW's.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
                update = _orthogonal(parameter.grad.lerp(momentum, 0.95))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(0.2 * math.sqrt(max(parameter.shape)) * group["lr"] * update)


def _orthogonal(x: Tensor) -> Tensor:
    """All singular values of a matrix brought near to 1."""
    turned = x.shape[0] > x.shape[1]
    x = (x.T if turned else x) / x.norm().clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if turned else x
