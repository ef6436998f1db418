"""SLoPe in training runs: every layout is the one-rank run, resuming is exact, pruned weights stay away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool
from tiny_runs import Outcome, deepspeed_json, train

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
GPT2 = ""
LLAMA = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --group-query-attention "
    "--num-query-groups 2 --untie-embeddings-and-output-weights --disable-bias-linear"
)
TENSOR = "--tensor-model-parallel-size 2"
SEQUENCE = f"{TENSOR} --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
STEPS = 6


def config(stage: int = 0, *, slope: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    section = {
        "enabled": True,
        "column_mask_interval": 2,
        "patterns": [{"layers": "2-3", "pattern": "1:4"}],
        "adapter": {"rank": 3, "start_step": 3},
        **(slope or {}),
    }
    return deepspeed_json(zero_optimization={"stage": stage}, gradient_clipping=0.5, slope=section, **more)


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """Return the run on one rank without ZeRO for a choice of model arguments; each runs once."""
    known: dict[str, Outcome] = {}

    def reference(model: str) -> Outcome:
        if model not in known:
            known[model] = train(ranks, 1, tmp_path_factory.mktemp("one"), model, config(), steps=STEPS)
        return known[model]

    return reference


@pytest.mark.parametrize(
    ("model", "size", "layout", "stage"),
    [
        (GPT2, 2, "", 1),
        (GPT2, 2, "", 3),
        (GPT2, 2, TENSOR, 1),
        (GPT2, 2, SEQUENCE, 0),
        (GPT2, 2, PIPELINE, 1),
        (LLAMA, 2, "", 2),
        (LLAMA, 2, SEQUENCE, 3),
        (LLAMA, 4, TENSOR, 2),
        (LLAMA, 4, f"{SEQUENCE} {PIPELINE}", 1),
    ],
)
def test_every_layout_follows_one_rank(
    ranks: Ranks,
    tmp_path: Path,
    one_rank: Callable[[str], Outcome],
    model: str,
    size: int,
    layout: str,
    stage: int,
) -> None:
    run = train(ranks, size, tmp_path, f"{model} {layout}", config(stage), steps=STEPS)
    expected = one_rank(model)
    assert run.status == [0] * size
    assert run.losses == pytest.approx(expected.losses, rel=1e-4)
    assert run.norms == pytest.approx(expected.norms, rel=1e-4)
