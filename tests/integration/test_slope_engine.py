"""SLoPe through `ds_efficient.initialize` on a plain network: ZeRO stages, adapters, resuming, evidence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slope_ranks
import torch
from rank_pool import RankPool
from saved_runs import Case, differences
from slope_ranks import CLIP, DECAY, INTERVAL, LAYERS, LR, MICRO_BATCHES, START, STEPS

from ds_efficient.core import deepspeed_compat as compat

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
Runs = dict[tuple[int, str], dict[str, Any]]
FP32 = [(stage, "fp32") for stage in range(4)]
BF16 = [(stage, "bf16") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def runs(ranks: Ranks) -> Runs:
    """Return a run on two ranks for every stage and precision."""
    return ranks(2).run("slope_ranks:train_all", FP32 + BF16)[0]


def column_mask(dense: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return by loops what the column pass of 2:4 leaves; of equal magnitudes the lower output stays."""
    left = torch.zeros_like(kept)
    for column in range(kept.shape[1]):
        for first in range(0, kept.shape[0], 4):
            rows = [row for row in range(first, first + 4) if kept[row, column]]
            for row in sorted(rows, key=lambda row: (-abs(dense[row, column].item()), row))[:2]:
                left[row, column] = True
    return left


class Dense:
    """The network as dense masked matrices, trained by torch's own AdamW."""

    def __init__(self, start: dict[str, np.ndarray]) -> None:
        def leaf(name: str) -> torch.Tensor:
            return torch.from_numpy(start[name].copy()).requires_grad_()

        self.kept = {name: torch.from_numpy(start[f"{name}.kept"]) for name in LAYERS}
        self.weights = {name: leaf(f"{name}.dense") for name in LAYERS} | {"head": leaf("head.weight")}
        self.biases = {name: leaf(f"{name}.bias") for name in (*LAYERS, "head")}
        self.adapters = {
            name: (leaf(f"{name}.slope.adapter_down"), leaf(f"{name}.slope.adapter_up")) for name in LAYERS
        }
        self.active = False
        trained = [*self.weights.values(), *self.biases.values()]
        self.optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)
        self.choose_columns()

    def choose_columns(self) -> None:
        self.columns = {name: column_mask(self.weights[name], self.kept[name]) for name in LAYERS}

    def layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights[name]
        backward = x @ (weight * self.columns[name]).detach().t()
        y = x.detach() @ (weight * self.kept[name]).t() + (backward - backward.detach())
        if self.active:
            down, up = self.adapters[name]
            y = y + (x @ down.t()) @ up.t()
        return y + self.biases[name]

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.layer("fc2", torch.tanh(self.layer("fc1", x))))
        y = hidden @ self.weights["head"].t() + self.biases["head"]
        return (y - x[..., :4].sin()).square().mean()

    def train(self) -> list[float]:
        losses = []
        for number in range(STEPS):
            micro = [self.loss(slope_ranks.batch(number, part)) for part in range(MICRO_BATCHES)]
            loss = sum(micro) / MICRO_BATCHES
            self.optimizer.zero_grad()
            loss.backward()
            tensors = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
            torch.nn.utils.clip_grad_norm_(tensors, CLIP)
            self.optimizer.step()
            losses.append(float(loss.detach()))
            if (number + 1) % INTERVAL == 0:
                self.choose_columns()
            if number + 1 == START:  # a group without history: the bias correction starts anew
                self.active = True
                new = [tensor for pair in self.adapters.values() for tensor in pair]
                self.optimizer.add_param_group({"params": new, "weight_decay": 0.0})
        return losses


def test_every_stage_trains_like_masked_dense_matrices_written_by_hand(runs: Runs) -> None:
    """Clipping, two micro-batches, decay, column masks on schedule, adapters with a fresh bias correction."""
    reference = Dense(runs[0, "fp32"]["start"])
    expected = reference.train()
    for case in FP32:
        assert runs[case]["losses"] == pytest.approx(expected, rel=2e-5), case
        last = runs[case]["weights"][-1]
        for name in LAYERS:
            compact = reference.weights[name].detach()[reference.kept[name]].numpy()
            np.testing.assert_allclose(last[f"{name}.weight"].ravel(), compact, rtol=2e-3, atol=2e-5)
            up = reference.adapters[name][1].detach().numpy()
            np.testing.assert_allclose(last[f"{name}.slope.adapter_up"], up, rtol=2e-3, atol=2e-5)


def test_bf16_gives_the_same_at_every_stage(runs: Runs) -> None:
    first = runs[BF16[0]]
    assert first["losses"] == pytest.approx(runs[0, "fp32"]["losses"], rel=3e-2)
    assert first["losses"] != runs[0, "fp32"]["losses"]
    for case in BF16[1:]:
        assert runs[case]["losses"] == pytest.approx(first["losses"], rel=1e-3), case


