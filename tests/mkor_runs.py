"""A small network, its data and its training, for the tests of MKOR."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ds_efficient.mkor import MKOR


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias)).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(layers.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=100 + number))
    return layers


def batch(step: int, rows: int = 12, dtype: torch.dtype = torch.float64):
    x = normal(rows, 6, seed=step, dtype=dtype) + 0.5
    return x, torch.sin(x[:, :3])


def mkor(network: nn.Module, inner: str = "SGD", **arguments) -> MKOR:
    arguments = {"state_dtype": torch.float64, "inversion_interval": 2, **arguments}
    return MKOR(network, getattr(torch.optim, inner)(network.parameters(), lr=0.05), **arguments)


def linear_twin(conv: nn.Conv2d) -> nn.Linear:
    """The linear layer that does to patches what the convolution does to images."""
    linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=conv.bias is not None).double()
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        if conv.bias is not None:
            linear.bias.copy_(conv.bias)
    return linear


def step_twins(
    conv: nn.Conv2d, linear: nn.Linear, x: torch.Tensor, patches: torch.Tensor, make
) -> list[MKOR]:
    """Take a step with both, by optimizers that `make` wraps around them; returns these."""
    optimizers = [make(conv), make(linear)]
    conv(x).square().mean().backward()
    linear(patches.transpose(1, 2)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    return optimizers


def train(network: nn.Module, optimizer, steps: range, micro_batches: int = 1, scale: float = 1.0):
    """Train on the mean squared error; returns the losses."""
    losses = []
    for step in steps:
        x, y = batch(step, dtype=next(network.parameters()).dtype)
        total = 0.0
        for xs, ys in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            loss = F.mse_loss(network(xs), ys) / micro_batches
            (loss * scale).backward()
            total += loss.item()
        for parameter in network.parameters():
            parameter.grad.div_(scale)
        extra = {"loss": total, "loss_scale": scale} if isinstance(optimizer, MKOR) else {}
        optimizer.step(**extra)
        optimizer.zero_grad()
        losses.append(total)
    return losses


def same(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


def factors(optimizer: MKOR) -> list[torch.Tensor]:
    return [
        factor.dense().clone()
        for by_side in optimizer.inverse_factors().values()
        for factor in by_side.values()
    ]
