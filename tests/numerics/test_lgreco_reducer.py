"""The reducer on simulated ranks: means, identical bits, error feedback, bytes, state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.lgreco import (
    QSGD,
    Option,
    PowerSGD,
    Raw,
    Reducer,
    SimulatedGroup,
    TopK,
    make_compressor,
    reduce_together,
    wire_bytes,
)
from ds_efficient.lgreco.transport import HostStaging

SHAPES = {"wide": (33, 65), "bias": (65,), "deep": (8, 5, 40), "small": (8, 8), "square": (64, 64)}
COMPRESSORS = {"qsgd": QSGD(4), "topk": TopK(0.05), "powersgd": PowerSGD(3), "raw": Raw()}
MATRICES = ("wide", "deep", "square")


def gradients(ranks, step=0, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(ranks)
    ]


def mean_of(named):
    return {name: sum(one[name].double() for one in named) / len(named) for name in named[0]}


def group_of(ranks, compressor, **options):
    group = SimulatedGroup(ranks)
    return [
        Reducer(default=compressor, transport=transport, key=Key(7), **options)
        for transport in group.transports
    ]


def run(reducers, named, *, commit=True, **options):
    reduce_together(reducers, named, **options)
    for reducer in reducers:
        reducer.commit() if commit else reducer.rollback()


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_all_ranks_end_with_the_same_bits_near_the_mean(kind, dtype, ranks):
    reducers = group_of(ranks, COMPRESSORS[kind])
    named = gradients(ranks, dtype=dtype)
    want = mean_of(named)
    run(reducers, named)
    for one in named[1:]:
        assert all(torch.equal(one[name], named[0][name]) for name in SHAPES)
    for name in ("bias", "small"):  # sent as they are
        torch.testing.assert_close(named[0][name].double(), want[name], atol=2e-2, rtol=2e-2)
    for name in MATRICES:
        lost = float((named[0][name].double() - want[name]).norm() / want[name].norm())
        # the compressors' own errors are tested elsewhere: here nothing may be mixed up
        assert lost < {"qsgd": 0.3, "topk": 0.97, "powersgd": 0.99, "raw": 0.01}[kind]
        assert kind == "raw" or lost > 1e-4


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["topk", "powersgd"])
@pytest.mark.parametrize("immediate", [False, True])
def test_what_was_sent_is_the_sum_of_the_gradients_less_the_last_error(kind, immediate, ranks):
    reducers = group_of(ranks, COMPRESSORS[kind], immediate=immediate)
    given_sum = {name: torch.zeros(SHAPES[name], dtype=torch.float64) for name in MATRICES}
    sent = {name: torch.zeros_like(total) for name, total in given_sum.items()}
    for step in range(5):
        named = gradients(ranks, step)
        for name, value in mean_of(named).items():
            if name in given_sum:
                given_sum[name] += value
        run(reducers, named)
        for name in sent:
            sent[name] += named[0][name].double()
    for name in MATRICES:
        error = sum(reducer.errors()[name].double() for reducer in reducers) / ranks
        assert error.norm() > 0.1 * given_sum[name].norm()
        torch.testing.assert_close(sent[name], given_sum[name] - error, atol=1e-4, rtol=1e-4)


def test_a_step_that_was_left_out_changes_nothing_but_the_random_stream():
    plain, interrupted = group_of(2, PowerSGD(3)), group_of(2, PowerSGD(3))
    for step in range(3):
        named, again = gradients(2, step), gradients(2, step)
        run(plain, named)
        if step == 1:
            overflow = gradients(2, 99)
            overflow[1]["wide"][3, 4] = math.inf
            run(interrupted, overflow, commit=False)
            assert not overflow[0]["wide"].isfinite().all()
        run(interrupted, again)
        assert all(torch.equal(named[0][name], again[0][name]) for name in SHAPES)


@pytest.mark.parametrize("kind", ["topk", "powersgd"])
@pytest.mark.parametrize("immediate", [False, True])
def test_a_gradient_that_is_not_finite_is_seen_and_does_not_stay_in_the_errors(kind, immediate):
    reducers = group_of(2, COMPRESSORS[kind], immediate=immediate)
    run(reducers, gradients(2, 0))
    broken = gradients(2, 1)
    broken[0]["square"][0, 0] = math.nan
    run(reducers, broken)
    assert all(not one["square"].isfinite().all() for one in broken)
    sound = gradients(2, 2)
    run(reducers, sound)
    assert all(one[name].isfinite().all() for one in sound for name in SHAPES)
    assert all(error.isfinite().all() for reducer in reducers for error in reducer.errors().values())


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_a_loss_scale_that_changes_every_step_changes_no_bit(kind):
    plain, scaled = group_of(2, COMPRESSORS[kind]), group_of(2, COMPRESSORS[kind])
    for step, scale in enumerate((1024.0, 2.0, 512.0)):
        named, large = gradients(2, step), gradients(2, step)
        for one in large:
            for gradient in one.values():
                gradient *= scale
        run(plain, named)
        run(scaled, large, scale=scale)
        for name in SHAPES:
            assert torch.equal(named[1][name], large[1][name] / scale), (name, step)


def test_a_layer_that_goes_without_feedback_is_paid_its_error_once():
    reducers = group_of(2, TopK(0.05))
    run(reducers, gradients(2, 0))
    errors = mean_of([reducer.errors() for reducer in reducers])
    for reducer in reducers:
        reducer.take({name: Option("raw", 0) for name in SHAPES})
    for paid in (True, False):
        named = gradients(2, 1)
        want = mean_of(named)
        run(reducers, named)
        for name in MATRICES:
            more = errors[name] if paid else 0.0
            torch.testing.assert_close(named[0][name].double(), want[name] + more, atol=1e-5, rtol=1e-5)
    assert not reducers[0].errors()


@given(
    seed=st.integers(0, 10**6),
    changes=st.lists(
        st.lists(
            st.sampled_from(["powersgd 2", "powersgd 5", "topk 0.1", "qsgd 3", "raw 0"]),
            min_size=3,
            max_size=3,
        ),
        min_size=2,
        max_size=4,
    ),
)
@settings(max_examples=15, deadline=None)
def test_nothing_is_lost_whatever_the_plans(seed, changes):
    reducers = group_of(2, Raw())
    total, sent = (torch.zeros(sum(math.prod(SHAPES[name]) for name in MATRICES)).double() for _ in range(2))
    noise = 0.0
    for step, kinds in enumerate([*changes, ["raw 0"] * 3]):
        chosen = {}
        for name, kind in zip(MATRICES, kinds, strict=True):
            compressor, setting = kind.split()
            chosen[name] = Option(compressor, float(setting))
            if compressor == "qsgd":  # unbiased, not fed back
                noise += 1.0
        for reducer in reducers:
            reducer.take(chosen)
        named = gradients(2, seed + step)
        total += torch.cat([mean_of(named)[name].flatten() for name in MATRICES])
        run(reducers, named)
        assert all(torch.equal(named[0][name], named[1][name]) for name in SHAPES)
        sent += torch.cat([named[0][name].double().flatten() for name in MATRICES])
    assert float((sent - total).abs().max()) <= (1e-3 if not noise else 2.5 * noise)


def test_three_and_more_ranks_average_without_bias():
    ranks, rounds = 3, 300
    reducers = group_of(ranks, QSGD(2))
    shapes = {"wide": SHAPES["wide"]}
    want = mean_of(gradients(ranks, 0, shapes=shapes))["wide"]
    total = torch.zeros_like(want)
    for _ in range(rounds):
        named = gradients(ranks, 0, shapes=shapes)
        run(reducers, named)
        total += named[0]["wide"].double()
    one = (named[0]["wide"].double() - want).std()
    assert float((total / rounds - want).std()) < 1.3 * float(one) / math.sqrt(rounds)


@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_are_those_of_the_mean(ranks):
    reducers = group_of(ranks, QSGD(8))
    named = gradients(ranks)
    want = mean_of(named)
    slices = [{} for _ in reducers]
    going = [
        reducer.turns(one, slices=part) for reducer, one, part in zip(reducers, named, slices, strict=True)
    ]
    while going:
        going = [turn for turn in going if next(turn, going) is not going]
    for name in MATRICES:
        whole = torch.cat([part[name] for part in slices]).view(SHAPES[name]).double()
        assert slices[0][name].numel() == -(-whole.numel() // ranks)
        assert float((whole - want[name]).abs().max()) < 8 / 255
        assert torch.equal(named[0][name], gradients(ranks)[0][name])  # the gradients stay


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "option", [Option("qsgd", 3), Option("topk", 0.05), Option("powersgd", 3), Option("raw", 0)]
)
def test_the_bytes_counted_are_those_planned(option, ranks):
    shape = (256, 512)  # whole quantisation buckets
    reducers = group_of(ranks, make_compressor(option))
    named = gradients(ranks, shapes={"a": shape, "b": (64, 512)})
    run(reducers, named)
    planned = sum(wire_bytes(option, one, ranks=ranks) for one in (shape, (64, 512)))
    assert reducers[0].transport.sent.gradients == pytest.approx(planned, rel=1e-3)
    raw = sum(wire_bytes(Option("raw", 0), one, ranks=ranks) for one in (shape, (64, 512)))
    assert reducers[0].raw_bytes == raw


@pytest.mark.parametrize("kind", ["topk", "powersgd"])
def test_gradients_started_one_by_one_are_reduced_as_together(kind):
    together, single = group_of(1, COMPRESSORS[kind])[0], group_of(1, COMPRESSORS[kind])[0]
    for step in range(2):
        named, again = gradients(1, step)[0], gradients(1, step)[0]
        together.reduce(named)
        for name in reversed(again):
            single.start({name: again[name]})
        single.finish()
        for name in SHAPES:  # the bits of a product may depend on where its factors lie in memory
            torch.testing.assert_close(named[name], again[name], atol=1e-5, rtol=1e-5)
        together.commit()
        single.commit()


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_a_resumed_reducer_goes_on_bit_by_bit(kind):
    unbroken, saved = group_of(2, COMPRESSORS[kind]), []
    for step in range(4):
        if step == 2:
            saved = [
                (reducer.state_dict(), {k: v.clone() for k, v in reducer.errors().items()})
                for reducer in unbroken
            ]
        named = gradients(2, step)
        run(unbroken, named)
    resumed = group_of(2, COMPRESSORS[kind])
    for reducer, (state, errors) in zip(resumed, saved, strict=True):
        reducer.load_state_dict(state)
        reducer.load_errors(errors)
    for step in (2, 3):
        again = gradients(2, step)
        run(resumed, again)
    assert all(torch.equal(named[0][name], again[0][name]) for name in SHAPES)


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_staging_on_the_host_changes_nothing(kind):
    direct, group = group_of(3, COMPRESSORS[kind]), SimulatedGroup(3)
    staged = [
        Reducer(default=COMPRESSORS[kind], transport=HostStaging(transport), key=Key(7))
        for transport in group.transports
    ]
    named, again = gradients(3), gradients(3)
    run(direct, named)
    run(staged, again)
    assert all(torch.equal(named[2][name], again[2][name]) for name in SHAPES)
    assert staged[0].transport.sent == direct[0].transport.sent


def test_transposed_and_empty_gradients_are_averaged_in_their_place():
    reducers = group_of(2, QSGD(8))
    named = [
        {"w": torch.randn(65, 33, generator=torch.Generator().manual_seed(rank)).T, "none": torch.empty(0, 4)}
        for rank in range(2)
    ]
    want = mean_of(named)["w"]
    run(reducers, named)
    assert float((named[0]["w"].double() - want).abs().max()) < 8 / 255


def test_what_cannot_be_reduced_is_refused_by_name():
    reducer = group_of(1, QSGD(4))[0]
    with pytest.raises(UserError, match="embedding: its gradient is sparse"):
        reducer.reduce({"embedding": torch.eye(3).to_sparse()})
    with pytest.raises(UserError, match="float64"):
        reducer.reduce({"w": torch.zeros(3, dtype=torch.float64)})
