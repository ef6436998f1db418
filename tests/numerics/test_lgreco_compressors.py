"""L-GreCo's compressors: bytes on the wire, round trips, unbiasedness, error feedback."""

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
    ErrorFeedback,
    PowerSGD,
    Raw,
    TopK,
    compression_error,
    sent_raw,
)
from ds_efficient.ops import keyed_random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEY = Key(20221017).fold("test")
SHAPES = ((1, 1), (7,), (3, 5), (129, 65), (8, 4, 33), (64, 512), (0, 4))


def draw(shape: tuple[int, ...], *parts: int | str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return keyed_random.normal(KEY.fold(*parts), shape).to(dtype)


def gathering() -> list[Raw | QSGD | TopK]:
    return [Raw(), QSGD(2), QSGD(3, 8), QSGD(4), QSGD(7, 1024), QSGD(8, 24), TopK(0.01), TopK(0.3), TopK(1)]


# ---- what all have in common ----


@pytest.mark.parametrize("compressor", gathering(), ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_payload_has_exactly_the_bytes_that_are_promised(compressor, dtype):
    for shape in SHAPES:
        payload = compressor.compress(draw(shape, dtype=dtype), KEY)
        assert payload.dtype == torch.uint8 and payload.shape == (compressor.nbytes(shape, dtype),)


def test_bytes_are_those_of_the_formulas():
    n = 1000 * 333
    assert Raw().nbytes((1000, 333)) == 4 * n
    assert Raw().nbytes((1000, 333), torch.bfloat16) == 2 * n
    assert QSGD(3, 512).nbytes((1000, 333)) == math.ceil(n * 3 / 8) + 8 * math.ceil(n / 512)
    assert TopK(0.01).nbytes((1000, 333)) == 3330 * 8  # 0.01 * n is not 3330.0000000000005
    assert TopK(0.01).nbytes((1000, 333), torch.float16) == 3330 * 6
    assert TopK(0.5).nbytes((3,)) == 2 * 8
    assert TopK(0.5).nbytes((2**31 + 2,)) == (2**30 + 1) * (8 + 4)
    assert PowerSGD(4).nbytes((1000, 3, 111)) == 4 * 4 * 1333
    assert PowerSGD(4, power_steps=3).nbytes((2, 900)) == 3 * 4 * 2 * 902


@pytest.mark.parametrize("compressor", gathering(), ids=repr)
def test_sums_over_ranks_are_weighted_sums_of_what_each_stands_for(compressor):
    shape = (37, 29)
    payloads = [compressor.compress(draw(shape, rank), KEY.fold(rank)) for rank in range(3)]
    before = [payload.clone() for payload in payloads]
    total = torch.zeros(shape)
    for payload in payloads:
        compressor.decompress(payload, shape, out=total, weight=1 / 3, accumulate=True)
    expected = sum(compressor.decompress(payload, shape).double() for payload in payloads) / 3
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, payloads, before))
    rows = compressor.decompress(torch.stack(payloads), shape, weight=1 / 3)
    torch.testing.assert_close(rows, total, rtol=1e-5, atol=1e-6)
    over = compressor.decompress(payloads[0], shape, out=torch.full(shape, 7.0), weight=2.0)
    torch.testing.assert_close(over, 2 * compressor.decompress(payloads[0], shape))


@pytest.mark.parametrize("compressor", gathering(), ids=repr)
def test_payloads_are_read_at_any_address_and_tensors_at_any_stride(compressor):
    x = draw((65, 40)).T
    payload = compressor.compress(x, KEY)
    assert torch.equal(payload, compressor.compress(x.contiguous(), KEY))
    moved = torch.cat((torch.zeros(3, dtype=torch.uint8), payload))[3:]
    assert torch.equal(compressor.decompress(moved, x.shape), compressor.decompress(payload, x.shape))


