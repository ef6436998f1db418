"""L-GreCo on real ranks: the same means everywhere, DeepSpeed's place of reduction at every stage."""

from __future__ import annotations

import lgreco_ranks as ranks
import pytest
import torch
from rank_pool import RankPool

from ds_efficient.core.keys import Key
from ds_efficient.lgreco import QSGD, PowerSGD, Raw, Reducer, SimulatedGroup, TopK, reduce_together

pytestmark = pytest.mark.distributed

SHAPES = {"wide": (33, 65), "bias": (65,), "square": (64, 64)}
COMPRESSORS = [QSGD(4), TopK(0.05), PowerSGD(3), Raw()]


def simulated(compressor, size):
    """Return what `lgreco_ranks.reduce_alone` does, of ranks in one process."""
    group = SimulatedGroup(size)
    reducers = [
        Reducer(default=compressor, transport=transport, key=Key(ranks.SEED))
        for transport in group.transports
    ]
    found = [[] for _ in reducers]
    for number in range(3):
        named = [ranks.gradients_of(rank, number, SHAPES) for rank in range(size)]
        reduce_together(reducers, named)
        for reducer, one, steps in zip(reducers, named, found, strict=True):
            reducer.commit()
            errors = {f"error of {name}": error.clone() for name, error in reducer.errors().items()}
            sent = torch.tensor(reducer.transport.sent.gradients)
            steps.append({**one, **errors, "bytes": sent})
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_gloo_and_simulated_ranks_agree_and_all_ranks_hold_the_same_bits(size):
    found = RankPool(size).run("lgreco_ranks:reduce_alone", COMPRESSORS, SHAPES)
    for number, compressor in enumerate(COMPRESSORS):
        expected = simulated(compressor, size)
        # more than two summands are added in gloo's order; quantised and largest entries in that of the ranks
        exact = size == 2 or not isinstance(compressor, PowerSGD | Raw)
        for rank, steps in enumerate(expected):
            for step, want in enumerate(steps):
                have = {name: torch.from_numpy(value) for name, value in found[rank][number][step].items()}
                assert have.keys() == want.keys()
                for name in SHAPES:
                    assert have[name].numpy().tobytes() == found[0][number][step][name].tobytes()
                for name, value in want.items():
                    if exact and (name != "bias" or size == 2):
                        assert torch.equal(have[name], value), (compressor, rank, step, name)
                    else:
                        torch.testing.assert_close(have[name], value, atol=1e-4, rtol=1e-4)


def test_a_rank_that_leaves_stops_the_other_with_the_reason():
    seen, left = RankPool(2).run("lgreco_ranks:leave")
    assert left == "left"
    assert seen.startswith("lost: ")


# ZeRO stage, precision, micro-batches of a step, keys of zero_optimization
STAND_INS = [
    (0, "bf16", 1, {}),
    (1, "fp32", 2, {}),
    (1, "bf16", 2, {"overlap_comm": True}),
    (2, "fp32", 2, {}),
    (3, "fp32", 2, {}),
]
WARM_UP = 2
TRAINED = [
    (0, "fp32", {"lgreco": ranks.POWERSGD}),
    (0, "fp32", {"lgreco": ranks.POWERSGD, "zero_optimization": {"overlap_comm": True}}),
    (1, "fp32", {"lgreco": {**ranks.POWERSGD, "start_step": WARM_UP}}),
    (1, "bf16 summed in fp32", {"lgreco": {**ranks.MIXED, "objective": "time"}}),
    (2, "bf16", {"lgreco": ranks.QSGD}),
    (3, "fp32", {"lgreco": ranks.QSGD}),
    (1, "fp32", {"lgreco": ranks.TOPK, "slope": ranks.SLOPE}),  # of the compact weights
]


@pytest.fixture(scope="module")
def results():
    """Of both ranks: what was trained, and what was trained with a stand-in."""
    return RankPool(2).run("lgreco_ranks:everything", TRAINED, STAND_INS, timeout=200)


def test_a_lossless_stand_in_trains_as_deepspeed_does_bit_by_bit(results):
    for _, replaced in results:
        for (stage, precision, micro_batches, _), found in zip(STAND_INS, replaced, strict=True):
            assert found["plain"] == found["replaced"], (stage, precision)
            assert len(found["names"]) == 6  # weights and biases of three layers
            each_step = 6 * (micro_batches if stage >= 2 else 1)
            assert found["calls"] == 4 * each_step


def test_training_at_every_stage_compresses_and_keeps_all_ranks_equal(results):
    (first, replaced), (second, _) = results
    for case, one, other in zip(TRAINED, first, second, strict=True):
        assert one["digest"] == other["digest"], case
        assert one["losses"][-1] < one["losses"][0], case
        counts, last = one["counts"], one["metrics"][-1]
        assert 1 <= counts["matrices_compressed"] <= counts["matrices"] == 2
        assert counts["plans"] == 2  # after steps 3 and 6, or 2 and 5
        assert counts["bytes"] < 0.9 * counts["raw_bytes"], case
        assert last["error"] <= last["budget"] * (1 + 1e-9)
        assert last["planned_bytes"] <= last["default_bytes"] or "objective" in case[2]["lgreco"]
        assert {"bits/fc1.weight", "bits/fc2.weight"} <= last.keys()
    # Overlapped with the backward pass or not: the same bits.
    assert first[0]["losses"] == first[1]["losses"]
    assert first[0]["digest"] == first[1]["digest"]
    # The warm-up is DeepSpeed's own reduction: the loss of a step shows the updates before it.
    warmed, plain = first[2], replaced[1]["plain"][0]
    assert warmed["losses"][: WARM_UP + 1] == plain[: WARM_UP + 1]
    assert warmed["losses"][WARM_UP + 1] != plain[WARM_UP + 1]
    assert all(metrics["ratio"] == 1 for metrics in warmed["metrics"][:WARM_UP])
    assert all(metrics["ratio"] > 1.2 for metrics in warmed["metrics"][WARM_UP:])


def test_a_step_that_overflowed_leaves_errors_and_weights_as_they_were():
    for found in RankPool(2).run("lgreco_ranks:skipped", [0, 1]):
        assert found == [{"taken": False, "same": True, "equal": True}] * 2
