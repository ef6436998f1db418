"""The compiled loss on a GPU, with a vocabulary of the usual size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed

from megatron_patches.cross_entropy import token_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def group() -> Iterator[Any]:
    """The one rank of a group."""
    torch._dynamo.reset()  # each test compiles anew: there is a limit to the variants of a function
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.005), (torch.float16, 0.0006)]
)
@pytest.mark.parametrize("vocabulary", (50304, 1000, 77))
def test_losses_and_gradients_as_in_float64(
    group: Any, vocabulary: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    shape = (37, 3)
    logits = 5 * torch.randn(*shape, vocabulary, device="cuda", generator=generator)
    logits[3] += 2000.0
    logits = logits.to(dtype).requires_grad_()
    target = torch.randint(vocabulary, shape, device="cuda", generator=generator)
    weights = torch.randn(shape, device="cuda", generator=generator)
    exact = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact.flatten(0, 1), target.flatten(), reduction="none")
    (expected * weights.flatten()).sum().backward()
    found = token_losses(logits, target, group)
    (found * weights).sum().backward()
    torch.testing.assert_close(found.double().flatten(), expected, rtol=2e-6, atol=2e-6)
    assert logits.grad is not None and exact.grad is not None and logits.grad.dtype == dtype
    error = (logits.grad.double() - exact.grad).abs().max()
    assert error < tolerance * exact.grad.abs().max()


def test_no_softmax_is_kept_and_more_elements_than_32_bits_count(group: Any) -> None:
    tokens, vocabulary = 44000, 50304  # 2.2e9 logits, 4.4 GB
    logits = torch.zeros(tokens, 1, vocabulary, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.arange(tokens, device="cuda").view(tokens, 1)
    with torch.no_grad():
        logits[-1, 0, tokens - 1] = 20.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = token_losses(logits, target, group)
    assert torch.cuda.max_memory_allocated() - before < 0.05 * logits.nbytes
    losses.sum().backward()
    assert logits.grad is not None
    expected = torch.tensor([torch.log(torch.tensor(float(vocabulary))), 0.0], device="cuda")
    torch.testing.assert_close(losses[[0, -1], 0], expected, rtol=1e-6, atol=2e-4)
    assert logits.grad[-1, 0, tokens - 1].abs() < 1e-3 and logits.grad[-2, 0, tokens - 2] < -0.99
