"""MKOR in training runs: every layout follows one rank, with exact factors; shards' own factors do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool
from tiny_runs import MODEL, Outcome, deepspeed_json, train

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
TENSOR = "--tensor-model-parallel-size 2"
SEQUENCE = f"{TENSOR} --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
LLAMA = "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
STEPS = 3  # both updates, and a step between them
SHALLOW = ["--num-layers", "2", *MODEL[2:]]


def config(stage: int = 0, **mkor: Any) -> dict[str, Any]:
    section = {
        "enabled": True,
        "inversion_interval": 2,
        "stabilizer": {"threshold": 1.04, "zeta": 0.5},
        **mkor,
    }
    return deepspeed_json(zero_optimization={"stage": stage}, gradient_clipping=0.5, mkor=section)


@pytest.fixture(scope="module")
def reference(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Return one rank's run of a model; each runs once."""
    known: dict[tuple[str, int], Outcome] = {}

    def run(model: str, vectors: int = 1) -> Outcome:
        if (model, vectors) not in known:
            folder = tmp_path_factory.mktemp("run")
            settings = config(statistics_rank=vectors)
            known[model, vectors] = train(ranks, 1, folder, model, settings, steps=STEPS, model=SHALLOW)
        return known[model, vectors]

    return run


@pytest.mark.parametrize(
    ("size", "model", "layout", "stage", "vectors"),
    [
        (2, "", f"{SEQUENCE} {RECOMPUTE}", 1, 1),
        (2, "", PIPELINE, 0, 1),
        (4, LLAMA, SEQUENCE, 3, 1),
        (4, "", f"{TENSOR} {PIPELINE} {RECOMPUTE}", 0, 3),  # all ranks of one data-parallel rank draw alike
    ],
    ids=str,
)
def test_every_layout_follows_one_rank(
    ranks: Ranks,
    tmp_path: Path,
    reference: Callable[..., Outcome],
    size: int,
    model: str,
    layout: str,
    stage: int,
    vectors: int,
) -> None:
    expected = reference(model, vectors)
    settings = config(stage, statistics_rank=vectors)
    run = train(ranks, size, tmp_path, f"{model} {layout}", settings, steps=STEPS, model=SHALLOW)
    assert run.status == [0] * size
    assert run.losses == pytest.approx(expected.losses, rel=1e-4)
    assert run.norms == pytest.approx(expected.norms, rel=1e-4)
    metrics = [one.of("train", "mkor")[-1] for one in (run, expected)]
    assert metrics[0]["layers_changed"] == metrics[1]["layers_changed"] == 8
    assert metrics[0]["cosine"] == pytest.approx(metrics[1]["cosine"], rel=1e-4)
    assert metrics[0]["stabilizer_hits"] == metrics[1]["stabilizer_hits"] > 0


def test_sums_of_several_vectors_do_not_depend_on_who_has_the_rows(ranks: Ranks, tmp_path: Path) -> None:
    """With equal signs; rows of sequence-parallel and data-parallel ranks are parts of one batch."""
    one, two = (
        train(
            ranks, size, tmp_path / str(size), layout, config(1, statistics_rank=2), steps=STEPS,
            model=SHALLOW, script="mkor_ranks:run_script_with_equal_signs",
        )
        for size, layout in ((1, ""), (4, SEQUENCE))
    )  # fmt: skip
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    assert two.norms == pytest.approx(one.norms, rel=1e-4)
    metrics = [run.of("train", "mkor")[-1] for run in (one, two)]
    assert metrics[1]["cosine"] == pytest.approx(metrics[0]["cosine"], rel=1e-4)
    assert 0.1 < metrics[0]["cosine"] < 0.999


def test_factors_of_each_shard_are_another_method(
    ranks: Ranks, tmp_path: Path, reference: Callable[..., Outcome]
) -> None:
    settings = config(1, tensor_parallel="block")
    run = train(ranks, 2, tmp_path, SEQUENCE, settings, steps=STEPS, model=SHALLOW)
    expected = reference("")
    assert run.losses[:2] == pytest.approx(expected.losses[:2], rel=1e-3)
    assert run.losses[0] == pytest.approx(expected.losses[0], rel=1e-5)
    assert run.losses[2] != pytest.approx(expected.losses[2], rel=1e-6)
    assert run.of("train", "mkor")[-1]["layers_changed"] == 16


def test_the_hybrid_switches_on_all_stages_at_once(ranks: Ranks, tmp_path: Path) -> None:
    hybrid = {"enabled": True, "min_steps": 1, "ema": 1, "beta": 0.99}
    run = train(ranks, 2, tmp_path, PIPELINE, config(1, hybrid=hybrid), steps=4, model=SHALLOW)
    assert run.status == [0, 0]
    switched = [metrics["switched_at"] for metrics in run.of("train", "mkor")]
    assert switched[0] == -1 and switched[-1] >= 1
