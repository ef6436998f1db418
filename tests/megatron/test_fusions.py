"""The rotary embedding that stands in for megatron-core's: which way a call takes, and what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from rotary_cases import Case
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ds_efficient.errors import OpBuildError
from megatron_patches import fusions


@pytest.fixture
def embedding() -> Iterator[Any]:
    """megatron-core's function, replaced; `compiled` and `plain` note calls of what would run on a GPU."""
    from megatron.core.models.common.embeddings import rope_utils

    original = rope_utils._apply_rotary_pos_emb_bshd
    plain, compiled = mock.Mock(), mock.Mock()

    def run_plain(t: Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain() if t.is_cuda else original(t, *args, **kwargs)

    fusions._has_kernel.cache_clear()
    rope_utils._apply_rotary_pos_emb_bshd = run_plain
    try:
        with mock.patch.object(torch, "compile", return_value=compiled):
            assert not fusions.rotary_is_fused() and fusions.fuse_rotary_embedding()
        assert fusions.rotary_is_fused() and not fusions.fuse_rotary_embedding()
        fused = rope_utils._apply_rotary_pos_emb_bshd
        fused.original, fused.plain, fused.compiled = original, plain, compiled
        yield fused
    finally:
        rope_utils._apply_rotary_pos_emb_bshd = original
        fusions._has_kernel.cache_clear()


def on_gpu(**changes: Any) -> tuple[Tensor, Tensor]:
    """A query and angles that exist as shapes only."""
    sizes = {"width": 16, "heads": 3, "angles": (5, 1, 1, 8), "dtype": torch.float32, **changes}
    t = torch.empty(5, 2, sizes["heads"], sizes["width"], dtype=torch.bfloat16, device="cuda:0")
    return t, torch.empty(sizes["angles"], dtype=sizes["dtype"], device="cuda:0")


def test_on_a_gpu_the_usual_layout_takes_the_kernel(embedding: Any) -> None:
    with FakeTensorMode(), mock.patch.object(fusions, "_has_kernel", return_value=True):
        for angles in ((5, 1, 1, 8), (5, 2, 1, 8)):
            with mock.patch.object(fusions, "rotary_embedding", wraps=fusions.rotary_embedding) as kernel:
                t, freqs = on_gpu(angles=angles)
                assert embedding(t, freqs, rotary_interleaved=False, mscale=1.5).shape == t.shape
            assert kernel.call_args.kwargs == {"mscale": 1.5} and not embedding.compiled.called
        for changes in ({"angles": (5, 2, 3, 8)}, {"dtype": torch.bfloat16}, {"angles": (1, 1, 1, 8)}):
            t, freqs = on_gpu(**changes)
            assert embedding(t, freqs, mscale=1.5) is embedding.compiled.return_value
            assert embedding.compiled.call_args.args == (t, freqs, 1.5)
        embedding.compiled.reset_mock()
        t, freqs = on_gpu()
        assert embedding(t, freqs, rotary_interleaved=True) is embedding.plain.return_value
        assert not embedding.compiled.called


def test_without_a_kernel_torch_compiles_one_and_that_is_said_once(embedding: Any, caplog: Any) -> None:
    with (
        FakeTensorMode(),
        mock.patch.object(fusions.Library, "for_device", side_effect=OpBuildError("no nvcc")),
    ):
        for _ in range(2):
            t, freqs = on_gpu()
            assert embedding(t, freqs) is embedding.compiled.return_value
    assert caplog.text.count("no nvcc") == 1


def test_all_ways_give_the_same(embedding: Any) -> None:
    t, angles, _, mscale, _ = Case(torch.float64, 6, 2, 3, 10, 8, 9, mscale=1.25, largest=9.0).inputs()
    index = torch.tensor([[0, 1, 3, 4, 7, 8], [1, 2, 3, 5, 6, 8]])
    t, gathered = t.contiguous(), angles[index.T, 0]
    expected = embedding.original(t, gathered.double(), mscale=mscale)
    for found in (
        fusions.rotate(t, gathered.double(), mscale),
        embedding(t, gathered.double(), mscale=mscale),
        embedding(t, fusions.at_kept(angles, index), mscale=mscale),
        embedding(t, fusions.at_kept(angles.expand(-1, 2, -1, -1), index), mscale=mscale),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    turned = embedding.original(t.float(), gathered, rotary_interleaved=True)
    for noted in (angles, angles.expand(-1, 2, -1, -1)):
        found = embedding(t.float(), fusions.at_kept(noted, index), rotary_interleaved=True)
        assert torch.equal(found, turned)


def test_only_angles_that_the_kernel_takes_are_noted_and_never_those_that_others_share() -> None:
    angles, index = torch.ones(9, 1, 1, 8), torch.tensor([[1, 2], [0, 8]])
    noted = fusions.at_kept(angles, index)
    assert noted is not None and noted is not angles and noted.data_ptr() == angles.data_ptr()
    assert not hasattr(angles, "_ds_efficient_kept")
    for other in (
        angles[:, 0],
        angles.double(),
        angles.expand(-1, 3, -1, -1),
        angles.expand(-1, 1, 2, -1),
        angles.clone().requires_grad_(),
    ):
        assert fusions.at_kept(other, index) is None
