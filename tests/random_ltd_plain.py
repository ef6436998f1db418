"""Token dropping as plain torch does it, for tests."""

from __future__ import annotations

import torch


def where(x: torch.Tensor, index: torch.Tensor, batch_first: bool) -> torch.Tensor:
    """``index`` in the shape that torch.gather and torch.scatter want."""
    order = index if batch_first else index.T
    order = order.view(*order.shape, *[1] * (x.dim() - 2))
    return order.expand(*order.shape[:2], *x.shape[2:])


def plain_gather(x: torch.Tensor, index: torch.Tensor, batch_first: bool) -> torch.Tensor:
    return torch.gather(x, 1 if batch_first else 0, where(x, index, batch_first))


def plain_scatter(
    x: torch.Tensor, part: torch.Tensor, index: torch.Tensor, batch_first: bool
) -> torch.Tensor:
    return torch.scatter(x, 1 if batch_first else 0, where(x, index, batch_first), part)


def hidden(batch: int, length: int, *features: int, batch_first: bool, **options) -> torch.Tensor:
    shape = (batch, length, *features) if batch_first else (length, batch, *features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), **options)
