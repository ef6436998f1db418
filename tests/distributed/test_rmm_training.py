"""RMM in training runs: one rank's gradients where the keys are one rank's, other noise on other data."""

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
SLOPE = {"enabled": True, "column_mask_interval": 2, "adapter": {"rank": 3, "start_step": 1}}
STEPS = 3
SHALLOW = ["--num-layers", "2", *MODEL[2:]]


def config(stage: int = 0, *, slope: bool = False, **rmm: Any) -> dict[str, Any]:
    section = {"enabled": True, "ratio": 0.25, "block_size": 32, "min_rows": 8, **rmm}
    beside = {"slope": SLOPE} if slope else {}
    return deepspeed_json(zero_optimization={"stage": stage}, gradient_clipping=0.5, rmm=section, **beside)


@pytest.fixture(scope="module")
def reference(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Return a run for a number of ranks and a config; each runs once."""
    known: dict[str, Outcome] = {}

    def run(size: int, arguments: str = "", **options: Any) -> Outcome:
        name = f"{size} {arguments} {options}"
        if name not in known:
            folder = tmp_path_factory.mktemp("run")
            known[name] = train(ranks, size, folder, arguments, config(**options), steps=STEPS, model=SHALLOW)
            assert set(known[name].status) == {0}
        return known[name]

    return run


@pytest.mark.parametrize(
    ("size", "model", "layout", "options"),
    [
        (1, "", RECOMPUTE, {}),
        (2, "", TENSOR, {"stage": 1}),
        (2, LLAMA, f"{PIPELINE} {RECOMPUTE}", {"stage": 1}),
        (2, "", TENSOR, {"slope": True}),
        (4, LLAMA, f"{TENSOR} {PIPELINE}", {"stage": 1, "variance_interval": 2}),
    ],
    ids=str,
)
def test_layouts_with_the_keys_of_one_rank_follow_it(
    ranks: Ranks,
    tmp_path: Path,
    reference: Callable[..., Outcome],
    size: int,
    model: str,
    layout: str,
    options: dict[str, Any],
) -> None:
    expected = reference(1, model, slope=options.get("slope", False))
    run = train(ranks, size, tmp_path, f"{model} {layout}", config(**options), steps=STEPS, model=SHALLOW)
    assert run.status == [0] * size
    relative = 0.0 if size == 1 else 1e-4  # recomputation is exact to the bit
    assert run.losses == pytest.approx(expected.losses, rel=relative, abs=0)
    assert run.norms == pytest.approx(expected.norms, rel=relative, abs=0)


def test_sequence_parallel_ranks_recompute_what_they_computed(reference: Callable[..., Outcome]) -> None:
    """Rows are projected by the rank that has them, so S is another than on one; see test_rmm_linears."""
    plain = reference(2, SEQUENCE, slope=True)
    recomputed = reference(2, f"{SEQUENCE} {RECOMPUTE}", stage=1, slope=True)
    alone = reference(1, slope=True)
    assert plain.losses == pytest.approx(recomputed.losses, rel=1e-4)
    assert plain.norms == pytest.approx(recomputed.norms, rel=1e-4)
    assert plain.losses[0] == pytest.approx(alone.losses[0], rel=1e-5)  # the forward pass is exact
    assert plain.norms[0] != pytest.approx(alone.norms[0], rel=1e-4)


def test_data_parallel_ranks_draw_different_sketches(reference: Callable[..., Outcome]) -> None:
    one, two = reference(1), reference(2)
    assert two.losses[0] == pytest.approx(one.losses[0], rel=1e-5)
    assert two.norms[0] != pytest.approx(one.norms[0], rel=1e-4)


def test_partitioned_weights_have_the_same_gradients(reference: Callable[..., Outcome]) -> None:
    run, expected = reference(2, stage=3), reference(2)
    assert run.losses == pytest.approx(expected.losses, rel=1e-4)
    assert run.norms == pytest.approx(expected.norms, rel=1e-4)


def test_a_run_says_what_was_projected(reference: Callable[..., Outcome]) -> None:
    (found,) = reference(1).of("evidence", "rmm")
    assert found["acted"] and found["layers_projected"] == found["layers"] == 6
    assert found["rows_kept"] * 4 == found["rows"] and found["saved_bytes"] == found["predicted_bytes"]
