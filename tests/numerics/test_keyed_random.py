"""Keyed random numbers: known answers, the same bits from every backend, and the operator's contract."""

from __future__ import annotations

import random
import subprocess
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from ds_efficient.core.keys import Key
from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.op_builder import toolchain
from ds_efficient.op_builder.all_ops import CSRC
from ds_efficient.ops import keyed_random as kr
from ds_efficient.ops import keyed_random_reference as reference
from ds_efficient.ops import native
from ds_efficient.ops.keyed_random_native import Library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEYS = st.integers(0, 2**64 - 1)
SHAPES = st.lists(st.integers(0, 40), max_size=3)
OFFSETS = st.one_of(st.integers(0, 300), st.integers(0, 2**62))

# Random123, kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    view = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(view), b.view(view))


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_reference_gives_the_published_philox_answers(counter, key, answer):
    low, high = numbers(key)
    words = reference.philox(low | high << 32, *(torch.tensor([c]) for c in numbers(counter)))
    assert [int(word) for word in words] == numbers(answer)


def test_header_gives_the_published_philox_answers(tmp_path):
    calls = ""
    for counter, key, _ in KNOWN_ANSWERS:
        low, high = key.split()
        calls += f"  show(philox(0x{high}{low}ull, {', '.join(f'0x{word}u' for word in counter.split())}));\n"
    (tmp_path / "t.cpp").write_text(
        '#include <cstdio>\n#include "keyed_random.h"\nusing namespace ds_efficient::keyed;\n'
        "void show(Block b) {\n"
        '  std::printf("%08x %08x %08x %08x\\n", b.word[0], b.word[1], b.word[2], b.word[3]);\n}\n'
        f"int main() {{\n{calls}}}\n"
    )
    compiler = toolchain.find_cxx()
    subprocess.run(
        [*compiler, f"-I{CSRC}/common", str(tmp_path / "t.cpp"), "-o", str(tmp_path / "t")], check=True
    )
    done = subprocess.run([str(tmp_path / "t")], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [answer for _, _, answer in KNOWN_ANSWERS]


def test_words_follow_the_documented_counter_layout():
    answer = numbers(KNOWN_ANSWERS[0][2])
    for backend in ("native", "reference"):
        bits = kr.random_bits(0, 4, backend=backend).to(torch.int64) & 0xFFFFFFFF
        assert bits.tolist() == answer


@settings(deadline=None, max_examples=60)
@given(KEYS, SHAPES, OFFSETS, st.sampled_from(DTYPES))
def test_native_equals_reference_bit_for_bit(key, shape, offset, dtype):
    for draw in (kr.uniform, kr.normal):
        ours = draw(key, shape, dtype=dtype, offset=offset, backend="native")
        assert ours.shape == torch.Size(shape)
        assert same_bits(ours, draw(key, shape, dtype=dtype, offset=offset, backend="reference"))
    ours = kr.random_bits(key, shape, offset=offset, backend="native")
    assert same_bits(ours, kr.random_bits(key, shape, offset=offset, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_equals_reference_on_half_a_million_elements(dtype):
    for draw in (kr.uniform, kr.normal):
        a = draw(77, 500_001, dtype=dtype, offset=2**35 - 3, backend="native")
        assert same_bits(a, draw(77, 500_001, dtype=dtype, offset=2**35 - 3, backend="reference"))


@settings(deadline=None, max_examples=60)
@given(KEYS, st.integers(0, 300), st.data())
def test_choice_native_equals_reference_and_is_sorted_distinct_in_range(key, n, data):
    k = data.draw(st.integers(0, n))
    batch, offset = data.draw(st.integers(0, 4)), data.draw(OFFSETS)
    ours = kr.sample_k_of_n(key, n, k, batch=batch, offset=offset, backend="native")
    assert same_bits(ours, kr.sample_k_of_n(key, n, k, batch=batch, offset=offset, backend="reference"))
    assert ours.shape == (batch, k)
    if k and batch:
        assert ours.min() >= 0 and ours.max() < n
        assert (ours.diff(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("n", "k", "batch"), [(100_001, 5, 2), (2_000_000, 1000, 1), (4096, 4096, 2), (2048, 1024, 8)]
)
def test_choice_native_equals_reference_for_large_n(n, k, batch):
    ours = kr.sample_k_of_n(5, n, k, batch=batch, backend="native")
    assert same_bits(ours, kr.sample_k_of_n(5, n, k, batch=batch, backend="reference"))


def test_choice_of_all_and_of_none():
    assert torch.equal(kr.sample_k_of_n(1, 7, 7, batch=2), torch.arange(7).expand(2, 7))
    assert kr.sample_k_of_n(1, 7, 0, batch=2).shape == (2, 0)
    assert kr.sample_k_of_n(1, 0, 0, batch=2).shape == (2, 0)
    assert kr.sample_k_of_n(1, 7, 3, batch=0).shape == (0, 3)


@settings(deadline=None, max_examples=40)
@given(
    KEYS,
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(0, 1000),
    st.sampled_from(("native", "reference")),
)
def test_a_sub_range_is_generated_alone(key, start, size, offset, backend):
    for draw in (kr.random_bits, kr.uniform, kr.normal):
        whole = draw(key, 400, offset=offset, backend=backend)
        assert torch.equal(
            draw(key, size, offset=offset + start, backend=backend), whole[start : start + size]
        )


def test_rows_of_a_choice_are_generated_alone_and_nest_with_k():
    whole = kr.sample_k_of_n(3, 50, 20, batch=9)
    assert torch.equal(kr.sample_k_of_n(3, 50, 20, batch=4, offset=5), whole[5:])
    smaller = kr.sample_k_of_n(3, 50, 8, batch=9)
    assert all(set(a) < set(b) for a, b in zip(smaller.tolist(), whole.tolist(), strict=True))


def test_number_of_threads_changes_nothing():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((kr.normal(8, 400_001, offset=3), kr.sample_k_of_n(8, 1000, 10, batch=400)))
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0][0], results[1][0]) and same_bits(results[0][1], results[1][1])


def test_sixteen_bit_numbers_are_the_rounded_float32_numbers():
    for dtype in (torch.bfloat16, torch.float16):
        assert same_bits(kr.normal(4, 200_000, dtype=dtype), kr.normal(4, 200_000).to(dtype))
        rounded = kr.uniform(4, 200_000).to(dtype)
        ours = kr.uniform(4, 200_000, dtype=dtype)
        assert ours.max() < 1 and rounded.max() == 1
        assert torch.equal(ours[rounded < 1], rounded[rounded < 1])


def test_normal_is_the_quantile_of_its_word_to_the_last_word():
    generator = np.random.default_rng(0)
    low = generator.integers(0, 2**31, 5000)  # central
    high = (
        2**31 - 1 - (2.0 ** (31 * generator.random(5000))).astype(np.int64).clip(1, 2**31 - 1) + 1
    )  # tail, log-uniform
    words = np.unique(np.concatenate([low, high, [0, 1, 2**31 - 2, 2**31 - 1]]))
    z = reference.normal_from_words(torch.from_numpy(words)).to(torch.float64).numpy()
    exact = np.array([-NormalDist().inv_cdf((2**31 - 0.5 - word) / 2**32) for word in words])
    assert np.abs(z / exact - 1).max() < 3e-7
    assert 6.33 < z.max() < 6.34
    mirrored = reference.normal_from_words(torch.from_numpy(2**32 - 1 - words)).to(torch.float64).numpy()
    assert (mirrored == -z).all()


def test_reference_fma_rounds_once():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20_000, generator=generator) for _ in range(2))
    c = -(a * b) * (1 + 2.0**-20 * torch.randn(20_000, generator=generator))  # cancellation
    tie = torch.tensor([1 + 2.0**-12]), torch.tensor([1 + 2.0**-12]), torch.tensor([2.0**-60])
    for x, y, z in ((a, b, c), tie):
        exact = [_round_fraction(p, q, r) for p, q, r in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)]
        assert reference._fma(x, y, z).tolist() == exact


