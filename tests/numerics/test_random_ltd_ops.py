"""Token dropping: plain indexing bit for bit, a uniform choice, the contract of operators."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_ltd_plain import hidden, plain_gather, plain_scatter
from torch._subclasses import FakeTensorMode

from ds_efficient.core.keys import Key
from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.ops import keyed_random, native
from ds_efficient.ops import random_ltd as ltd

BACKENDS = ("native", "reference")
KEYS = st.integers(0, 2**64 - 1)
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8,
    torch.bool, torch.complex128,
)  # fmt: skip
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
both = pytest.mark.parametrize("backend", BACKENDS)
layouts = pytest.mark.parametrize("batch_first", (True, False))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits, so that NaN and signed zeros compare."""
    x = x.clone(memory_format=torch.contiguous_format).flatten()
    return x.view(INTEGER[x.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


# ---- choice ----


@settings(deadline=None, max_examples=60)
@given(KEYS, st.integers(0, 300), st.floats(0, 1), st.integers(0, 4), st.lists(KEYS, max_size=3))
def test_choices_are_sorted_distinct_and_those_of_the_keyed_choice(key, length, share, batch, more):
    keep = round(share * length)
    ours = ltd.sample_tokens(length, keep, batch, key=key, backend="native")
    assert ours.shape == (batch, keep) and ours.dtype == torch.int64
    assert torch.equal(ours, ltd.sample_tokens(length, keep, batch, key=key, backend="reference"))
    assert torch.equal(ours, keyed_random.sample_k_of_n(key, length, keep, batch=batch))
    assert (ours[:, 1:] > ours[:, :-1]).all() and ((ours >= 0) & (ours < length)).all()
    keys = [key, *more]
    for backend in BACKENDS:
        layers = ltd.sample_layers(length, keep, batch, keys, backend=backend)
        assert layers.shape == (len(keys), batch, keep)
        for layer, one in zip(layers, keys, strict=True):
            assert torch.equal(layer, ltd.sample_tokens(length, keep, batch, key=one))


def test_more_layers_than_one_launch_takes():
    keys = [Key(1).fold("layer", layer) for layer in range(600)]
    layers = ltd.sample_layers(20, 7, 2, keys)
    for layer in (0, 255, 256, 599):
        assert torch.equal(layers[layer], ltd.sample_tokens(20, 7, 2, key=keys[layer].value))
    assert ltd.sample_layers(20, 7, 2, []).shape == (0, 2, 7)


def test_every_position_is_kept_equally_often_and_layers_samples_and_steps_are_independent():
    length, keep, layers, batch, steps = 24, 9, 3, 2, 700
    drawn = torch.stack(
        [
            ltd.sample_layers(length, keep, batch, [Key(5).fold(step, layer) for layer in range(layers)])
            for step in range(steps)
        ]
    )
    kept = torch.zeros(steps, layers, batch, length).scatter_(3, drawn, 1.0)
    share = keep / length
    deviation = math.sqrt(share * (1 - share) / steps)
    assert ((kept.mean(0) - share).abs() < 5 * deviation).all()
    assert ((kept.mean((0, 1, 2)) - share).abs() < 5 * deviation / math.sqrt(layers * batch)).all()
    # Whether a position is kept says nothing about the same one in another layer, sample or step.
    centred = (kept - share) / math.sqrt(share * (1 - share))
    for a, b in (
        (centred[:, 0], centred[:, 1]),
        (centred[:, 1], centred[:, 2]),
        (centred[:, :, 0], centred[:, :, 1]),
        (centred[1:], centred[:-1]),
    ):
        products = a * b
        assert products.mean().abs() < 5 / math.sqrt(products.numel())
    # Two positions of one choice are kept together with probability keep (keep - 1) / (length (length - 1)).
    pair = keep * (keep - 1) / (length * (length - 1))
    together = torch.einsum("slbi,slbj->ij", kept, kept) / (steps * layers * batch)
    together.fill_diagonal_(pair)
    assert ((together - pair).abs() < 5 * math.sqrt(pair * (1 - pair) / (steps * layers * batch))).all()


def test_no_global_random_state_is_read_or_written():
    torch.manual_seed(0)
    random.seed(0)
    before, python = torch.get_rng_state(), random.getstate()
    drawn = [ltd.sample_tokens(100, 40, 3, key=9, backend=b) for _ in "ab" for b in BACKENDS]
    assert torch.equal(before, torch.get_rng_state()) and python == random.getstate()
    assert all(torch.equal(drawn[0], other) for other in drawn)
    assert torch.equal(drawn[0][:2], ltd.sample_tokens(100, 40, 2, key=9))


# ---- values ----


@st.composite
def states(draw):
    """A hidden state: contiguous, a slice, another order of memory, one sample for all, gaps."""
    batch, length, batch_first = draw(st.integers(0, 3)), draw(st.integers(0, 40)), draw(st.booleans())
    features = draw(st.sampled_from(((), (1,), (8,), (16,), (33,), (3, 5), (2, 0), (70,))))
    sizes = (batch, length) if batch_first else (length, batch)
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def fill(*shape):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 50).to(dtype)

    shape = draw(st.sampled_from(("plain", "slice", "other order", "expanded", "steps", "conjugate")))
    if shape == "slice":
        x = fill(sizes[0] + 2, sizes[1] + 3, *features)[1:-1, 2:-1]
    elif shape == "other order":
        x = fill(sizes[1], sizes[0], *features).transpose(0, 1)
    elif shape == "expanded":
        x = fill(sizes[0], 1, *features).expand(*sizes, *features)
    elif shape == "steps" and features:
        x = fill(*sizes, *features[:-1], 2 * features[-1])[..., ::2]
    elif shape == "conjugate" and dtype.is_complex:
        x = fill(*sizes, *features).conj()
    else:
        x = fill(*sizes, *features)
    keep = draw(st.integers(0, length))
    return x, ltd.sample_tokens(length, keep, batch, key=draw(KEYS)), batch_first


@settings(deadline=None, max_examples=150)
@given(states(), st.sampled_from(BACKENDS), st.booleans())
def test_gather_and_scatter_are_plain_indexing_bit_for_bit(case, backend, negate):
    x, index, batch_first = case
    options = {"batch_first": batch_first, "backend": backend}
    before = x.clone()
    part = ltd.gather_tokens(x, index, **options)
    assert same(part, plain_gather(x, index, batch_first)) and part.is_contiguous()
    assert same(ltd.scatter_tokens(x, part, index, **options), x)  # scatter(x, K, gather(x, K)) = x
    new = (part * 3 + 1).to(x.dtype).transpose(0, 1).contiguous().transpose(0, 1) if negate else part.flip(0)
    expected = plain_scatter(x, new, index, batch_first)
    y = ltd.scatter_tokens(x, new, index, **options)
    assert same(y, expected) and same(x, before) and y.is_contiguous()
    assert y.numel() == 0 or y.data_ptr() != x.data_ptr()
    target = x.resolve_conj().contiguous()
    target = target.clone() if target.data_ptr() == x.data_ptr() else target
    assert ltd.scatter_tokens(target, new, index, in_place=True, **options) is target
    assert same(target, expected)


@layouts
@pytest.mark.parametrize(("length", "keep"), [(2500, 2100), (4096, 17), (131072, 70000), (5, 5), (7, 0)])
def test_long_sequences_and_lengths_that_are_no_multiple_of_16(length, keep, batch_first):
    x = hidden(2, length, 3, batch_first=batch_first)
    index = ltd.sample_tokens(length, keep, 2, key=3)
    for backend in BACKENDS:
        options = {"batch_first": batch_first, "backend": backend}
        part = ltd.gather_tokens(x, index, **options)
        assert torch.equal(part, plain_gather(x, index, batch_first))
        assert torch.equal(
            ltd.scatter_tokens(x, -part, index, **options), plain_scatter(x, -part, index, batch_first)
        )


def test_threads_change_no_bit():
    x, before = hidden(3, 999, 300, batch_first=True), torch.get_num_threads()
    keys, found = list(range(40)), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            index = ltd.sample_layers(999, 500, 3, keys)
            y = ltd.apply_to_kept(torch.neg, x, index[7], batch_first=True)
            found.append((index, y))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@both
@layouts
def test_rows_of_a_table_are_gathered_for_each_sample(batch_first, backend):
    table, index = hidden(1, 30, 4, batch_first=True)[0], ltd.sample_tokens(30, 11, 3, key=8)
    ours = ltd.gather_rotary(table, index, batch_first=batch_first, backend=backend)
    assert torch.equal(ours, table[index if batch_first else index.T])
    positions = ltd.gather_rotary(torch.arange(30), index, batch_first=batch_first, backend=backend)
    assert torch.equal(positions, index if batch_first else index.T)


def test_in_place_scatter_of_rows_of_x_itself():
    index = torch.tensor([[1, 2, 5]])
    for backend in BACKENDS:
        x = torch.arange(12.0).view(1, 6, 2)
        ltd.scatter_tokens(x, x[:, :3], index, batch_first=True, in_place=True, backend=backend)
        assert x[0, :, 0].tolist() == [0, 0, 2, 6, 8, 4]


# ---- contract ----


def test_operators_keep_torchs_contract():
    ops = torch.ops.ds_efficient
    index = ltd.sample_tokens(9, 4, 2, key=1)
    x, part = torch.randn(2, 9, 3), torch.randn(2, 4, 3)
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    for backend in BACKENDS:
        every = (*quick, "test_aot_dispatch_dynamic") if backend == "native" else quick
        end = (index, True, backend)
        needs, needed = x.clone().requires_grad_(), part.clone().requires_grad_()
        for operator, arguments, checks in (
            (ops.ltd_sample, ([1, -5], 9, 4, 2, torch.device("cpu"), backend), quick),
            (ops.ltd_put_, (x.clone(), part, *end), quick),
            (ops.ltd_gather, (needs, *end), every),
            (ops.ltd_scatter, (needs, needed, *end), every),
            (ops.ltd_spread, (needed, index, 9, True, backend), quick),
            (ops.ltd_erase, (needs, *end), quick),
            (ops.ltd_split, (needs, *end), every),
        ):
            found = torch.library.opcheck(operator.default, arguments, test_utils=checks)
            assert set(found.values()) == {"SUCCESS"}, operator


def test_fake_and_meta_tensors_need_no_device_and_a_traced_function_gives_the_same():
    with FakeTensorMode():
        x = torch.empty(5, 9, 6, dtype=torch.bfloat16, device="cuda:0")
        index = ltd.sample_tokens(9, 4, 5, key=1, device="cuda:0")
        y = torch.ops.ds_efficient.ltd_scatter(x, x.new_empty(5, 4, 6), index, True, "auto")
        assert y.shape == x.shape and y.device.type == "cuda" and y.dtype == x.dtype
        x = torch.empty(9, 5, 6, requires_grad=True)
        index = ltd.sample_tokens(9, 4, 5, key=1)
        ltd.apply_to_kept(lambda p: p * 2, x, index, batch_first=False).sum().backward()
        assert x.grad.shape == x.shape
    meta = ltd.sample_tokens(9, 4, 5, key=1, device="meta")
    assert ltd.gather_tokens(torch.empty(9, 5, 2, device="meta"), meta, batch_first=False).shape == (4, 5, 2)

    index = ltd.sample_tokens(9, 4, 2, key=1)

    def step(x: torch.Tensor) -> torch.Tensor:
        y = ltd.apply_to_kept(lambda p: p.sin(), x * 2, index, batch_first=True)
        return ltd.scatter_tokens(y, ltd.gather_tokens(x, index, batch_first=True), index, batch_first=True)

    x = torch.randn(2, 9, 3, requires_grad=True)
    traced = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(traced, step(x))
    assert torch.equal(*(torch.autograd.grad((y * y).sum(), x)[0] for y in (traced, step(x))))


X, INDEX = torch.ones(2, 5, 3), torch.tensor([[0, 2], [1, 4]])
GOOD = {"batch_first": True}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ltd.sample_tokens(5, 6, 1, key=1), "keep=6"),
        (lambda: ltd.sample_tokens(-1, 0, 1, key=1), "length=-1"),
        (lambda: ltd.sample_tokens(5, 2, -1, key=1), "batch=-1"),
        (lambda: ltd.sample_tokens(5, 2, 1, key=2**64), "key=18446744073709551616"),
        (lambda: ltd.sample_tokens(5, 2, 1, key=1, backend="fast"), "backend='fast'"),
        (lambda: ltd.gather_tokens(X, INDEX, batch_first=True, backend="fast"), "backend='fast'"),
        (lambda: ltd.gather_tokens(X, INDEX, batch_first=False), r"\(length, batch, ...\) with batch 2"),
        (lambda: ltd.gather_tokens(X, INDEX.int(), **GOOD), "int32.*int64"),
        (lambda: ltd.gather_tokens(X, INDEX[0], **GOOD), r"shape \(2,\).*\(batch, keep\)"),
        (lambda: ltd.gather_tokens(X[0, 0], INDEX, **GOOD), r"x has shape \(3,\)"),
        (lambda: ltd.gather_tokens(X, torch.zeros(2, 6, dtype=torch.int64), **GOOD), "6 tokens.*has 5"),
        (lambda: ltd.gather_tokens(X, INDEX.flip(1), **GOOD), "ascending"),
        (lambda: ltd.gather_tokens(X, INDEX + 1, **GOOD), r"ascending within 0 \.\. 4"),
        (lambda: ltd.gather_tokens(X, INDEX - 1, **GOOD), "ascending"),
        (lambda: ltd.scatter_tokens(X, X[:, :2], INDEX * 0, **GOOD), "distinct"),
        (lambda: ltd.gather_tokens(X, INDEX.flip(1), backend="reference", **GOOD), "ascending"),
        (lambda: ltd.scatter_tokens(X, X, INDEX, **GOOD), r"shape \(2, 5, 3\).*expected.*\(2, 2, 3\)"),
        (lambda: ltd.scatter_tokens(X, X[:, :2].half(), INDEX, **GOOD), "float16.*float32.*convert"),
        (lambda: ltd.apply_to_kept(lambda p: p.double(), X, INDEX, **GOOD), "float64.*float32"),
        (lambda: ltd.gather_rotary(X, INDEX[0], batch_first=True), "table"),
        (
            lambda: ltd.scatter_tokens(X[..., ::2], X[:, :2, ::2], INDEX, in_place=True, **GOOD),
            "in_place=True.*gaps",
        ),
        (
            lambda: ltd.scatter_tokens(X[:1].expand(2, 5, 3), X[:, :2], INDEX, in_place=True, **GOOD),
            "in_place=True.*share memory",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_without_a_compiler_auto_gives_the_same_and_says_so_and_native_stops(monkeypatch, tmp_path, caplog):
    expected = ltd.gather_tokens(X, INDEX, backend="native", **GOOD)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.forget()
    try:
        with caplog.at_level("WARNING"):
            assert torch.equal(ltd.gather_tokens(X, INDEX, **GOOD), expected)
            ltd.sample_tokens(5, 2, 1, key=1)
        assert len([r for r in caplog.records if "no-such-compiler" in r.getMessage()]) == 1
        with pytest.raises(OpBuildError, match=r'no-such-compiler(.|\n)*backend="reference"'):
            ltd.gather_tokens(X, INDEX, backend="native", **GOOD)
    finally:
        native.forget()
