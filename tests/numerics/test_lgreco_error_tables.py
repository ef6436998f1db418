"""Error tables of L-GreCo: the options of a layer, their bytes, and the errors that are simulated."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.lgreco.compressors import QSGD, TopK
from ds_efficient.lgreco.config import LgrecoConfig
from ds_efficient.lgreco.error_tables import Alone, layer_errors, measure_errors, share_layers
from ds_efficient.lgreco.feedback import compression_error
from ds_efficient.lgreco.options import (
    RAW,
    Option,
    default_option,
    layer_options,
    make_compressor,
    wire_bytes,
)
from ds_efficient.lgreco.powersgd import PowerSGD
from ds_efficient.ops.keyed_random import normal

KEY = Key(3, ("test",))


def section(**keys: object) -> LgrecoConfig:
    return LgrecoConfig.model_validate({"enabled": True, **keys})


def gradient(n: int, m: int, name: str = "g", decay: float = 0.9) -> torch.Tensor:
    """A matrix whose singular values fall."""
    left, right = (normal(KEY.fold(name, part), (size, size)) for part, size in ((0, n), (1, m)))
    values = decay ** torch.arange(min(n, m))
    return (left[:, : len(values)] * values) @ right[: len(values)] / math.sqrt(n)


# ---- options ----


def test_options_are_raw_and_every_rank_of_the_range_that_is_smaller() -> None:
    config = section(compressor="powersgd", default=4, range=[2, 64])
    found = layer_options(config, (64, 40))
    assert found[0] == RAW
    # 4 r (64 + 40) < 4 * 64 * 40 up to rank 24.
    assert found[1:] == [Option("powersgd", rank) for rank in range(2, 25)]
    assert default_option(config, (64, 40)) == Option("powersgd", 4)
    assert default_option(config, (64, 40), setting=64) == RAW
    assert layer_options(config, (64, 2)) == [RAW]


def test_densities_go_in_steps_of_a_tenth_of_the_default() -> None:
    config = section(compressor="topk")
    settings_ = [option.setting for option in layer_options(config, (100, 100)) if option != RAW]
    assert settings_ == [round(0.001 * i, 3) for i in range(1, 101)]
    wide = section(compressor="topk", default=0.001, range=[0.0001, 1.0])
    found = [option.setting for option in layer_options(wide, (100, 100))]
    assert len(found) < 140 and 0.001 in found and max(found) < 0.5  # 8 bytes an entry in place of 4


def test_mixed_options_are_of_all_compressors() -> None:
    config = section(compressor="mixed", default=8, range=[4, 12])
    found = layer_options(config, (256, 256))
    assert {option.compressor for option in found} == {"raw", "powersgd", "qsgd", "topk"}
    assert [option.setting for option in found if option.compressor == "qsgd"] == list(range(2, 9))
    assert default_option(config, (256, 256)) == Option("powersgd", 8) in found


@given(
    st.sampled_from(["powersgd", "qsgd", "topk", "mixed"]),
    st.tuples(st.integers(2, 90), st.integers(2, 90)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 9),
)
@settings(deadline=None, max_examples=60)
def test_default_is_an_option_and_no_option_is_larger_than_raw(compressor, shape, dtype, ranks) -> None:
    accordion = {
        "powersgd": {"low": 16, "high": 8}, "mixed": {"low": 16, "high": 8}, "qsgd": {"low": 6, "high": 3},
        "topk": {"low": 0.02, "high": 0.005},
    }[compressor]  # fmt: skip
    default = {"qsgd": 4, "topk": 0.01}.get(compressor, 8)
    config = section(compressor=compressor, default=default, accordion={"enabled": True, **accordion})
    found = layer_options(config, shape, dtype, ranks=ranks)
    sizes = [wire_bytes(option, shape, dtype, ranks=ranks) for option in found]
    assert sizes[0] == max(sizes) and len(set(found)) == len(found)
    for setting in (None, *accordion.values()):
        assert default_option(config, shape, dtype, ranks=ranks, setting=setting) in found


def test_bytes_on_the_wire_count_what_each_collective_sends() -> None:
    shape = (64, 32)
    assert wire_bytes(RAW, shape, torch.float32, ranks=2) == 4 * 64 * 32
    assert wire_bytes(RAW, shape, torch.bfloat16, ranks=4) == 2 * 64 * 32 * 3 // 2
    assert wire_bytes(Option("powersgd", 4), shape, ranks=4) == 4 * 4 * (64 + 32) * 3 // 2
    assert wire_bytes(Option("qsgd", 4), shape, ranks=4) == -(-3 * QSGD(4).nbytes(shape) // 2)
    assert wire_bytes(Option("topk", 0.01), shape, ranks=4) == 3 * TopK(0.01).nbytes(shape)
    with pytest.raises(UserError, match="not known"):
        make_compressor(Option("zip", 1))


# ---- errors ----


@pytest.mark.parametrize("kind", ["l2", "l2_squared"])
def test_quantised_and_largest_entries_are_what_compressing_loses(kind) -> None:
    g = gradient(70, 50)
    options = [RAW, Option("qsgd", 2), Option("topk", 0.01), Option("qsgd", 8), Option("topk", 0.3),
               Option("topk", 1.0)]  # fmt: skip
    errors = layer_errors(g, options, KEY, kind)
    assert errors.dtype == torch.float64
    for option, error in zip(options, errors.tolist(), strict=True):
        compressor = make_compressor(option)
        payload = compressor.compress(g, KEY.fold(option.compressor).fold(int(option.setting)))
        direct = float(compression_error(g, compressor.decompress(payload, g.shape), kind))
        assert error == pytest.approx(direct, rel=1e-6, abs=0)


def test_ties_and_zeros_do_not_change_what_the_largest_entries_leave_out() -> None:
    g = torch.tensor([[3.0, -3.0, 3.0, 0.0], [0.0, 0.0, -3.0, 0.0]])
    errors = layer_errors(g, [Option("topk", k / 8) for k in range(1, 9)], KEY)
    assert errors.tolist() == pytest.approx([math.sqrt(9 * max(0, 4 - k)) for k in range(1, 9)], abs=1e-12)


def test_low_rank_errors_lie_between_the_best_and_one_power_step() -> None:
    g = gradient(60, 48)
    ranks = [1, 2, 4, 8, 16]
    errors = layer_errors(g, [Option("powersgd", rank) for rank in ranks], KEY).tolist()
    singular = torch.linalg.svdvals(g.to(torch.float64))
    for rank, error in zip(ranks, errors, strict=True):
        best = float(singular[rank:].square().sum().sqrt())
        power = PowerSGD(rank)
        q = power.first_q(g.shape, KEY)
        one = float(compression_error(g, power.decompress(power.compress(g, q), g.shape)))
        assert best * (1 - 1e-5) <= error <= min(one, 1.02 * best)
        for _ in range(60):  # a warm start on the same gradient ends there
            q = power.compress(g, q).q
        led = float(compression_error(g, power.decompress(power.compress(g, q), g.shape)))
        assert error == pytest.approx(led, rel=0.02)
    assert errors == sorted(errors, reverse=True)


@given(st.integers(0, 50), st.integers(0, 2))
@settings(deadline=None, max_examples=15)
def test_errors_fall_with_rank_and_density(seed, what) -> None:
    g = normal(Key(seed), (24, 40)) * 10.0**what
    for name, values in (("powersgd", range(1, 15)), ("topk", [0.01 * i for i in range(1, 30)])):
        errors = layer_errors(g, [Option(name, value) for value in values], KEY)
        assert (errors.diff() <= 0).all() and (errors > 0).all()
        assert float(errors[0]) <= float(g.norm()) * (1 + 1e-6)


def test_gradient_that_is_zero_or_not_finite() -> None:
    options = [RAW, Option("powersgd", 3), Option("topk", 0.1), Option("qsgd", 4)]
    assert layer_errors(torch.zeros(20, 10), options, KEY).tolist() == [0.0] * 4
    for bad in (math.nan, math.inf):
        g = gradient(20, 10)
        g[3, 4] = bad
        assert layer_errors(g, options, KEY).isnan().all()


# ---- sharing the work ----


@given(st.lists(st.floats(0, 100), max_size=12), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_every_layer_has_one_owner_and_the_loads_are_even(efforts, ranks) -> None:
    owner = share_layers(efforts, ranks)
    assert len(owner) == len(efforts) and all(0 <= rank < ranks for rank in owner)
    loads = [sum(e for e, who in zip(efforts, owner, strict=True) if who == rank) for rank in range(ranks)]
    # The last layer given to the fullest rank found all others at least as full.
    assert max(loads) <= sum(efforts) / ranks + max(efforts, default=0.0) + 1e-9


def test_table_counts_its_bytes_and_norms() -> None:
    layers = {"a": gradient(40, 30, "a"), "b": gradient(20, 50, "b")}
    before = {name: one.clone() for name, one in layers.items()}
    options = {
        name: layer_options(section(default=4, range=[2, 6]), one.shape) for name, one in layers.items()
    }
    shapes = {name: one.shape for name, one in layers.items()}
    table = measure_errors(layers, shapes, options, KEY, exchange=Alone())
    for number, (name, one) in enumerate(before.items()):
        assert torch.equal(table.errors[number], layer_errors(one, options[name], KEY.fold(name)))
        assert float(table.norms[number]) == pytest.approx(float(one.norm()), rel=1e-6)
    assert table.nbytes == 0  # one rank sends nothing
