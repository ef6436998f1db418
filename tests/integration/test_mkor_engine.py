"""MKOR through `ds_efficient.initialize`: ZeRO stages, micro-batches, resuming, overflows, other sections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mkor_ranks
import pytest
import torch
from mkor_ranks import LR, MKOR, STEPS, Net
from rank_pool import RankPool

from ds_efficient.mkor import optimizer as plain

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
SLOPE = {"enabled": True, "modules": ["fc1", "fc2"], "adapter": {"rank": 0}}
RMM = {"enabled": True, "modules": ["fc2"], "ratio": 0.5, "block_size": 0, "min_rows": 1}
MUON = {"type": "Muon", "params": {"lr": 1e-2, "torch_adam": True}}
WHOLE = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_scatter": False}
EXACT = ["zero 0", "zero 1", "zero 2", "zero 3", "one micro-batch", "factored", "transposed", "round robin"]
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    **{f"zero {stage}": ((stage,), {}) for stage in range(4)},
    "one micro-batch": ((0, "fp32", 1), {}),
    "factored": ((1,), {"mkor": {"form": "factored", "max_rank": 32}}),
    "transposed": ((2,), {"transposed": True}),
    "truncated": ((2,), {"mkor": {"form": "factored", "max_rank": 2}}),
    "left": ((1,), {"mkor": {"sides": "left"}}),
    "three vectors": ((2,), {"mkor": {"statistics_rank": 3}}),
    "half vectors": ((2,), {"mkor": {"comm_dtype": "fp16"}}),
    "half factors": ((1,), {"mkor": {"state_dtype": "fp16"}}),
    "bf16": ((1, "bf16"), {}),
    "slope": ((1,), {"slope": SLOPE}),
    "slope and rmm": ((3,), {"slope": SLOPE, "rmm": RMM}),
    "bf16 summed in fp32": ((2, "bf16"), {"data_types": {"grad_accum_dtype": "fp32"}}),
    "round robin": ((2,), {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}),
    "Muon 1": ((1,), {"optimizer": MUON}),
    "Muon 2": ((2,), {"optimizer": MUON}),
    "Muon 3": ((3,), {"optimizer": MUON, "zero_optimization": WHOLE}),
    "first order": ((1,), {"mkor": {"enabled": True, "gamma": 1.0}}),
}


@pytest.fixture(scope="module")
def runs(ranks: Ranks) -> dict[str, list[dict[str, Any]]]:
    """Return what each of two ranks found in every case."""
    found = ranks(2).run("mkor_ranks:train_all", CASES, timeout=180.0)
    return {name: [rank[name] for rank in found] for name in CASES}


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Any]:
    """Train on the whole batch in one process without an engine."""
    net = Net()
    rule = MKOR["stabilizer"]
    optimizer = plain.MKOR(
        net,
        torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.01),
        inversion_interval=MKOR["inversion_interval"],
        warmup_steps=MKOR["warmup_steps"],
        threshold=rule["threshold"],
        zeta=rule["zeta"],
        exclude=("head",),
    )
    losses = []
    for number in range(STEPS):
        loss = net(mkor_ranks.data(number))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "hits": optimizer.inverse_factors()["free"]["left"].hits}


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_at_every_stage_equal_one_process(
    runs: dict[str, list[dict[str, Any]]], by_hand: dict[str, Any], name: str
) -> None:
    one, two = runs[name]
    assert one["losses"] == two["losses"] == pytest.approx(by_hand["losses"], rel=2e-5)
    assert one["weights"] == two["weights"]
    assert by_hand["hits"] > 0 and one["metrics"]["stabilizer_hits"] > 0


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_and_each_owns_a_part(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    one, two = runs[name]
    assert one["weights"] == two["weights"] and one["metrics"] == two["metrics"]
    counts = [rank["counts"] for rank in (one, two)]
    assert [count["layers_owned"] for count in counts] in ([1, 2], [2, 1])
    assert all(count["layers_changed"] == count["layers_owned"] for count in counts)
    assert all(count["updates"] == 4 for count in counts)  # steps 0 and 1 of the warm-up, 2, 4
    held = [count["factor_bytes"] for count in counts]
    assert max(held) < 0.75 * sum(held)


def test_preconditioning_changes_the_result_at_every_stage(runs: dict[str, list[dict[str, Any]]]) -> None:
    """But for output vectors alone, which are too small here to turn a gradient."""
    plain = runs["first order"][0]
    assert plain["metrics"]["cosine"] == pytest.approx(1, abs=1e-7)
    for name in set(CASES) - {"first order", "left"}:
        found = runs[name][0]
        assert found["metrics"]["cosine"] < 1 - 1e-6, name
        assert found["losses"][-1] != pytest.approx(plain["losses"][-1], rel=1e-6), name


def test_the_global_norm_is_that_of_the_gradient(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Each layer keeps its norm, so that clipping acts alike before and after."""
    stages = [runs[f"zero {stage}"][0]["norm"] for stage in range(4)]
    assert stages == pytest.approx([stages[0]] * 4, rel=1e-5) and stages[0] > 0


