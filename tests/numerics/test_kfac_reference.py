"""The K-FAC that MKOR is compared with: its product, its averages, its two ways to rescale."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kfac_reference import KFAC
from mkor_runs import batch, model
from torch import nn


def backward(network: nn.Module, step: int) -> None:
    x, y = batch(step, dtype=torch.float32)
    network.zero_grad()
    F.mse_loss(network(x), y).backward()


def covariances(network: nn.Sequential, step: int, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A and G of the first layer, from one loss a row."""
    x, y = batch(step, dtype=torch.float32)
    inputs = torch.cat([x, torch.ones(len(x), 1)], 1) if bias else x
    rows = []
    for one, target in zip(x, y, strict=True):
        hidden = network[0](one).detach().requires_grad_()
        F.mse_loss(network[2](torch.tanh(hidden)), target).backward()
        rows.append(hidden.grad)
    return inputs.T @ inputs / len(x), torch.stack(rows).T @ torch.stack(rows) / len(x)


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_the_inverse_of_the_damped_kronecker_product(bias):
    network = model(bias, torch.float32)
    optimizer = KFAC(
        network, torch.optim.SGD(network.parameters(), lr=0.0), damping=0.04, decay=0.6, interval=2
    )
    first = covariances(network, 0, bias)
    for step in range(3):
        last = covariances(network, step, bias)
        backward(network, step)
        gradient = optimizer.layers["0"].gradient().clone()
        optimizer.step()
    a, g = (0.6 * old + 0.4 * new for old, new in zip(first, last, strict=True))  # of steps 0 and 2
    share = math.sqrt(float(a.diagonal().mean() / g.diagonal().mean()))
    a, g = a + 0.2 * share * torch.eye(len(a)), g + 0.2 / share * torch.eye(len(g))
    product = torch.linalg.solve(torch.kron(g, a).double(), gradient.flatten().double()).view(gradient.shape)
    expected = (product * gradient.norm() / product.norm()).float()
    assert torch.allclose(optimizer.layers["0"].gradient(), expected, rtol=2e-3, atol=1e-6)


def test_one_scale_keeps_the_step_inside_of_the_trust_region():
    results = {}
    for clip in (1e9, 1e-6):
        network = model(dtype=torch.float32)
        optimizer = KFAC(network, torch.optim.SGD(network.parameters(), lr=0.1), rescale="kl", clip=clip)
        backward(network, 0)
        raw = {name: layer.gradient().clone() for name, layer in optimizer.layers.items()}
        optimizer.step()
        new = {name: layer.gradient() for name, layer in optimizer.layers.items()}
        results[clip] = new, sum(float((raw[name] * new[name]).sum()) for name in raw)
    (free, _), (clipped, inner) = results[1e9], results[1e-6]
    scales = [float(clipped[name].norm() / free[name].norm()) for name in free]
    assert scales[0] == pytest.approx(scales[1], rel=1e-4) and scales[0] < 0.5
    # sqrt(clip / (lr^2 <P, g>)) times <P, g> lr^2 is sqrt(clip lr^2 <P, g>)
    assert 0.1**2 * inner == pytest.approx(scales[0] * (1e-6 / scales[0] ** 2), rel=1e-3)


def test_it_learns_where_single_directions_are_small():
    scales = torch.logspace(0, -2, 6)
    losses = {}
    for second_order in (True, False):
        for lr in (0.05, 0.2, 0.8):
            network = model(dtype=torch.float32)
            optimizer = torch.optim.SGD(network.parameters(), lr=lr)
            stepped = KFAC(network, optimizer) if second_order else optimizer
            for step in range(60):
                x, y = batch(step % 4, dtype=torch.float32)
                loss = F.mse_loss(network(x * scales), y)
                stepped.zero_grad()
                loss.backward()
                stepped.step()
            losses[second_order, lr] = loss.item()
    best = [min(losses[kind, lr] for lr in (0.05, 0.2, 0.8)) for kind in (True, False)]
    assert best[0] < 0.8 * best[1]
