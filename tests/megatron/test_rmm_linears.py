"""RMM in megatron-core's linear layers: exact but for the weight gradient, which is that of its keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rank_pool import RankPool

Ranks = Callable[[int], RankPool]
LAYOUTS = pytest.mark.parametrize(
    ("tensor", "sequence"), [(1, False), (2, False), (2, True)], ids=["one", "tensor", "sequence"]
)

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("kind", ["column", "row"])
@LAYOUTS
def test_layers_are_exact_but_for_the_weight_gradient_of_their_keys(
    ranks: Ranks, kind: str, tensor: int, sequence: bool
) -> None:
    """Under sequence parallelism S is block-diagonal over the ranks' rows, each block of its own key."""
    for found in ranks(tensor).run("rmm_ranks:compare", kind, tensor, sequence):
        assert found.pop("rows kept") == 8
        assert found.pop("weight gradient") < 1e-5  # S has the accuracy of fp32 normals
        for name in ("output", "recomputed output", "recomputed weight gradient"):
            assert found.pop(name) == 0, name
        assert max(found.values()) < 1e-12, found


@LAYOUTS
def test_the_projection_of_the_local_rows_alone_is_saved(ranks: Ranks, tensor: int, sequence: bool) -> None:
    for kept in ranks(tensor).run("rmm_ranks:saved", tensor, sequence):
        assert [shape for shape, parameter in kept if not parameter] == [(8, 16)]
        assert [shape for shape, parameter in kept if parameter] == [(24 // tensor, 16)]


def test_fused_accumulation_is_refused_by_name(ranks: Ranks) -> None:
    (message,) = ranks(1).run("rmm_ranks:refusal")
    assert message.startswith("rmm: ") and "gradient_accumulation_fusion=True" in message


def test_checkpoints_have_the_names_of_the_exact_layer(ranks: Ranks) -> None:
    assert ranks(2).run("rmm_ranks:sharded") == [["bias", "weight"]] * 2
