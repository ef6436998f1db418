"""L-GreCo through `ds_efficient.initialize`: checkpoints, other numbers of ranks, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lgreco_ranks as ranks
import numpy as np
import pytest
from rank_pool import RankPool

import ds_efficient
from ds_efficient.core.inventory import ModelShape

pytestmark = pytest.mark.distributed

SAVED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "stage 0": (0, "fp32", {"lgreco": ranks.POWERSGD}),
    "stage 1": (1, "bf16", {"lgreco": {**ranks.MIXED, "accordion": {"enabled": True, "low": 8, "high": 4}}}),
    "stage 2": (2, "fp32", {"lgreco": ranks.QSGD}),
}
RESUMED = {"stage 0": (4,), "stage 1": (2, 4), "stage 2": (2,)}
QUANTISED_BY_DEEPSPEED = {"zero_quantized_gradients": True}
REFUSED: list[tuple[tuple[int, str, dict[str, Any]], str]] = [
    ((2, "fp32", {"lgreco": ranks.TOPK}), 'compressor "topk" with zero_optimization.stage 2'),
    ((3, "fp32", {"lgreco": ranks.POWERSGD}), 'compressor "powersgd" with zero_optimization.stage 3'),
    (
        (1, "fp32", {"lgreco": ranks.QSGD, "zero_optimization": {"contiguous_gradients": False}}),
        "set it to true",
    ),
    ((1, "fp32", {"lgreco": ranks.QSGD, "gradient_allreduce_op": "sum"}), 'gradient_allreduce_op "sum"'),
    (
        (3, "fp32", {"lgreco": ranks.QSGD, "zero_optimization": QUANTISED_BY_DEEPSPEED}),
        "zero_quantized_gradients",
    ),
    ((0, "fp32", {"lgreco": {**ranks.QSGD, "backend": "nccl"}}), 'lgreco.backend "nccl": the data-parallel'),
    (
        (0, "fp32", {"lgreco": {"compressor": "powersgd", "default": 64, "range": [64, 64]}}),
        "UserError: lgreco.default 64 with compressor powersgd: no gradient would become smaller",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[Any]:
    """Of both ranks: the saved and resumed runs, and the refusals."""
    saved = [(*case, RESUMED[name]) for name, case in SAVED.items()]
    wrong = [case for case, _ in REFUSED]
    return RankPool(2).run("lgreco_ranks:saved_and_refused", str(folder), saved, wrong, timeout=240)


@pytest.mark.parametrize("case", SAVED)
def test_a_resumed_run_goes_on_bit_by_bit(results: list[Any], case: str) -> None:
    number = list(SAVED).index(case)
    for runs, _ in results:
        unbroken = runs[number]["unbroken"]
        assert unbroken["plans"] == 2
        for first in RESUMED[case]:  # before and after the first plan
            resumed = runs[number][str(first)]
            assert resumed["losses"] == unbroken["losses"][first:]
            for key in ("digest", "plans", "plan", "error"):
                assert resumed[key] == unbroken[key], key
            assert resumed["errors"].keys() == unbroken["errors"].keys()
            for name, error in unbroken["errors"].items():
                assert np.array_equal(resumed["errors"][name], error)


def test_another_number_of_ranks_keeps_what_the_errors_contribute(results: list[Any], folder: Path) -> None:
    saved = ranks.saved_parts(str(folder / "0"))
    assert len(saved) == 2 and saved[0]["errors"] and saved[0]["sums"]
    found = RankPool(4).run("lgreco_ranks:load_elsewhere", str(folder / "0"), SAVED["stage 0"][2])
    for part in ("errors", "sums"):
        for name in saved[0][part]:
            before = sum(one[part][name].double().numpy() for one in saved) / len(saved)
            after = sum(one[part][name].astype(np.float64) for one in found) / len(found)
            np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)
            assert not np.allclose(saved[0][part][name].numpy(), saved[1][part][name].numpy())
    assert len({one["digest"] for one in found}) == 1


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_cannot_be_right_is_refused_by_name(results: list[Any], number: int) -> None:
    for _, messages in results:
        assert REFUSED[number][1] in messages[number]


def test_one_rank_has_nothing_to_compress() -> None:
    (message,) = RankPool(1).run("lgreco_ranks:refused", [(1, "fp32", {"lgreco": ranks.QSGD})])[0]
    assert "lgreco: this run has one data-parallel rank" in message
    assert "lgreco.enabled" in message


SHAPE = ModelShape(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=512, seq_length=64)


def test_the_plan_says_what_is_sent_and_held() -> None:
    raw = {"train_micro_batch_size_per_gpu": 1, "lgreco": {"enabled": True, "default": 4, "range": [2, 8]}}
    plan = ds_efficient.build_plan(raw, SHAPE, world_size=4)
    actions = {action.module: action for action in plan.actions["lgreco"]}
    chosen = [action for action in actions.values() if not action.skipped]
    assert len(chosen) >= 8 and all(action.action.startswith("rank 4 at first") for action in chosen)
    weight = next(action for name, action in actions.items() if name.endswith("linear_fc1"))
    assert weight.buffer_bytes == 4 * (2 * 64 * 256 + 4 * 64 + 64 * 256)  # errors, Q, sums for a plan
    numbers = plan.outlooks["lgreco"].numbers
    assert 2 < numbers["ratio"] < 20
    assert numbers["raw_bytes"] == pytest.approx(2 * 3 / 4 * 4 * plan.inventory.total_parameters)
    cut = ds_efficient.build_plan(raw, SHAPE, world_size=4, tensor=2)
    reasons = {action.module: action.reason for action in cut.actions["lgreco"]}
    assert reasons["embedding.position_embeddings"] == "all tensor-parallel ranks hold it"
    staged = ds_efficient.build_plan(raw, SHAPE, world_size=4, pipeline=2)
    reasons = {action.module: action.reason for action in staged.actions["lgreco"]}
    assert reasons["embedding.word_embeddings"] == "two pipeline stages hold it"
    alone = ds_efficient.build_plan(raw, SHAPE, world_size=1)
    assert "nothing to reduce" in alone.outlooks["lgreco"].summary


def test_the_plan_refuses_error_feedback_with_partitioned_gradients() -> None:
    raw = {
        "train_micro_batch_size_per_gpu": 1,
        "lgreco": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }
    with pytest.raises(ds_efficient.UserError, match=r"stage 2.*Use stage 1"):
        ds_efficient.build_plan(raw, SHAPE, world_size=4)
    quantised = {**raw, "lgreco": {"enabled": True, "compressor": "qsgd"}}
    assert ds_efficient.build_plan(quantised, SHAPE, world_size=4).actions["lgreco"]
