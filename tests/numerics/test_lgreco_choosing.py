"""L-GreCo's plans from measured errors: the guarantee, the same on every rank, Accordion, measured times."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.core.keys import Key
from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.lgreco.calibration import measure_synchronisation
from ds_efficient.lgreco.choosing import CompressionPlan, Planner
from ds_efficient.lgreco.config import LgrecoConfig
from ds_efficient.lgreco.error_tables import Alone, layer_errors
from ds_efficient.lgreco.options import RAW, Option, wire_bytes
from ds_efficient.lgreco.timing import SynchronisationModel
from ds_efficient.ops.keyed_random import normal

KEY = Key(5, ("test",))
SHAPES = {"a": (48, 40), "b": (30, 64), "c": (64, 64), "flat": (40, 40), "thin": (200, 16)}


class Threads:
    """Ranks as threads of this process, summing in the order of the ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.held: list[torch.Tensor | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks)
        self.bytes = 0

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        results: list[Any] = [None] * self.ranks

        def one(rank: int) -> None:
            try:
                results[rank] = work(Member(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Member:
    """One rank of `Threads`."""

    def __init__(self, group: Threads, rank: int) -> None:
        self.group, self.rank, self.ranks = group, rank, group.ranks

    def all_reduce(self, tensor: torch.Tensor) -> None:
        held = self.group.held
        held[self.rank] = tensor.clone()
        self.group.barrier.wait(timeout=30)
        total = held[0].clone()
        for other in held[1:]:
            total += other
        self.group.barrier.wait(timeout=30)
        tensor.copy_(total)


def section(**keys: object) -> LgrecoConfig:
    return LgrecoConfig.model_validate(
        {"enabled": True, "compressor": "mixed", "default": 6, "range": [2, 20], **keys}
    )


def gradients(seed: int = 0) -> dict[str, torch.Tensor]:
    """Layers of very different spectra; "flat" is noise."""
    found = {}
    for number, (name, (n, m)) in enumerate(SHAPES.items()):
        key = Key(seed, ("gradients", name))
        noise = 0.3 * normal(key, (n, m))
        if name != "flat":
            r = min(n, m)
            values = (0.5 + 0.08 * number) ** torch.arange(r)
            noise = 0.05 * noise + (normal(key.fold(1), (n, r)) * values) @ normal(key.fold(2), (r, m))
        found[name] = noise
    return found


def planned(config: LgrecoConfig, given_: dict[str, torch.Tensor], step: int = 7) -> CompressionPlan:
    return Planner(config, SHAPES, Alone(), key=KEY).plan({k: v.clone() for k, v in given_.items()}, step)


# ---- the guarantee ----


@given(
    st.integers(0, 1000),
    st.sampled_from(
        [
            {"compressor": "powersgd"},
            {"compressor": "mixed"},
            {"compressor": "qsgd", "default": 4, "range": [2, 8]},
            {"compressor": "topk", "default": 0.05, "range": [0.005, 0.4]},
        ]
    ),
    st.sampled_from(["l2", "l2_squared"]),
)
@settings(deadline=None, max_examples=25)
def test_errors_keep_to_the_budget_and_bytes_to_the_default(seed, keys, error) -> None:
    config = section(**keys, error=error)
    given_ = gradients(seed)
    planner = Planner(config, SHAPES, Alone(), key=KEY)
    plan = planner.plan({name: one.clone() for name, one in given_.items()}, 7)
    total = {"choices": 0.0, "defaults": 0.0}
    for name, one in given_.items():
        for which in total:
            option = getattr(plan, which)[name]
            key = KEY.fold("errors", 7).fold(name)
            total[which] += float(layer_errors(one, [option], key, config.error)[0])
    # A spectrum is found a little better with the largest rank than with the default alone.
    assert plan.error <= plan.budget * (1 + 1e-9)
    assert plan.error == pytest.approx(total["choices"], rel=0.02)
    assert plan.budget == pytest.approx(total["defaults"], rel=0.02)
    sent = sum(wire_bytes(option, SHAPES[name]) for name, option in plan.choices.items())
    assert plan.nbytes == sent <= plan.default_nbytes <= plan.raw_nbytes
    assert plan.raw_nbytes == sum(4 * math.prod(shape) for shape in SHAPES.values())


def test_layers_of_different_spectra_get_different_options_and_fewer_bytes() -> None:
    plan = planned(section(compressor="powersgd"), gradients())
    assert len(set(plan.choices.values())) >= 3
    assert plan.nbytes < 0.9 * plan.default_nbytes
    mixed = planned(section(), gradients())
    assert mixed.nbytes < plan.nbytes
    assert len({option.compressor for option in mixed.choices.values()}) >= 2


def test_layer_without_a_usable_gradient_keeps_its_default() -> None:
    given_ = gradients()
    given_["a"][0, 0] = math.nan
    given_["b"].zero_()
    del given_["thin"]
    plan = planned(section(), given_)
    for name in ("a", "b", "thin"):
        assert plan.choices[name] == plan.defaults[name]
    assert plan.error <= plan.budget and math.isfinite(plan.norm)
    nothing = Planner(section(), SHAPES, Alone(), key=KEY)
    assert nothing.plan({}, 1).choices == nothing.first().choices
    assert math.isnan(nothing.first().budget)
    assert Planner(section(), {}, Alone(), key=KEY).plan({}, 1).choices == {}


# ---- ranks ----


@pytest.mark.parametrize("accordion", [False, True])
def test_every_rank_of_every_number_of_ranks_plans_the_same(accordion) -> None:
    keys = {"accordion": {"enabled": True, "low": 12, "high": 4}} if accordion else {}
    config = section(**keys, compressor="powersgd")
    plans = {}
    for ranks in (1, 2, 4):

        def work(exchange):
            planner = Planner(config, SHAPES, exchange, key=KEY)
            first = planner.plan({name: one.clone() for name, one in gradients(1).items()}, 3)
            return first, planner.plan({name: one.clone() for name, one in gradients(2).items()}, 6)

        plans[ranks] = Threads(ranks).run(work)
        for pair in plans[ranks]:
            for mine, zero in zip(pair, plans[ranks][0], strict=True):
                assert mine._replace(seconds=0) == zero._replace(seconds=0)
    for ranks in (2, 4):
        for many, one in zip(plans[ranks][0], plans[1][0], strict=True):
            assert many.choices == one.choices and many.defaults == one.defaults
            assert (many.error, many.budget, many.norm) == (one.error, one.budget, one.norm)
            assert many.measured_nbytes > one.measured_nbytes == 0


def test_errors_are_those_of_the_mean_over_the_ranks() -> None:
    def work(exchange):
        sign = 1.0 if exchange.rank == 0 else -0.5
        planner = Planner(section(), SHAPES, exchange, key=KEY)
        return planner.plan({name: sign * one for name, one in gradients().items()}, 7)

    both = Threads(2).run(work)[0]
    mean = planned(section(), {name: 0.25 * one for name, one in gradients().items()})
    assert both.choices == mean.choices
    assert both.error == pytest.approx(mean.error, rel=1e-6)


# ---- Accordion, time, state ----


def test_accordion_compresses_less_while_norms_change() -> None:
    config = section(compressor="powersgd", accordion={"enabled": True, "low": 16, "high": 4})
    planner = Planner(config, SHAPES, Alone(), key=KEY)
    assert set(planner.plan(gradients(), 1).defaults.values()) <= {Option("powersgd", 16), RAW}
    calm = planner.plan(gradients(), 2)
    assert set(calm.defaults.values()) == {Option("powersgd", 4)}
    louder = gradients()
    louder["c"] *= 3
    state = json.loads(json.dumps(planner.state_dict()))
    again = Planner(config, SHAPES, Alone(), key=KEY)
    again.load_state_dict(state)
    found = planner.plan({name: one.clone() for name, one in louder.items()}, 3)
    assert found.defaults["c"] == Option("powersgd", 16) and found.defaults["a"] == Option("powersgd", 4)
    assert again.plan(louder, 3)._replace(seconds=0) == found._replace(seconds=0)
    assert calm.nbytes < found.nbytes
    with pytest.raises(CheckpointError, match="accordion"):
        planner.load_state_dict({})


def test_plan_survives_json() -> None:
    plan = planned(section(), gradients())
    assert CompressionPlan.from_plain(json.loads(json.dumps(plan.to_plain()))) == plan


def test_time_objective_compresses_what_is_slow() -> None:
    config = section(objective="time", compressor="powersgd")
    planner = Planner(config, SHAPES, Alone(), key=KEY)
    with pytest.raises(UserError, match="time_by"):
        planner.plan(gradients(), 1)
    buckets = {name: int(name == "c") for name in SHAPES}
    model = SynchronisationModel(0.0, (1e-9, 1e-6), 1.0, 9)
    planner.time_by(model, buckets)
    slow = planner.plan(gradients(), 1)
    even = planned(section(compressor="powersgd"), gradients(), 1)
    size = {name: wire_bytes(option, SHAPES[name]) for name, option in slow.choices.items()}
    assert size["c"] < wire_bytes(even.choices["c"], SHAPES["c"])
    assert slow.error <= slow.budget * (1 + 1e-9)
    with pytest.raises(UserError, match="'b' is in none"):
        planner.time_by(model, {"a": 0})


def test_calibration_finds_what_a_byte_of_each_bucket_costs() -> None:
    now = [0.0]
    costs = iter(())

    class Simulated(Alone):
        ranks = 2

        def all_reduce(self, tensor: torch.Tensor) -> None:
            nonlocal costs
            if tensor.dtype == torch.float64:
                tensor.mul_(2)
                return
            slope = next(costs, None)
            if slope is None:
                costs = iter((5e-9,))
                slope = 2e-8
            now[0] += 1e-4 + slope * tensor.nbytes

    model = measure_synchronisation(Simulated(), [1 << 16, 1 << 18], KEY, clock=lambda: now[0])
    assert model.seconds_per_byte == pytest.approx((2e-8, 5e-9), rel=1e-6)
    assert model.latency == pytest.approx(2e-4, rel=1e-6) and model.samples == 8
    for wrong in ([], [0]):
        with pytest.raises(UserError, match="bucket_bytes"):
            measure_synchronisation(Alone(), wrong, KEY)
    with pytest.raises(UserError, match="tell 2 buckets apart"):
        measure_synchronisation(Alone(), [8, 8], KEY, samples=2)
