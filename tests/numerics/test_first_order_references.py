"""LAMB and Muon in fp32, with which MKOR is compared, do what they are named after."""

from __future__ import annotations

import pytest
import torch
from first_order_references import Float32Muon, Lamb
from mkor_runs import normal


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_in_fp32_is_torchs_within_the_rounding_of_bf16(shape):
    weights = [torch.nn.Parameter(normal(*shape, dtype=torch.float32)) for _ in range(2)]
    optimizers = [
        torch.optim.Muon(weights[:1], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
        Float32Muon(weights[1:], lr=0.1, weight_decay=0.3),
    ]
    for step in range(4):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = normal(*shape, seed=step, dtype=torch.float32)
            optimizer.step()
    moved = (weights[0] - normal(*shape, dtype=torch.float32)).norm()
    assert (weights[0] - weights[1]).norm() < 0.02 * moved


def test_a_step_of_lamb_has_the_size_of_the_weight():
    weight, zero = (
        torch.nn.Parameter(value) for value in (normal(4, 3), torch.zeros(5, dtype=torch.float64))
    )
    before = weight.detach().clone()
    optimizer = Lamb([weight, zero], lr=0.01, eps=0.0, weight_decay=0.5)
    weight.grad, zero.grad = normal(4, 3, seed=1), normal(5, seed=2)
    optimizer.step()
    adam = weight.grad.sign() + 0.5 * before  # Adam's first step is the sign
    expected = 0.01 * before.norm() * adam / adam.norm()
    assert torch.allclose(before - weight, expected)
    assert torch.allclose(-zero.detach(), 0.01 * zero.grad.sign())


def test_lamb_averages_as_adam_does():
    weights = [torch.nn.Parameter(normal(4, 3)) for _ in range(2)]
    adam = torch.optim.Adam(weights[:1], lr=1e-3, betas=(0.9, 0.95), eps=1e-6)
    lamb = Lamb(weights[1:], lr=1e-3)
    for step in range(5):
        before = [weight.detach().clone() for weight in weights]
        for weight, optimizer in zip(weights, (adam, lamb), strict=True):
            weight.grad = normal(4, 3, seed=step)
            optimizer.step()
        moves = [old - weight.detach() for old, weight in zip(before, weights, strict=True)]
        sizes = [float(move.norm()) for move in moves]
        assert torch.allclose(moves[0] / sizes[0], moves[1] / sizes[1], atol=1e-9)
        assert sizes[1] == pytest.approx(min(1e-3 * float(before[1].norm()), 10 * sizes[0]), rel=1e-6)
