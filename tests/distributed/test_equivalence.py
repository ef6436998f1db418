"""A run cut over ranks learns what one rank learns: same losses, same gradient norms, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool
from tiny_runs import MODEL, Outcome, deepspeed_json, train

# Sums over ranks are taken in another order, and AdamW's first steps amplify it: up to 2e-5 was seen. A norm
# left partial or counted twice differs by 6e-4 and more (the last two tests).
RELATIVE = 1e-4

PLAIN = ""
LLAMA = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --group-query-attention "
    "--num-query-groups 2 --untie-embeddings-and-output-weights --disable-bias-linear --qk-layernorm"
)
TENSOR = "--tensor-model-parallel-size 2"
SEQUENCE = f"{TENSOR} --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
Ranks = Callable[[int], RankPool]

pytestmark = pytest.mark.distributed


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return deepspeed_json(zero_optimization={"stage": stage}, gradient_clipping=0.5, **more)


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """Return the run on one rank with ZeRO 0, for a choice of model arguments; each runs once."""
    known: dict[str, Outcome] = {}

    def reference(model: str) -> Outcome:
        if model not in known:
            known[model] = train(ranks, 1, tmp_path_factory.mktemp("one"), model, zero(0))
            assert known[model].status == [0]
        return known[model]

    return reference


def assert_same_curve(found: Outcome, expected: Outcome, relative: float = RELATIVE) -> None:
    assert set(found.status) == {0}
    assert len(expected.losses) == 4
    assert found.losses == pytest.approx(expected.losses, rel=relative)
    assert found.norms == pytest.approx(expected.norms, rel=relative)


def test_the_reference_learns_and_clips(one_rank: Callable[[str], Outcome]) -> None:
    run = one_rank(PLAIN)
    assert run.losses[-1] < run.losses[0] - 0.1
    assert min(run.norms) > 0.5  # so clipping, and with it the norm, decides about every later loss


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", [PLAIN, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("cut", [PLAIN, TENSOR, SEQUENCE], ids=["data", "tensor", "sequence"])
def test_two_ranks(
    ranks: Ranks, tmp_path: Path, one_rank: Callable[[str], Outcome], stage: int, model: str, cut: str
) -> None:
    assert_same_curve(train(ranks, 2, tmp_path, f"{model} {cut}", zero(stage)), one_rank(model))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("model", [PLAIN, LLAMA], ids=["gpt2-tied", "llama-untied"])
def test_two_pipeline_stages(
    ranks: Ranks, tmp_path: Path, one_rank: Callable[[str], Outcome], stage: int, model: str
) -> None:
    assert_same_curve(train(ranks, 2, tmp_path, f"{model} {PIPELINE}", zero(stage)), one_rank(model))


@pytest.mark.parametrize(
    ("cut", "stage"),
    [
        (PLAIN, 3),
        (SEQUENCE, 1),
        (SEQUENCE, 2),
        (SEQUENCE, 3),
        (PIPELINE, 1),
        (f"{PIPELINE} {SEQUENCE}", 1),
        (f"{PIPELINE} {TENSOR}", 0),
    ],
    ids=["dp4-z3", "tp2sp-dp2-z1", "tp2sp-dp2-z2", "tp2sp-dp2-z3", "pp2-dp2", "pp2-tp2sp", "pp2-tp2-z0"],
)
def test_four_ranks(
    ranks: Ranks, tmp_path: Path, one_rank: Callable[[str], Outcome], cut: str, stage: int
) -> None:
    assert_same_curve(train(ranks, 4, tmp_path, cut, zero(stage)), one_rank(PLAIN))


@pytest.mark.parametrize("cut", [PLAIN, f"{PIPELINE} {SEQUENCE}"], ids=["dp4", "pp2-tp2sp"])
def test_the_number_of_micro_batches_does_not_matter(
    ranks: Ranks, tmp_path: Path, one_rank: Callable[[str], Outcome], cut: str
) -> None:
    assert_same_curve(train(ranks, 4, tmp_path, cut, zero(1), micro=1), one_rank(PLAIN))


@pytest.mark.parametrize(
    "recompute",
    [
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--recompute-granularity full --recompute-method block --recompute-num-layers 2",
        "--recompute-activations",
    ],
    ids=["uniform", "block", "selective"],
)
def test_recomputation_draws_the_same_dropout(ranks: Ranks, tmp_path: Path, recompute: str) -> None:
    dropout = f"{SEQUENCE} --attention-dropout 0.1 --hidden-dropout 0.1"
    kept = train(ranks, 2, tmp_path / "kept", dropout, zero(1))
    again = train(ranks, 2, tmp_path / "again", f"{dropout} {recompute}", zero(1))
    assert set(kept.status + again.status) == {0}
    assert again.losses == kept.losses
    without = train(ranks, 2, tmp_path / "without", SEQUENCE, zero(1))
    assert without.losses[0] != kept.losses[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("cut", [PLAIN, SEQUENCE], ids=["data", "sequence"])
def test_bf16_follows_fp32(
    ranks: Ranks, tmp_path: Path, one_rank: Callable[[str], Outcome], stage: int, cut: str
) -> None:
    run = train(ranks, 2, tmp_path, cut, zero(stage, bf16={"enabled": True}))
    assert run.losses == pytest.approx(one_rank(PLAIN).losses, rel=1e-2)
    assert run.norms == pytest.approx(one_rank(PLAIN).norms, rel=5e-2)


def test_partial_gradients_left_alone_would_be_noticed(
    ranks: Ranks, tmp_path: Path, one_rank: Callable[[str], Outcome]
) -> None:
    """Without the sum over tensor-parallel ranks the run goes on and is wrong: the comparison must see it."""
    results = ranks(2).run("broken_runs:without_partial_sums", _argv(tmp_path, SEQUENCE))
    assert set(results) == {0}
    wrong = train_records(tmp_path)
    assert wrong.norms[0] != pytest.approx(one_rank(PLAIN).norms[0], rel=1e-3)


def test_a_tied_copy_counted_twice_would_be_noticed(
    ranks: Ranks, tmp_path: Path, one_rank: Callable[[str], Outcome]
) -> None:
    results = ranks(2).run("broken_runs:with_tied_copy_counted", _argv(tmp_path, PIPELINE))
    assert set(results) == {0}
    wrong = train_records(tmp_path)
    assert wrong.norms[0] != pytest.approx(one_rank(PLAIN).norms[0], rel=1e-3)


def _argv(folder: Path, cut: str) -> list[str]:
    import json

    (folder / "ds.json").write_text(json.dumps(zero(1)))
    common = (
        f"--deepspeed_config {folder}/ds.json --train-iters 2 --global-batch-size 8 --micro-batch-size 2 "
        f"--log-interval 1 --eval-iters 0 --run-dir {folder} {cut}"
    )
    return [*MODEL, *common.split()]


def train_records(folder: Path) -> Outcome:
    from tiny_runs import read_records

    return Outcome([0], read_records(folder))