@pytest.mark.parametrize("case", FP32 + BF16, ids=lambda case: f"zero{case[0]}-{case[1]}")
def test_adapters_stay_as_they_were_until_they_start(runs: Runs, case: tuple[int, str]) -> None:
    run = runs[case]
    for layer in LAYERS:
        up, down = f"{layer}.slope.adapter_up", f"{layer}.slope.adapter_down"
        for weights in run["weights"][:START]:
            assert not weights[up].any()
            assert weights[down].tobytes() == run["start"][down].tobytes()
        assert all(weights[up].any() for weights in run["weights"][START:])
        assert (run["weights"][-1][down] != run["start"][down]).any()


@pytest.mark.parametrize("case", FP32 + BF16, ids=lambda case: f"zero{case[0]}-{case[1]}")
def test_the_first_update_of_an_adapter_is_as_large_as_the_learning_rate(
    runs: Runs, case: tuple[int, str]
) -> None:
    """Adam's first update with bias correction; a counter that went on from 3 would give 0.58 of it."""
    assert len(runs[case]["restarted"]) == 1 and runs[case]["restarted"][0] > 0
    for layer in LAYERS:
        first = np.abs(runs[case]["weights"][START][f"{layer}.slope.adapter_up"])
        assert first.max() == pytest.approx(LR, rel=1e-2 if case[1] == "bf16" else 1e-3)
        assert np.median(first) > 0.95 * LR


@pytest.mark.parametrize("case", FP32 + BF16, ids=lambda case: f"zero{case[0]}-{case[1]}")
def test_masks_keep_to_their_schedule_and_metrics_say_what_holds(runs: Runs, case: tuple[int, str]) -> None:
    run = runs[case]
    for layer in LAYERS:
        start, columns = run["start"], f"{layer}.slope.column_mask"
        masks = [start[columns], *(weights[columns] for weights in run["weights"])]
        changed = [masks[n + 1].tobytes() != masks[n].tobytes() for n in range(STEPS)]
        assert not any(change for n, change in enumerate(changed, 1) if n % INTERVAL)
        assert all(
            weights[f"{layer}.slope.mask"].tobytes() == start[f"{layer}.slope.mask"].tobytes()
            for weights in run["weights"]
        )
    element, metrics = (2 if case[1] == "bf16" else 4), run["metrics"]
    masks_bytes = 2 * 4 * (32 * 1 + 16 * 1)
    assert metrics["saved_bytes"] == element * 16 * 32 - masks_bytes
    assert (metrics["sparse_layers"], metrics["density"], metrics["adapters_active"]) == (2, 0.5, 1)
    assert 0.02 < metrics["column_loss"] < 0.15
    assert metrics["column_loss"] == pytest.approx(runs[0, "fp32"]["metrics"]["column_loss"], rel=2e-2)
    assert run["counts"]["layers_ran"] == 2 and run["counts"]["layers_total"] == 3


def test_adapters_have_a_group_without_decay(runs: Runs) -> None:
    for case, run in runs.items():
        assert set(run["groups"]) == {(None, DECAY), ("slope_adapters", 0.0)}, case


def test_column_masks_change_at_all(runs: Runs) -> None:
    run = runs[0, "fp32"]
    name = "fc1.slope.column_mask"
    assert len({weights[name].tobytes() for weights in run["weights"]}) == STEPS // INTERVAL + 1


@pytest.mark.parametrize("kind", ["own_optimizer", "generator_groups"])
def test_optimizers_and_groups_that_the_caller_makes_train_the_same(
    ranks: Ranks, runs: Runs, kind: str
) -> None:
    (losses,) = ranks(1).run(f"slope_ranks:{kind}", 1)
    assert losses == pytest.approx(runs[1, "fp32"]["losses"], rel=1e-5)


def test_a_network_that_never_calls_its_sparse_layers_is_stopped(ranks: Ranks) -> None:
    first, second = ranks(2).run("slope_ranks:idle")
    assert first == second
    assert first.startswith("2: ") and "slope: 2 of 3 linear layers sparse, 0 ran" in first


def test_steps_that_fp16_skips_change_nothing_and_adapters_start_on_time(ranks: Ranks) -> None:
    run = ranks(2).run("slope_ranks:overflow", 1)[0]
    weights, applied = run["weights"], run["applied"]
    assert applied[:2] == [False, False] and all(applied[START:]), applied
    for number, done in enumerate(applied):
        before, after = weights[number], weights[number + 1]
        same = all(before[name].tobytes() == after[name].tobytes() for name in before)
        assert same != done, number
    up = "fc2.slope.adapter_up"
    assert not any(found[up].any() for found in weights[: START + 1])
    assert np.abs(weights[START + 1][up]).max() == pytest.approx(LR, rel=5e-3)
    assert np.isfinite(run["losses"]).all() and run["losses"][-1] < run["losses"][0]
    assert run["metrics"]["adapters_active"] == 1


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Any]:
    """Return folder and results of `save_and_resume` on two ranks; each runs once."""
    known: dict[tuple[int, str], Any] = {}

    def get(stage: int, precision: str = "fp32") -> Any:
        if (stage, precision) not in known:
            folder = tmp_path_factory.mktemp("slope")
            results = ranks(2).run("slope_ranks:save_and_resume", str(folder), stage, precision)
            known[stage, precision] = folder, results
        return known[stage, precision]

    return get


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (1, "bf16")])
def test_runs_resumed_before_at_and_after_the_start_of_the_adapters_are_exact(
    saved: Callable[..., Any], stage: int, precision: str
) -> None:
    """The resumed engines are built with other masks; those of the checkpoint must count."""
    for result in saved(stage, precision)[1]:
        unbroken = result["unbroken"]
        for first in (START - 1, START, START + 1):
            resumed = result[str(first)]
            assert resumed["losses"] == unbroken["losses"][first:], first
            assert resumed["digest"] == unbroken["digest"] and resumed["changed"], first


