"""megatron-core's layers that drop tokens: positions, masks, tensor and sequence parallel, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from random_ltd_ranks import CASES, KEPT, LENGTH, SAMPLES
from rank_pool import RankPool

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
Results = dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks) -> Results:
    return ranks(1).run("random_ltd_ranks:layers", 1, False)[0]


@pytest.mark.parametrize("case", CASES)
def test_kept_tokens_see_what_the_whole_layer_shows_them(one_rank: Results, case: str) -> None:
    """Rotary angles, documents and biases belong to the original positions; gradients too."""
    found = one_rank[case]
    np.testing.assert_allclose(found["y"], found["expected y"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["dx"], found["expected dx"], rtol=1e-5, atol=1e-5)


def test_dropped_tokens_pass_bit_for_bit(one_rank: Results) -> None:
    for found in one_rank.values():
        kept = np.zeros((SAMPLES, LENGTH), dtype=bool)
        np.put_along_axis(kept, found["index"], True, axis=1)
        assert np.array_equal(found["y"][~kept.T], found["expected y"][~kept.T])
        assert (found["y"][kept.T] != found["y"][kept.T][:1]).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-6), ("bfloat16", 0.03)])
def test_fused_rotary_embedding_needs_no_gathered_angles(ranks: Ranks, dtype: str, tolerance: float) -> None:
    """Values and gradients, of all layouts of angles; the fused way rounds once, the other several times."""
    found = ranks(1).run("rotary_ranks:rotary_ways", dtype)[0]
    for name, made in found.items():
        expected = found["interleaved, gathered" if name.startswith("interleaved") else "gathered"]
        for part, value in made.items():
            largest = np.abs(expected[part]).max()
            np.testing.assert_allclose(value, expected[part], rtol=0, atol=tolerance * largest, err_msg=name)
    for part, value in found["fused"].items():
        assert np.array_equal(value, found["fused, recomputed"][part])
    other = found["interleaved, gathered"]["y"] - found["gathered"]["y"]
    assert np.abs(other).max() > 0.1 * np.abs(found["gathered"]["y"]).max()


def test_tensor_parallel_ranks_drop_the_same_tokens(ranks: Ranks, one_rank: Results) -> None:
    for run in ranks(2).run("random_ltd_ranks:layers", 2, False):
        for case, found in run.items():
            assert np.array_equal(found["index"], one_rank[case]["index"])
            np.testing.assert_allclose(found["y"], one_rank[case]["y"], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found["dx"], one_rank[case]["dx"], rtol=1e-5, atol=1e-5)


def test_sequence_parallel_parts_keep_equal_numbers_and_see_each_other(ranks: Ranks) -> None:
    """Against one rank that chooses the same tokens from the two halves of its sequence."""
    expected = ranks(1).run("random_ltd_ranks:layers", 1, False, 2)[0]
    for run in ranks(2).run("random_ltd_ranks:layers", 2, True):
        for case, found in run.items():
            index = found["index"]
            assert np.array_equal(index, expected[case]["index"])
            assert (np.diff(index, axis=1) > 0).all()
            assert ((index < LENGTH // 2).sum(1) == KEPT // 2).all()
            np.testing.assert_allclose(found["y"], expected[case]["y"], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found["dx"], expected[case]["dx"], rtol=1e-5, atol=1e-5)


def test_checkpoints_have_megatron_cores_names(ranks: Ranks) -> None:
    names = ranks(1).run("random_ltd_ranks:checkpoint_names")[0]
    for kind in ("state_dict", "sharded_state_dict"):
        assert names[f"{kind} True"] == names[f"{kind} False"]


def test_all_tokens_where_nothing_may_be_dropped(ranks: Ranks) -> None:
    found = ranks(1).run("random_ltd_ranks:bypasses")[0]
    assert all(found.values()), found


def test_what_needs_all_tokens_is_refused_by_name(ranks: Ranks) -> None:
    found: dict[str, Any] = ranks(1).run("random_ltd_ranks:refusals")[0]
    parts = {
        "context_parallel_size": "--context-parallel-size 2",
        "apply_rope_fusion": "--no-rope-fusion",
        "fused_single_qkv_rope": "fused_single_qkv_rope",
        "multi_latent_attention": "multi_latent_attention",
        "window_size": "window_size",
        "overlap_moe_expert_parallel_comm": "overlap_moe",
        "enable_cuda_graph": "CUDA graphs",
        "packed_seq_params": "--reset-attention-mask",
        "context": "cross attention",
    }
    assert set(found) == set(parts)
    for name, part in parts.items():
        assert part in found[name] and "random_ltd.enabled to false" in found[name]
