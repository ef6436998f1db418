"""L-GreCo in the training script: the shipped file, tensor and pipeline parallelism."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool
from tiny_runs import Outcome, deepspeed_json, train

import ds_efficient
from ds_efficient.core.inventory import ModelShape

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs" / "lgreco.json"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"


def lgreco_of(run: Outcome) -> list[dict[str, float]]:
    return run.of("train", "lgreco")


def test_the_shipped_file_trains_on_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    config = json.loads(SHIPPED.read_text())
    wide = "--hidden-size 128 --num-layers 2 --lr 1e-3"  # rank 32 makes larger matrices smaller only
    run = train(ranks, 2, tmp_path, wide, {key: value for key, value in config.items() if key != "$schema"})
    assert run.status == [0, 0]
    assert run.losses[-1] < run.losses[0]
    last = lgreco_of(run)[-1]
    shape = ModelShape(num_layers=2, hidden_size=128, num_attention_heads=4, vocab_size=128, seq_length=16)
    config["train_micro_batch_size_per_gpu"] = 2
    expected = ds_efficient.build_plan(config, shape, world_size=2).outlooks["lgreco"].numbers
    assert (last["bytes"], last["raw_bytes"]) == (expected["bytes"], expected["raw_bytes"])
    assert last["ratio"] > 1.2 and last["bytes"] > 0
    assert last["planned_bytes"] == last["default_bytes"]  # the first plan comes after 1000 steps


SECTION: dict[str, Any] = {"enabled": True, "compressor": "qsgd", "default": 8, "interval": 2}
BASE = deepspeed_json(zero_optimization={"stage": 1}, gradient_clipping=0.5)
EMBEDDING = "bits/embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def plain(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Return the same training without compression, on two ranks: layouts differ in rounding only."""
    return train(ranks, 2, tmp_path_factory.mktemp("plain"), "", BASE)


def predicted(**layout: Any) -> Mapping[str, float]:
    """Return what `build_plan` says of the tiny model."""
    shape = ModelShape(num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=128, seq_length=16)
    config = {**BASE, "train_micro_batch_size_per_gpu": 2, "lgreco": SECTION}
    return ds_efficient.build_plan(config, shape, world_size=4, **layout).outlooks["lgreco"].numbers


@pytest.mark.parametrize("layout", [TENSOR, PIPELINE])
def test_shards_and_stages_are_compressed_each_by_itself(
    ranks: Ranks, tmp_path: Path, layout: str, plain: Outcome
) -> None:
    found = train(ranks, 4, tmp_path, layout, {**BASE, "lgreco": SECTION})
    assert set(found.status) == set(plain.status) == {0}
    # 8 bits lose a few thousandths of a gradient; a sum over wrong ranks would lose all of it.
    assert found.losses == pytest.approx(plain.losses, rel=2e-3)
    assert found.norms == pytest.approx(plain.norms, rel=2e-2)
    assert found.losses != plain.losses
    rows = lgreco_of(found)
    assert all(one["ratio"] > 1.5 for one in rows)
    assert rows[-1]["plans"] == 2
    if layout == TENSOR:  # the plan is exact where all ranks hold as much
        expected = predicted(tensor=2, sequence_parallel=True)
        assert (rows[0]["bytes"], rows[0]["raw_bytes"]) == (expected["bytes"], expected["raw_bytes"])
    else:  # rank 0 has the embeddings, the last stage the last norm
        assert rows[0]["bytes"] == pytest.approx(predicted(pipeline=2)["bytes"], rel=0.05)
    # Cut by tensor parallelism, each shard is a matrix of its own; shared by two stages, copies stay equal.
    assert (EMBEDDING in rows[-1]) == (layout == TENSOR)