def test_a_run_goes_on_at_another_number_of_ranks(ranks: Ranks, saved: Callable[..., Any]) -> None:
    folder, results = saved(0)
    for first in (START, START + 1):
        (resumed,) = ranks(1).run("slope_ranks:resume", str(folder), 0, first)
        assert resumed["losses"] == pytest.approx(results[0]["unbroken"]["losses"][first:], rel=1e-5)


@pytest.mark.parametrize("how", ["load_optimizer_states", "load_module_only"])
@pytest.mark.parametrize(("stage", "size"), [(1, 1), (3, 2)])
def test_weights_alone_bring_their_trained_adapters_with_them(
    ranks: Ranks, saved: Callable[..., Any], stage: int, size: int, how: str
) -> None:
    """Though the new run's own adapters would start later, the loaded ones are part of the network."""
    folder, first = str(saved(stage)[0]), START + 1
    expected = ranks(2).run("slope_ranks:loss_at", folder, stage, first)[0]
    choice = {how: how == "load_module_only"}
    found = ranks(size).run("slope_ranks:loaded_weights_with", folder, stage, first, choice)[0]
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["active"] == [True, True, True] and found["metrics"]["adapters_active"] == 1


def test_the_counter_of_adam_restarts_for_one_group_alone() -> None:
    adapter, weight = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = torch.optim.AdamW(
        [{"params": [weight]}, {"params": [adapter], "name": "slope_adapters"}], lr=LR, weight_decay=0.0
    )
    for parameter in (adapter, weight):
        parameter.grad = torch.zeros(3)
    optimizer.step()
    for parameter in (adapter, weight):
        optimizer.state[parameter]["step"].fill_(5000.0)
        parameter.grad = torch.tensor([1.0, -2.0, 1e-3])
    assert compat.restart_adam(SimpleNamespace(optimizer=optimizer), "slope_adapters") == 1
    assert compat.restart_adam(SimpleNamespace(optimizer=optimizer), "absent") == 0
    optimizer.step()
    signs = torch.tensor([-1.0, 1.0, -1.0])
    torch.testing.assert_close(adapter.detach(), LR * signs, rtol=1e-3, atol=0.0)
    assert bool((weight.detach() * signs > 3 * LR).all())  # 0.1 / sqrt(0.001) without the correction


@pytest.mark.parametrize(("stage", "arguments"), [(1, "--tensor-model-parallel-size 2"), (3, "")])
def test_a_killed_run_of_the_script_goes_on_exactly_past_the_start_of_the_adapters(
    ranks: Ranks, tmp_path: Path, stage: int, arguments: str
) -> None:
    slope = {"enabled": True, "column_mask_interval": 3, "adapter": {"rank": 2, "start_step": 3}}
    case = Case(2, arguments, stage=stage, config={"slope": slope})
    unbroken = case.run(ranks, tmp_path / "unbroken", "--save-interval 2")
    assert set(unbroken.status) == {0}
    folder = tmp_path / "broken/checkpoints"
    shutil.copytree(tmp_path / "unbroken/checkpoints/global_step2", folder / "global_step2")
    (folder / "latest").write_text("global_step2")
    resumed = case.run(ranks, tmp_path / "broken")
    assert set(resumed.status) == {0} and resumed.of("resume", "step") == [2]
    assert resumed.losses == unbroken.losses[2:] and resumed.norms == unbroken.norms[2:]
    last = f"checkpoints/global_step{len(unbroken.losses)}"
    assert differences(tmp_path / "unbroken" / last, tmp_path / "broken" / last) == []


def test_checkpoints_of_other_weights_are_refused_in_a_few_words(ranks: Ranks, tmp_path: Path) -> None:
    (messages,) = ranks(1).run("slope_ranks:refusals", str(tmp_path))
    sparse = "2:4, double-pruned, adapters of rank 2"
    other = "1:4, double-pruned, adapters of rank 2"
    expected = [("slope " + sparse, "off"), ("slope " + sparse, other), ("slope off", sparse)]
    assert len(messages) == 3
    for message, (saved, now) in zip(messages, expected, strict=True):
        assert f"saved with {saved}, this run has {now}" in message and "unexpected" not in message.lower()
