"""Counts of a layer's calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ds_efficient.core.passes import Calls


def test_calls_are_counted_from_0_in_every_step() -> None:
    calls = Calls()
    assert [calls.count(5) for _ in range(3)] == [0, 1, 2]
    assert [calls.count(6) for _ in range(2)] == [0, 1]
    calls.restart()
    assert calls.count(6) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_calls_have_the_numbers_of_the_calls_that_they_repeat(reentrant: bool) -> None:
    calls, found = Calls(), []

    def layer(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            found.append(calls.count(0))
        return x.tanh()

    x = torch.ones(2, requires_grad=True)
    losses = [checkpoint(layer, x, use_reentrant=reentrant).sum() for _ in range(3)]
    assert found == ([] if reentrant else [0, 1, 2])
    found.clear()
    for loss in losses:  # as a pipeline runs them: the first forward pass is the first to be recomputed
        loss.backward()
    assert found == [0, 1, 2]