@pytest.mark.parametrize("compressor", [*gathering(), PowerSGD(2)], ids=repr)
def test_nothing_touches_the_global_random_state(compressor):
    before = torch.get_rng_state()
    x = draw((40, 30))
    if isinstance(compressor, PowerSGD):
        compressor.decompress(compressor.compress(x, compressor.first_q(x.shape, KEY)), x.shape)
    else:
        compressor.decompress(compressor.compress(x, KEY), x.shape)
    assert torch.equal(torch.get_rng_state(), before)


def test_raw_comes_back_bit_for_bit():
    for dtype in DTYPES:
        x = draw((33, 5), dtype=dtype)
        x[0, 0], x[1, 1] = torch.nan, -torch.inf
        back = Raw().decompress(Raw().compress(x), x.shape, dtype=dtype)
        assert torch.equal(back.nan_to_num(nan=1e4), x.nan_to_num(nan=1e4))


def test_small_tensors_and_vectors_are_sent_raw():
    assert sent_raw((4096,)) and sent_raw(()) and sent_raw((31, 33))
    assert not sent_raw((32, 32)) and sent_raw((32, 32), smallest=1025)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: QSGD(1), "bits=1 "),
        (lambda: QSGD(9), "bits=9 "),
        (lambda: QSGD(4, 12), "bucket=12 "),
        (lambda: QSGD(4, 2048), "bucket=2048 "),
        (lambda: TopK(0), "density=0 "),
        (lambda: TopK(1.5), "density=1.5 "),
        (lambda: TopK(math.nan), "density=nan "),
        (lambda: PowerSGD(0), "rank=0 "),
        (lambda: PowerSGD(1, power_steps=0), "power_steps=0 "),
        (lambda: PowerSGD(4).nbytes((9,)), "shape \\(9,\\)"),
        (lambda: PowerSGD(2).compress(draw((4, 4)), draw((4, 3))), "q is .* \\(4, 3\\)"),
        (lambda: TopK(0.5).compress(torch.zeros(4, dtype=torch.float64)), "float64"),
        (lambda: QSGD(4).compress(torch.zeros(4, dtype=torch.int32)), "int32"),
        (lambda: QSGD(4).decompress(torch.zeros(9, dtype=torch.uint8), (4,)), "shape \\(9,\\)"),
        (lambda: TopK(0.5).decompress(torch.zeros(9, dtype=torch.uint8), (4,)), "shape \\(9,\\)"),
        (lambda: Raw().decompress(torch.zeros(16, dtype=torch.uint8), (4,), accumulate=True), "needs out"),
        (lambda: Raw().decompress(torch.zeros(16, dtype=torch.uint8), (4,), out=torch.zeros(5)), "\\(5,\\)"),
        (lambda: compression_error(torch.zeros(2), torch.zeros(2), "l1"), "error='l1'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_do_not_fit_are_named(make, text):
    with pytest.raises(UserError, match=text):
        make()


# ---- quantisation ----


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantisation_errs_by_at_most_a_unit_and_rounds_both_ways(bits):
    x = draw((70, 41))
    back = QSGD(bits, 64).decompress(QSGD(bits, 64).compress(x, KEY), x.shape)
    flat, error = x.flatten(), (back - x).flatten()
    for start in range(0, x.numel(), 64):
        part = flat[start : start + 64]
        unit = (part.max() - part.min()) / (2**bits - 1)
        assert error[start : start + 64].abs().max() <= unit * 1.00001
    assert (error > 0).any() and (error < 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", (2, 5))
def test_quantisation_is_unbiased_at_five_sigma(bits, dtype):
    x = draw((3, 17), dtype=dtype)
    compressor, draws = QSGD(bits, 16), 3000
    total = torch.zeros(x.shape, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for number in range(draws):
        error = compressor.decompress(compressor.compress(x, number), x.shape).double() - x.double()
        total += error
        squares += error.square()
    sigma = (squares / draws).sqrt() / math.sqrt(draws)
    assert ((total / draws).abs() <= 5 * sigma + 1e-6).all()
    assert sigma.max() > 0.001  # the bound means something


def test_ranks_and_steps_round_independently_and_the_same_key_alike():
    x, compressor = draw((64, 64)), QSGD(3)
    errors = [compressor.decompress(compressor.compress(x, KEY.fold(r)), x.shape) - x for r in range(2)]
    assert abs(torch.corrcoef(torch.stack(errors).flatten(1))[0, 1]) < 5 / 64
    assert torch.equal(compressor.compress(x, KEY), compressor.compress(x, KEY))


def test_equal_elements_come_back_exactly():
    for value in (0.0, -3.25, 1e-30, 65504.0, -0.0):
        x = torch.full((50,), value)
        assert torch.equal(QSGD(2, 16).decompress(QSGD(2, 16).compress(x, KEY), x.shape), x)


def test_tiny_gradients_are_still_rounded_without_bias():
    x = torch.tensor([0.0, 2.0**-140, 2.0**-130, 2.0**-101])
    assert torch.isfinite(QSGD(4, 8).decompress(QSGD(4, 8).compress(x, KEY), x.shape)).all()
    mean = sum(QSGD(4, 8).decompress(QSGD(4, 8).compress(x, n), x.shape).double() for n in range(400)) / 400
    assert abs(mean[3] / 2.0**-101 - 1) < 5 / math.sqrt(400)


@pytest.mark.parametrize("bad", ([math.nan], [math.inf], [-math.inf], [3e38, -3e38]))
def test_a_bucket_that_is_not_finite_becomes_nan_and_no_other(bad):
    x = draw((8, 16)).flatten()
    x[40 : 40 + len(bad)] = torch.tensor(bad)
    back = QSGD(4, 32).decompress(QSGD(4, 32).compress(x, KEY), x.shape)
    assert torch.isnan(back[32:64]).all()
    assert torch.isfinite(back[:32]).all() and torch.isfinite(back[64:]).all()


# ---- largest entries ----


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from((0.0, -1.0, 1.0, 2.0, -2.5, math.inf, math.nan)), min_size=1, max_size=40),
    st.floats(0.01, 1),
    st.sampled_from(DTYPES),
)
def test_the_largest_are_kept_and_of_equal_ones_the_first(values, density, dtype):
    x = torch.tensor(values).to(dtype)
    compressor = TopK(density)
    k = compressor.kept(x.shape)

    def order(i: int) -> tuple[float, int]:
        return (-math.inf if math.isnan(values[i]) else -abs(values[i]), i)

    kept = sorted(sorted(range(len(values)), key=order)[:k])
    expected = torch.zeros_like(x)
    expected[kept] = x[kept]
    payload = compressor.compress(x)
    assert payload[: 4 * k].clone().view(torch.int32).tolist() == kept
    back = compressor.decompress(payload, x.shape, dtype=dtype)
    assert torch.equal(back.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


@pytest.mark.parametrize("density", (0.00001, 0.001, 0.01, 0.2))
@pytest.mark.parametrize("layout", ("normal", "sorted", "periodic", "equal", "sparse"))
def test_the_sample_never_changes_the_result(density, layout):
    n = 1 << 17
    x = draw((n,), layout)
    if layout == "sorted":
        x = x.sort().values
    elif layout == "periodic":  # the sample sees the smallest elements, then the largest, only
        x = torch.where(torch.arange(n) % 16 == 0, 1e-6 * x, x)
    elif layout == "equal":
        x = torch.ones(n)
    elif layout == "sparse":
        x = torch.where(torch.arange(n) % 16 == 0, x, 0.0)
    k = TopK(density).kept((n,))
    expected = torch.sort(-x.abs(), stable=True).indices[:k].sort().values
    assert torch.equal(TopK(density).compress(x)[: 4 * k].clone().view(torch.int32).long(), expected)


def test_values_of_another_dtype_are_read_as_they_were_sent():
    x = draw((20, 30), dtype=torch.bfloat16)
    for compressor in (Raw(), TopK(0.1)):
        payload = compressor.compress(x)
        wide = compressor.decompress(payload, x.shape, dtype=torch.float32, sent=torch.bfloat16)
        assert torch.equal(wide, compressor.decompress(payload, x.shape, dtype=torch.bfloat16).float())


# ---- error feedback ----


@pytest.mark.parametrize("compressor", (TopK(0.1), PowerSGD(2), QSGD(2)), ids=repr)
def test_what_was_sent_is_what_was_to_send_less_the_last_error(compressor):
    shape, feedback = (24, 18), ErrorFeedback()
    sent_sum, gradient_sum = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    q = PowerSGD(2).first_q(shape, KEY)
    for step in range(12):
        gradient = draw(shape, step) * 3
        gradient_sum += gradient / 2
        corrected = feedback.corrected("layer", gradient, unscale=0.5)
        if isinstance(compressor, PowerSGD):
            made = compressor.compress(corrected, q)
            q, sent = made.q, compressor.decompress(made, shape)
        else:
            sent = compressor.decompress(compressor.compress(corrected, KEY.fold(step)), shape)
        sent_sum += sent
        feedback.record("layer", corrected, sent)
        feedback.commit()
    error = feedback.error("layer")
    assert error is not None and error.abs().max() > 0.1
    torch.testing.assert_close(sent_sum, gradient_sum - error, rtol=0, atol=1e-4)


@pytest.mark.parametrize("immediate", (False, True))
@pytest.mark.parametrize("compressor", (TopK(0.1), QSGD(2, 16)), ids=repr)
def test_feedback_in_one_pass_is_feedback_in_three(compressor, immediate):
    shape, one, three = (24, 18), ErrorFeedback(immediate=immediate), ErrorFeedback()
    for step in range(5):
        gradient, key = draw(shape, step), KEY.fold(step)
        payload = one.compress("layer", gradient, compressor, key, unscale=0.5)
        corrected = three.corrected("layer", gradient, unscale=0.5)
        assert torch.equal(payload, compressor.compress(corrected, key))
        three.record("layer", corrected, compressor.decompress(payload, shape))
        if step == 2 and not immediate:
            one.rollback()
            three.rollback()
        one.commit()
        three.commit()
        assert torch.equal(one.error("layer"), three.error("layer"))
    with pytest.raises(UserError, match=r"'layer'.*\(3,\)"):
        one.compress("layer", torch.zeros(3), compressor)


def test_a_step_that_is_not_taken_leaves_the_errors():
    feedback = ErrorFeedback()
    feedback.record("a", torch.full((3,), 2.0), torch.ones(3))
    assert feedback.error("a") is None
    feedback.commit()
    corrected = feedback.corrected("a", torch.full((3,), math.inf))
    feedback.record("a", corrected, torch.zeros(3))
    feedback.rollback()
    assert torch.equal(feedback.corrected("a", torch.ones(3)), torch.full((3,), 2.0))
    assert feedback.nbytes == 12


def test_errors_are_saved_and_loaded_bit_for_bit(tmp_path):
    feedback, other = ErrorFeedback(), ErrorFeedback()
    feedback.record("a", draw((4, 5)), draw((4, 5), 1))
    feedback.commit()
    torch.save(feedback.state_dict(), tmp_path / "errors.pt")
    other.load_state_dict(torch.load(tmp_path / "errors.pt", weights_only=True))
    assert torch.equal(other.error("a"), feedback.error("a"))
    with pytest.raises(UserError, match=r"'a'.*float16"):
        other.load_state_dict({"a": torch.zeros(2, dtype=torch.float16)})
    with pytest.raises(UserError, match=r"'a'.*\(4, 5\)"):
        other.corrected("a", torch.zeros(3))


def test_error_norms():
    x, y = draw((50, 20)), draw((50, 20), 1)
    norm, square = compression_error(x, y), compression_error(x, y, "l2_squared")
    assert norm.dtype == square.dtype == torch.float64
    torch.testing.assert_close(square, (x.double() - y.double()).square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.square(), square)
    halves = compression_error(x[:9], y[:9], "l2_squared") + compression_error(x[9:], y[9:], "l2_squared")
    torch.testing.assert_close(halves, square)
    assert compression_error(torch.full((2,), 3e38), -torch.full((2,), 1e38)).isinf()
    assert compression_error(torch.full((4,), 1e30), torch.zeros(4)) == pytest.approx(2e30, rel=1e-6)