def test_muon_gets_the_preconditioned_gradient_at_every_stage(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    """DeepSpeed orthogonalises at two places: in stage 3 inside of its step, in stages 1 and 2 before."""
    one, two, three = (runs[f"Muon {stage}"][0] for stage in (1, 2, 3))
    assert one["losses"] == pytest.approx(three["losses"], rel=1e-5)
    assert two["losses"] == pytest.approx(three["losses"], rel=1e-5)
    assert three["losses"][-1] != pytest.approx(runs["zero 3"][0]["losses"][-1], rel=1e-2)
    assert three["metrics"]["cosine"] < 0.999


def test_rounded_vectors_and_truncated_factors_stay_near(runs: dict[str, list[dict[str, Any]]]) -> None:
    exact = runs["zero 1"][0]
    assert runs["half vectors"][0]["losses"] == pytest.approx(exact["losses"], rel=1e-3)
    assert runs["half factors"][0]["losses"] == pytest.approx(exact["losses"], rel=1e-2)
    for name in ("bf16", "bf16 summed in fp32"):
        assert runs[name][0]["losses"] == pytest.approx(exact["losses"], rel=3e-2)
    assert runs["truncated"][0]["metrics"]["truncation_error"] > 1e-3
    assert exact["metrics"]["truncation_error"] == 0
    half, full = (runs[name][0]["counts"]["vector_bytes_sent"] for name in ("half vectors", "zero 2"))
    assert 0 < half < 0.6 * full


def test_vectors_of_an_update_are_those_without_a_bias_gradient(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    """Sent once an update: the input row of each layer that the other rank owns, and free's output vector."""
    sent = sum(rank["counts"]["vector_bytes_sent"] for rank in runs["zero 2"])
    headers = 4 * 8  # rows and scale of each vector
    assert sent == 4 * (4 * (12 + 20 + 16 + 16) + headers)


def test_several_vectors_are_sent_for_both_sides_of_every_layer(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    sent = sum(rank["counts"]["vector_bytes_sent"] for rank in runs["three vectors"])
    headers = 6 * 4 * (2 + 3)  # rows, scale and the sums of three vectors' signs
    assert sent == 4 * (4 * 3 * (12 + 20 + 16 + 20 + 16 + 16) + headers)
    exact = runs["zero 2"][0]["losses"]
    assert runs["three vectors"][0]["losses"][0] == pytest.approx(exact[0], rel=1e-6)
    assert runs["three vectors"][0]["losses"][-1] != pytest.approx(exact[-1], rel=1e-6)


def test_several_vectors_of_two_ranks_estimate_the_second_moments_of_the_whole_batch(ranks: Ranks) -> None:
    """Over 4 steps of 64 vectors, each entry within 5 sigma: all micro-batches and ranks have own signs."""
    found = {k: v for rank in ranks(2).run("mkor_ranks:second_moments", 64, 4) for k, v in rank.items()}
    net, rows = Net(), {}

    def keep(name: str, bias: bool, x: Any, y: Any) -> None:
        x = x.detach().double()
        rows[f"{name} right"] = torch.cat([x, torch.ones(len(x), 1)], 1) if bias else x
        y.register_hook(lambda gradient: rows.update({f"{name} left": len(gradient) * gradient.double()}))

    for name in ("fc1", "fc2", "free"):
        net.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: keep(name, name != "free", x[0], y)
        )
    net(mkor_ranks.data(0)).backward()
    assert found.keys() == rows.keys()
    for name, x in rows.items():
        exact, squares = x.T @ x / len(x), x.square()
        variance = torch.outer(exact.diagonal(), exact.diagonal()) + exact.square()
        variance -= 2 / len(x) ** 2 * squares.T @ squares
        error = (torch.tensor(found[name]).double() - exact).abs()
        assert (error <= 5 * (variance / 256).sqrt() + 1e-5 * exact.abs().max()).all(), name
        assert error.max() > 1e-3 * exact.abs().max(), name


def test_resuming_is_exact_to_the_bit_and_works_on_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    cases = {
        "zero 0": (0, {}),
        "zero 3": (3, {"mkor": {"form": "factored", "max_rank": 3}}),
        "three vectors": (2, {"mkor": {"statistics_rank": 3}}),
    }
    for found in ranks(2).run("mkor_ranks:save_and_resume", str(tmp_path), cases):
        for name, run in found.items():
            assert run["1"]["digest"] == run["4"]["digest"] == run["0"]["digest"], name
            assert run["4"]["losses"] == run["0"]["losses"][4:], name
    (losses,) = ranks(1).run("mkor_ranks:resume_elsewhere", str(tmp_path / "zero 0"), 4)
    unbroken = found["zero 0"]["0"]["losses"]
    assert losses == pytest.approx(unbroken[4:], rel=1e-5)


def test_the_hybrid_switches_once_everywhere_and_stays_so(ranks: Ranks, tmp_path: Path) -> None:
    one, two = ranks(2).run("mkor_ranks:hybrid", str(tmp_path))
    assert one["at"] == two["at"] and one["losses"] == two["losses"]
    switched = one["at"][-1]
    assert switched >= 3 and one["at"] == [-1.0] * (int(switched) - 1) + [switched] * (12 - int(switched))
    assert one["shards"] == [] and "the optimizer alone since step" in one["summary"]
    assert one["resumed"] == one["losses"][-2:] and one["resumed at"] == switched
    assert "has given its factors back" in one["refused"]


def test_the_loss_scale_leaves_no_trace(ranks: Ranks) -> None:
    assert ranks(1).run("mkor_ranks:scaled", 1.0) == ranks(1).run("mkor_ranks:scaled", 2.0**14)


def test_a_gradient_that_is_not_finite_leaves_factors_alone(ranks: Ranks) -> None:
    """Its own layer's; with a loss scale, where the whole step is skipped, all of them on all ranks."""
    pool = ranks(2)
    changed = sorted(name for rank in pool.run("mkor_ranks:poisoned", "fc2", None) for name in rank)
    assert changed == [f"{name} {side}" for name in ("fc1", "free") for side in ("left", "right")]
    assert pool.run("mkor_ranks:poisoned", "head", 1.0) == [[], []]


def test_layers_without_statistics_stop_the_run(ranks: Ranks) -> None:
    (message,) = ranks(1).run("mkor_ranks:idle")
    assert "mkor: 1 of 4 linear layers, 0 of this rank's 1 preconditioned" in message


@pytest.mark.parametrize("size", (1, 2))
def test_a_step_does_not_make_the_host_wait(ranks: Ranks, size: int) -> None:
    cases = [{"form": "factored", "max_rank": 4}, {"sides": "right", "statistics_rank": 2}]
    for found in ranks(size).run("mkor_ranks:steps_without_waiting", cases):
        for calls in found:
            assert calls[True] > calls[False] > 0
