"""Random sketches: S bit for bit, S^T x in double precision, E[S S^T] = I, the contract of operators."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from ds_efficient.core.keys import Key
from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.ops import keyed_random, native, rmm, rmm_operators
from ds_efficient.ops import rmm_reference as reference

DTYPES = rmm.DTYPES
KEYS = st.integers(0, 2**64 - 1)
RATIOS = st.one_of(st.sampled_from((0.1, 0.125, 0.25, 0.5)), st.floats(0.01, 0.9))
WAYS = ("auto", "native", "reference", *rmm_operators.WAYS)
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def ways_of(sketch: str) -> list[str]:
    return [way for way in WAYS if way != "hadamard" or sketch == "srht"]


@st.composite
def partitions(draw, most=300):
    rows = draw(st.integers(0, most))
    block = draw(st.sampled_from((0, 1, 7, 8, 16, 33, 64, 100)))
    return rmm.partition(rows, draw(RATIOS), block_size=block, min_rows=draw(st.sampled_from((0, 1, 12))))


@st.composite
def matrices(draw, rows):
    """(rows, features): contiguous, transposed, a slice, every other column, one row expanded."""
    features, dtype = draw(st.integers(0, 70)), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from(("plain", "transposed", "slice", "steps", "expanded")))
    wide = torch.randn(rows + 2, 2 * features + 3, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "plain": lambda: wide[:rows, :features].contiguous(),
        "transposed": lambda: wide[:rows, :features].T.contiguous().T,
        "slice": lambda: wide[1 : rows + 1, 3 : features + 3],
        "steps": lambda: wide[:rows, : 2 * features : 2],
        "expanded": lambda: wide[:1, :features].expand(rows, features),
    }[shape]()


# ---- partition ----


@given(st.integers(0, 5000), RATIOS, st.integers(0, 700), st.integers(0, 200))
def test_partition_keeps_its_promises(rows, ratio, block_size, min_rows):
    parts = rmm.partition(rows, ratio, block_size=block_size, min_rows=min_rows)
    if rows == 0:
        assert parts.exact and parts.total == 0 and not parts.segments()
        return
    share = max(Fraction(str(ratio)), Fraction(min_rows, rows))
    assert parts.block == (min(block_size, rows) or rows)
    assert parts.full_blocks * parts.block + parts.last_rows == rows and parts.last_rows < parts.block
    for block, p in ((parts.block, parts.projected), (parts.last_rows, parts.last_projected)):
        assert p == block or (p % 8 == 0 and p < block)
        assert p == block or (share * block <= p < share * block + 8)
    assert parts.total >= min(rows, min_rows)
    assert parts.exact == (parts.projected == parts.block and parts.last_projected == parts.last_rows)
    assert sum(s.blocks * s.block for s in parts.segments()) == rows
    assert sum(s.blocks * s.projected for s in parts.segments()) == parts.total


@pytest.mark.parametrize(
    ("rows", "ratio", "block_size", "min_rows", "expected"),
    [
        (16384, 0.125, 512, 64, (16384, 512, 64, 0, 0)),
        (16384, 0.25, 0, 64, (16384, 16384, 4096, 0, 0)),
        (80, 0.1, 0, 1, (80, 80, 8, 0, 0)),  # 0.1 * 80 is more than 8 in floating point
        (1000, 0.125, 512, 1, (1000, 512, 64, 488, 64)),
        (600, 0.125, 512, 300, (600, 512, 256, 88, 48)),
        (64, 0.125, 512, 64, (64, 64, 64, 0, 0)),
        (5, 0.1, 512, 1, (5, 5, 5, 0, 0)),
    ],
)
def test_partition_by_hand(rows, ratio, block_size, min_rows, expected):
    assert rmm.partition(rows, ratio, block_size=block_size, min_rows=min_rows) == rmm.Partition(*expected)


# ---- S ----


@settings(deadline=None, max_examples=80)
@given(KEYS, partitions(), st.sampled_from(rmm.SKETCHES), st.sampled_from(DTYPES))
def test_native_and_reference_have_the_same_s_bit_for_bit(key, parts, sketch, dtype):
    ours = rmm.sketch_matrix(key, sketch, parts, dtype=dtype, backend="native")
    assert ours.shape == (parts.rows, parts.total) and ours.dtype == dtype
    assert torch.equal(ours, rmm.sketch_matrix(key, sketch, parts, dtype=dtype, backend="reference"))


def slow_s(key: int, sketch: str, parts: rmm.Partition) -> np.ndarray:
    """S element by element as the header defines it."""
    s, offset = np.zeros((parts.rows, parts.total)), 0
    words = keyed_random.random_bits(key, 60_000).numpy().view(np.uint32).tolist()
    normals = keyed_random.normal(key, 60_000).tolist()
    for number, start in enumerate(range(0, parts.rows, parts.block)):
        full = parts.rows - start >= parts.block
        b, p = (parts.block, parts.projected) if full else (parts.last_rows, parts.last_projected)
        n = {"rows": b, "srht": 2 ** math.ceil(math.log2(b))}.get(sketch, 0)
        chosen = keyed_random.sample_k_of_n(key, n, p, offset=number)[0].tolist() if n else []
        for local in range(b):
            i, before = start + local, 0 if full else start
            for c in range(p):
                if sketch == "gaussian":
                    e = normals[before * parts.projected + (i - before) * p + c] / math.sqrt(p)
                elif sketch == "rademacher":
                    word = (
                        before * math.ceil(parts.projected / 32) + (i - before) * math.ceil(p / 32) + c // 32
                    )
                    e = (-1) ** (words[word] >> c % 32) / math.sqrt(p)
                elif sketch == "srht":
                    sign = words[i // 32] >> i % 32
                    e = (-1) ** (sign + (local & chosen[c]).bit_count()) / math.sqrt(p)
                elif sketch == "count":
                    e = (-1) ** words[i] if c == (words[i] >> 1) * p >> 31 else 0
                else:
                    e = math.sqrt(b / p) * (local == chosen[c])
                s[i, offset + c] = e
        offset += p
    return s


@pytest.mark.parametrize("sketch", rmm.SKETCHES)
@pytest.mark.parametrize(("rows", "block"), [(100, 33), (90, 0), (64, 16)])
def test_s_is_what_the_header_defines(sketch, rows, block):
    parts = rmm.partition(rows, 0.4, block_size=block, min_rows=1)
    assert not parts.exact
    ours = rmm.sketch_matrix(11, sketch, parts, dtype=torch.float64)
    np.testing.assert_allclose(ours.numpy(), slow_s(11, sketch, parts), rtol=1e-15, atol=0)


@settings(deadline=None, max_examples=30)
@given(KEYS, partitions(), st.sampled_from(rmm.SKETCHES))
def test_columns_of_s_have_the_shape_of_their_sketch(key, parts, sketch):
    s = rmm.sketch_matrix(key, sketch, parts, dtype=torch.float64)
    inside = torch.block_diag(
        *(torch.ones(b.block, b.projected) for b in parts.segments() for _ in range(b.blocks))
    ).view(s.shape)
    if parts.exact:
        assert torch.equal(s, torch.eye(parts.rows, dtype=torch.float64))
        return
    assert not (s * (1 - inside)).any()
    if sketch in ("rademacher", "srht"):
        assert torch.allclose((s * s).sum(1), torch.ones(parts.rows, dtype=torch.float64))
    if sketch == "count":
        assert torch.equal(s.abs().sum(1), torch.ones(parts.rows, dtype=torch.float64))
    if sketch == "rows":
        assert torch.equal((s != 0).sum(0), torch.ones(parts.total, dtype=torch.int64))
        assert (s != 0).sum(1).max() == 1


@pytest.mark.parametrize("sketch", rmm.SKETCHES)
@pytest.mark.parametrize(("rows", "block"), [(24, 0), (40, 16)])
def test_expectation_of_s_s_transposed_is_the_identity(sketch, rows, block):
    parts, draws = rmm.partition(rows, 0.3, block_size=block, min_rows=1), 1500
    total = torch.zeros(rows, rows, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for draw in range(draws):
        s = rmm.sketch_matrix(Key(3).fold("unbiased", draw), sketch, parts, dtype=torch.float64)
        product = s @ s.T
        total += product
        squares += product**2
    mean = total / draws
    deviation = ((squares / draws - mean**2).clamp(min=0) / draws).sqrt()
    # A last block no longer than 8 rows keeps them all: its deviation may be 0.
    assert ((mean - torch.eye(rows)).abs() <= 5 * deviation + 1e-12).all()
    assert (deviation > 0).any()


# ---- S^T x ----


def check_projection(x: torch.Tensor, key: int, sketch: str, parts: rmm.Partition, backend: str) -> None:
    ours = rmm.project(x, key, sketch, parts, backend=backend)
    assert ours.shape == (parts.total, x.shape[1]) and ours.dtype == x.dtype
    if parts.exact:
        assert torch.equal(ours, x)
        return
    s = torch.zeros(parts.rows, parts.total, dtype=torch.float64)
    for part in parts.segments():  # S of the elements as x's dtype holds them
        rows, chosen = part.blocks * part.block, reference.chosen(key, sketch, part, s.device)
        unit = reference.units(key, sketch, part, chosen, 0, rows, x.dtype, s.device).double()
        for j in range(part.blocks):
            first, column = part.base_row + j * part.block, part.first_out + j * part.projected
            s[first : first + part.block, column : column + part.projected] = unit[
                j * part.block : (j + 1) * part.block
            ] * part.scale(sketch)
    exact, size = s.T @ x.double(), s.abs().T @ x.double().abs()
    sums = EPS[torch.float64 if x.dtype == torch.float64 else torch.float32] * (4 + math.sqrt(parts.block))
    error = (ours.double() - exact).abs()
    assert (error <= EPS[x.dtype] * exact.abs() + 2 * sums * size + 2.0**-24).all()


@settings(deadline=None, max_examples=120)
@given(st.data(), KEYS, partitions(), st.sampled_from(rmm.SKETCHES))
def test_projection_equals_s_transposed_x(data, key, parts, sketch):
    x = data.draw(matrices(parts.rows))
    check_projection(x, key, sketch, parts, data.draw(st.sampled_from(ways_of(sketch))))


@pytest.mark.parametrize("sketch", rmm.SKETCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_of_all_rows_at_once_goes_by_chunks(sketch, dtype):
    rows = 2 * reference.CHUNK + 300
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, 9))).to(dtype)
    parts = rmm.partition(rows, 0.01, block_size=0)
    for backend in ways_of(sketch)[1:]:
        check_projection(x, 2**63 + 5, sketch, parts, backend)


@pytest.fixture
def few_at_once(monkeypatch):
    """Batches of 3 blocks of 260 rows and 136 columns."""
    monkeypatch.setattr(rmm_operators, "_AT_ONCE", 3 * 260 * 136)
    rmm_operators._plan.cache_clear()
    yield
    rmm_operators._plan.cache_clear()


@pytest.mark.parametrize("way", ["gemm", "fused"])
def test_wide_panels_and_several_batches_of_blocks(way, few_at_once):
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2200, 130))).to(torch.bfloat16)
    for sketch in ("gaussian", "rademacher", "srht", "count"):
        check_projection(x, 9, sketch, rmm.partition(2200, 0.5, block_size=260), way)


@pytest.mark.parametrize("sketch", rmm.SKETCHES)
def test_threads_and_repetition_change_no_bit(sketch):
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((1500, 300))).to(torch.bfloat16)
    parts, before = rmm.partition(1500, 0.125, block_size=512), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 1, 3):
            torch.set_num_threads(threads)
            found.append(rmm.project(x, 4, sketch, parts, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_values_beyond_the_range_of_float16_and_nan_stay_what_they_are():
    parts = rmm.partition(64, 0.25, block_size=0)
    x = torch.zeros(64, 5, dtype=torch.float16)
    x[:, 0], x[3, 1], x[3, 2], x[3, 3], x[:, 4] = 65504, math.inf, math.nan, -math.inf, 2.0**-24
    for sketch in rmm.SKETCHES:
        # Where S is 0, whether infinity times 0 is added depends on the way.
        used = x[:, [0, 4]] if sketch in ("count", "rows") else x
        expected = rmm.project(used, 8, sketch, parts, backend="reference")
        assert expected[:, 0].isinf().any() and expected[:, -1].any()
        for backend in ways_of(sketch):
            if backend != "gemm":  # a library's product of 16-bit matrices may overflow on the way
                ours = rmm.project(used, 8, sketch, parts, backend=backend)
                torch.testing.assert_close(ours, expected, rtol=2.0**-10, atol=2.0**-24, equal_nan=True)


def test_another_key_gives_another_projection_and_a_key_object_its_number():
    x, parts = torch.ones(64, 3), rmm.partition(64, 0.25)
    key = Key(1).fold("rmm", "layer", 3)
    for sketch in rmm.SKETCHES:
        ours = rmm.sketch_matrix(key, sketch, parts)
        assert torch.equal(ours, rmm.sketch_matrix(key.value, sketch, parts))
        assert not torch.equal(ours, rmm.sketch_matrix(key.fold(1), sketch, parts))
        assert torch.equal(rmm.project(x, key, sketch, parts), rmm.project(x, key.value, sketch, parts))


def test_no_global_random_state_is_read_or_written():
    x, parts = torch.ones(100, 4), rmm.partition(100, 0.25, block_size=32)
    torch.manual_seed(0)
    random.seed(0)
    before, python = torch.get_rng_state(), random.getstate()
    results = [
        [rmm.project(x, 1, s, parts, backend=b) for s in rmm.SKETCHES for b in ways_of(s)] for _ in "ab"
    ]
    assert torch.equal(before, torch.get_rng_state()) and python == random.getstate()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_input_that_needs_a_gradient_is_projected_without_one():
    x = torch.ones(100, 4, requires_grad=True)
    for way in ways_of("srht"):
        assert not rmm.project(x, 1, "srht", rmm.partition(100, 0.25), backend=way).requires_grad
    assert not rmm.project(x, 1, "srht", rmm.partition(100, 1.0)).requires_grad


# ---- contract ----


def test_operators_keep_torchs_contract():
    ops, quick = torch.ops.ds_efficient, ("test_schema", "test_autograd_registration", "test_faketensor")
    for sketch in rmm.SKETCHES:
        for backend in ("native", "reference"):
            for operator, arguments in (
                (ops.rmm_project, (torch.ones(100, 6), 5, sketch, 32, 8, 4, backend)),
                (ops.rmm_matrix, (5, sketch, 100, 32, 8, 4, torch.bfloat16, torch.device("cpu"), backend)),
            ):
                checks = torch.library.opcheck(operator.default, arguments, test_utils=quick)
                assert set(checks.values()) == {"SUCCESS"}, (operator, sketch)


def test_fake_and_meta_tensors_need_no_device_and_a_traced_function_gives_the_same():
    parts = rmm.partition(100, 0.25, block_size=32)
    with FakeTensorMode():
        x = torch.empty(100, 6, dtype=torch.bfloat16, device="cuda:0")
        ours = rmm.project(x, 1, "gaussian", parts)
        assert ours.shape == (parts.total, 6) and ours.device.type == "cuda" and ours.dtype == x.dtype
    assert rmm.project(torch.empty(100, 6, device="meta"), 1, "rows", parts).shape == (parts.total, 6)
    assert rmm.sketch_matrix(1, "rows", parts, device="meta").shape == (100, parts.total)

    def step(x: torch.Tensor) -> torch.Tensor:
        return rmm.project(x * 2, 7, "rademacher", parts) + 1

    x = torch.arange(600.0).view(100, 6)
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(x), step(x))


X, PARTS = torch.ones(100, 4), rmm.partition(100, 0.25, block_size=32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rmm.project(X, 1, "gauss", PARTS), "sketch='gauss'"),
        (lambda: rmm.project(X, -1, "rows", PARTS), "key=-1"),
        (lambda: rmm.project(X, 1, "rows", PARTS, backend="fast"), "backend='fast'"),
        (lambda: rmm.project(X, 1, "count", PARTS, backend="hadamard"), '"hadamard".*srht'),
        (lambda: rmm.project(X[0], 1, "rows", PARTS), "shape"),
        (lambda: rmm.project(X.to(torch.int32), 1, "rows", PARTS), "int32"),
        (lambda: rmm.project(X[:99], 1, "rows", PARTS), "99 rows.*100"),
        (lambda: rmm.sketch_matrix(1, "rows", PARTS, dtype=torch.int8), "int8"),
        (lambda: rmm.sketch_matrix(1, "rows", PARTS, backend="fused"), "backend='fused'"),
        (lambda: rmm.partition(-1, 0.5), "rows=-1"),
        (lambda: rmm.partition(10, 0.0), "ratio=0.0"),
        (lambda: rmm.partition(10, math.nan), "ratio=nan"),
        (lambda: rmm.partition(10, 0.5, block_size=-8), "block_size=-8"),
        (lambda: rmm.partition(10, 0.5, min_rows=-1), "min_rows=-1"),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_without_a_compiler_auto_gives_the_same_s_and_says_so_and_native_stops(monkeypatch, tmp_path, caplog):
    expected = rmm.sketch_matrix(5, "gaussian", PARTS, backend="native")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.forget()
    try:
        with caplog.at_level("WARNING"):
            assert torch.equal(rmm.sketch_matrix(5, "gaussian", PARTS), expected)
            assert torch.allclose(rmm.project(X, 5, "gaussian", PARTS), expected.T @ X, atol=1e-5)
        assert len([r for r in caplog.records if "no-such-compiler" in r.getMessage()]) == 1
        with pytest.raises(OpBuildError, match=r'no-such-compiler(.|\n)*backend="reference"'):
            rmm.project(X, 5, "gaussian", PARTS, backend="native")
    finally:
        native.forget()
