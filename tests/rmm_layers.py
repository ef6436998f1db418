"""Randomized layers for tests, and what they compute and save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_efficient.core.keys import Key
from ds_efficient.rmm import RandomizedLinear

IN, OUT, ROWS = 24, 40, 200
SMALL = {"ratio": 0.25, "block_size": 64, "min_rows": 8}
KEY = Key(7).fold("layer")


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer_of(dtype: torch.dtype = torch.float32, **more: Any) -> RandomizedLinear:
    return RandomizedLinear(IN, OUT, **{**SMALL, "key": KEY, "dtype": dtype, **more})


def gradients(layer: nn.Module, x: Tensor, seed: int = 1) -> tuple[Tensor | None, ...]:
    """Return output and gradients of input, weight and bias for a random gradient of the output."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(numbers(*y.shape, seed=seed, dtype=y.dtype))
    bias = getattr(layer, "bias", None)
    return y.detach(), x.grad, layer.weight.grad, None if bias is None else bias.grad


def seen_by(layer: Callable[[], Any]) -> list[Tensor]:
    """Return what autograd saves in a call, parameters left out."""
    saved: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer()
    return saved