def _round_fraction(a: float, b: float, c: float) -> float:
    """a * b + c in exact rational arithmetic, rounded once to float32."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    near = np.float32(float(exact))
    candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    best = min(candidates, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.int32)) & 1))
    return float(best)


def test_global_random_states_are_untouched():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for backend in ("native", "reference"):
        kr.random_bits(1, 9, backend=backend)
        kr.uniform(1, 9, backend=backend)
        kr.normal(1, 9, backend=backend)
        kr.sample_k_of_n(1, 9, 3, backend=backend)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_operators_keep_torchs_contract():
    cpu = torch.device("cpu")
    for name, arguments in (
        ("keyed_bits", (-5, [3, 4], 2, cpu, "native")),
        ("keyed_uniform", (-5, [3, 4], 2, torch.bfloat16, cpu, "auto")),
        ("keyed_normal", (5, [], 2, torch.float32, cpu, "reference")),
        ("keyed_choice", (5, 10, 3, 2, 0, cpu, "auto")),
    ):
        checks = torch.library.opcheck(getattr(torch.ops.ds_efficient, name).default, arguments)
        assert set(checks.values()) == {"SUCCESS"}


def test_fake_and_meta_tensors_need_no_device():
    with FakeTensorMode():
        assert kr.normal(1, (2, 3), dtype=torch.float16, device="cuda:0").shape == (2, 3)
        assert kr.sample_k_of_n(1, 9, 4, batch=5).dtype == torch.int64
    made = kr.uniform(1, (2, 3), device="meta")
    assert made.is_meta and made.shape == (2, 3)


def test_traced_function_draws_the_same_numbers():
    named = Key(3).fold("a")

    def step(x: torch.Tensor, key: int) -> torch.Tensor:
        return x + kr.normal(key, x.shape) + kr.uniform(named, x.shape)

    traced = torch.compile(step, backend="aot_eager", fullgraph=True)
    for size, key in ((3, 7), (4, 2**64 - 1), (5, 2**63)):
        x = torch.ones(size, 2)
        assert torch.equal(traced(x, key), step(x, key))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kr.normal(-1, 3), r"key=-1 is out of range"),
        (lambda: kr.normal(2**64, 3), r"0 <= key < 2\^64"),
        (lambda: kr.normal(1, (2, -3)), r"shape=\(2, -3\)"),
        (lambda: kr.normal(1, 3, offset=-1), r"offset=-1"),
        (lambda: kr.normal(1, 3, offset=2**63 - 1), r"offset \+ elements"),
        (lambda: kr.normal(1, 3, dtype=torch.float64), r"dtype=torch.float64.*torch.float32"),
        (lambda: kr.normal(1, 3, backend="cuda"), r"backend='cuda'.*reference"),
        (lambda: kr.sample_k_of_n(1, 4, 5), r"k=5.*n=4"),
        (lambda: kr.sample_k_of_n(1, 2**31, 5), r"n=2147483648"),
        (lambda: kr.sample_k_of_n(1, 4, 2, batch=-1), r"negative"),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_without_a_compiler_auto_gives_the_same_bits_and_says_so_and_native_stops(
    monkeypatch, tmp_path, caplog
):
    expected = kr.normal(5, 1000, backend="native")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.forget()
    try:
        with caplog.at_level("WARNING"):
            assert same_bits(kr.normal(5, 1000), expected)
            kr.normal(5, 1000)
        assert len([r for r in caplog.records if "no-such-compiler" in r.getMessage()]) == 1
        with pytest.raises(OpBuildError, match=r'no-such-compiler(.|\n)*backend="reference"'):
            kr.normal(5, 1000, backend="native")
    finally:
        native.forget()


def test_devices_without_native_code_are_refused_by_name():
    with pytest.raises(OpBuildError, match="'mps'"):
        Library.for_device(torch.device("mps"), "auto")
