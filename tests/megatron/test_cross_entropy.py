"""The loss that stands in for megatron-core's fused one: values, gradients, vocabularies in parts."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import cross_entropy_ranks
import numpy as np
import pytest
import torch
from rank_pool import RankPool

from megatron_patches import cross_entropy

Ranks = Callable[[int], RankPool]
DTYPES = {"float32": 1e-6, "bfloat16": 0.005, "float16": 0.0006}  # of the gradient's largest entry


def expected(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradient in float64, from the logits as they are in ``dtype``."""
    logits, target, weights = cross_entropy_ranks.inputs(getattr(torch, dtype))
    logits = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    (losses * weights.flatten()).sum().backward()
    assert logits.grad is not None
    return losses.detach().view(target.shape).numpy(), logits.grad.numpy()


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", (1, 2, 4))
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(ranks: Ranks, count: int, dtype: str) -> None:
    losses, gradient = expected(dtype)
    found = ranks(count).run("cross_entropy_ranks:losses", count, dtype)
    for each in found:
        np.testing.assert_allclose(each["losses"], losses, rtol=1e-6, atol=1e-6)
    made = np.concatenate([each["gradient"] for each in found], axis=-1)
    np.testing.assert_allclose(made, gradient, rtol=0, atol=DTYPES[dtype] * np.abs(gradient).max())


@pytest.mark.distributed
def test_as_megatron_cores_own_plain_loss(ranks: Ranks) -> None:
    ours, theirs = (
        ranks(2).run("cross_entropy_ranks:losses", 2, "float32", megatrons) for megatrons in (False, True)
    )
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine["losses"], reference["losses"], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(mine["gradient"], reference["gradient"], rtol=0, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("count", (1, 2))
def test_a_part_of_minus_infinities_and_a_target_that_is_no_token(ranks: Ranks, count: int) -> None:
    for found in ranks(count).run("cross_entropy_ranks:unusual", count):
        assert np.isfinite(found["ours losses"]).all() and np.isfinite(found["ours gradient"]).all()
        np.testing.assert_allclose(found["ours losses"], found["theirs losses"], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(found["ours gradient"], found["theirs gradient"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", ("row_sums", "gradient"))
def test_torch_compiles_both_passes_whole(function: str) -> None:
    logits, target, weights = cross_entropy_ranks.inputs(torch.bfloat16)
    plain = getattr(cross_entropy, function)
    arguments: tuple[torch.Tensor, ...] = (logits, target - 7)  # some targets are another part's
    if function == "gradient":
        arguments = (*arguments, logits.float().amax(-1), weights.exp(), weights)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), plain(*arguments))


def test_models_with_a_fused_loss_take_it() -> None:
    from megatron.core.models.common.language_module import language_module

    with mock.patch.object(language_module, "fused_vocab_parallel_cross_entropy") as theirs:
        del theirs._ds_efficient_fused
        assert cross_entropy.fuse_cross_entropy() and not cross_entropy.fuse_cross_entropy()
        fused = language_module.fused_vocab_parallel_cross_entropy
        with mock.patch.object(cross_entropy, "token_losses") as ours:
            assert fused(1, 2, 3) is ours.return_value and ours.call_args.args == (1, 2, 3)
        assert not theirs.called
