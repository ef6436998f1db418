"""N:M sparse matrices: plain torch and C++ against slow loops, the paper's figures, torch's contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.ops import native, slope

PATTERNS = ((1, 2), (2, 4), (1, 4), (2, 8), (4, 8), (2, 16), (3, 32))
OPERAND_PATTERNS = ((1, 2), (2, 4), (1, 4), (2, 8), (2, 16), (1, 32))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("native", "reference")
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(INTEGER[x.element_size()]).numpy()


def draw_mask(rng: np.random.Generator, rows: int, columns: int, n: int, m: int) -> np.ndarray:
    order = rng.random((rows, columns // m, m)).argsort(axis=-1)
    return (order < n).reshape(rows, columns)


def draw_values(rng: np.random.Generator, rows: int, columns: int, dtype: torch.dtype, special: bool):
    """Gaussian, or few different values: many ties, zeros of both signs, infinities and NaNs."""
    if special:
        few = np.array([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, np.inf, -np.inf, np.nan, -np.nan])
        return torch.from_numpy(rng.choice(few, (rows, columns))).to(dtype)
    return torch.from_numpy(rng.standard_normal((rows, columns))).to(dtype)


class Slow:
    """The definitions written as loops, on arrays of bits."""

    @staticmethod
    def pack(mask: np.ndarray) -> np.ndarray:
        rows, columns = mask.shape
        packed = np.zeros((rows, 4 * ((columns + 31) // 32)), np.uint8)
        for row, column in zip(*mask.nonzero(), strict=True):
            packed[row, column // 8] |= 1 << (column % 8)
        return packed

    @staticmethod
    def dense(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        dense = np.zeros(mask.shape, values.dtype)
        for row in range(mask.shape[0]):
            kept = [column for column in range(mask.shape[1]) if mask[row, column]]
            for place, column in enumerate(kept):
                dense[row, column] = values[row, place]
        return dense

    @staticmethod
    def columns(values: np.ndarray, mask: np.ndarray, n: int, m: int) -> np.ndarray:
        magnitude = Slow.dense(values, mask) & np.iinfo(values.dtype).max
        chosen = np.zeros_like(mask)
        for column in range(mask.shape[1]):
            for start in range(0, mask.shape[0], m):
                kept = [row for row in range(start, start + m) if mask[row, column]]
                for row in sorted(kept, key=lambda row: (-int(magnitude[row, column]), row))[:n]:
                    chosen[row, column] = True
        return chosen

    @staticmethod
    def slots(mask_row: np.ndarray) -> list[int]:
        chosen: list[int] = []
        for start in range(0, len(mask_row), 4):
            group = [j for j in range(4) if mask_row[start + j]]
            free = [j for j in range(4) if not mask_row[start + j]]
            chosen += [start + j for j in sorted((group + free)[: max(2, len(group))])]
        return chosen

    @staticmethod
    def operand(dense: np.ndarray, mask: np.ndarray) -> np.ndarray:
        rows = [
            [row[j] if kept[j] else 0 for j in Slow.slots(kept)]
            for row, kept in zip(dense, mask, strict=True)
        ]
        return np.array(rows, dense.dtype).reshape(mask.shape[0], mask.shape[1] // 2)


@st.composite
def matrices(draw, patterns=PATTERNS, dtypes=DTYPES, whole_groups=False):
    """Pattern, bool mask, values, packed mask."""
    n, m = draw(st.sampled_from(patterns))
    rows = draw(st.integers(0, 3)) * max(4, m) if whole_groups else draw(st.integers(0, 21))
    columns = draw(st.integers(0, max(2, 140 // m))) * m
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = draw_mask(rng, rows, columns, n, m)
    dtype, special = draw(st.sampled_from(dtypes)), draw(st.booleans())
    values = draw_values(rng, rows, columns // m * n, dtype, special)
    return n, m, mask, values, slope.pack_mask(torch.from_numpy(mask))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 6), st.integers(0, 200), st.integers(0, 2**32))
def test_packed_masks_have_the_documented_layout_and_unpack_to_themselves(rows, columns, seed):
    mask = np.random.default_rng(seed).random((rows, columns)) < 0.5
    packed = slope.pack_mask(torch.from_numpy(mask))
    assert (packed.numpy() == Slow.pack(mask)).all() and packed.shape == Slow.pack(mask).shape
    assert (slope.unpack_mask(packed, columns).numpy() == mask).all()


@settings(deadline=None, max_examples=80)
@given(matrices())
def test_decompress_and_compress_equal_the_loops_and_undo_each_other(drawn):
    n, m, mask, values, packed = drawn
    columns = mask.shape[1]
    expected = Slow.dense(bits(values), mask)
    other = draw_values(np.random.default_rng(1), *mask.shape, values.dtype, False)
    for backend in BACKENDS:
        dense = slope.decompress(values, packed, columns, n=n, m=m, backend=backend)
        assert dense.dtype == values.dtype and (bits(dense) == expected).all()
        into = torch.full_like(dense, 3)
        assert slope.decompress(values, packed, columns, n=n, m=m, out=into, backend=backend) is into
        assert (bits(into) == expected).all()
        back = slope.compress(dense, packed, n=n, m=m, backend=backend)
        assert (bits(back) == bits(values)).all()
        masked = slope.decompress(
            slope.compress(other, packed, n=n, m=m, backend=backend), packed, columns, n=n, m=m
        )
        assert (bits(masked) == np.where(mask, bits(other), 0)).all()


@settings(deadline=None, max_examples=80)
@given(matrices(whole_groups=True))
def test_column_pass_keeps_the_largest_magnitudes_and_the_lower_index_of_equal_ones(drawn):
    n, m, mask, values, packed = drawn
    columns = mask.shape[1]
    expected = Slow.columns(bits(values), mask, n, m)
    counts = expected.reshape(mask.shape[0] // m, m, columns).sum(axis=1)
    before = mask.reshape(mask.shape[0] // m, m, columns).sum(axis=1)
    assert (counts == np.minimum(before, n)).all() and (expected <= mask).all()
    for backend in BACKENDS:
        chosen = slope.select_columns(values, packed, columns, n=n, m=m, backend=backend)
        assert (chosen.numpy() == Slow.pack(expected)).all()
        twice = slope.decompress(values, packed, columns, n=n, m=m, backward_mask=chosen, backend=backend)
        assert (bits(twice) == np.where(expected, Slow.dense(bits(values), mask), 0)).all()


@settings(deadline=None, max_examples=80)
@given(matrices(OPERAND_PATTERNS, DTYPES[:3], whole_groups=True), st.data())
def test_operands_equal_the_loops_for_any_range_of_rows(drawn, data):
    n, m, mask, values, packed = drawn
    rows, columns = mask.shape
    twice = Slow.columns(bits(values), mask, n, m)
    dense = Slow.dense(bits(values), mask)
    cases = [(None, rows, columns, Slow.operand(dense, mask))] if columns % 4 == 0 else []
    cases.append((torch.from_numpy(Slow.pack(twice)), columns, rows, Slow.operand(dense.T, twice.T)))
    for backward, length, width, expected in cases:
        first = data.draw(st.integers(0, length))
        count = data.draw(st.integers(0, length - first))
        for backend in BACKENDS:
            buffer = torch.full((count * width // 2 + 11,), 3, dtype=values.dtype)
            start = data.draw(st.integers(0, 8))
            out = buffer[start : start + count * width // 2].view(count, width // 2)
            slope.write_operand(
                values, packed, out, columns, n=n, m=m, backward_mask=backward, first_row=first,
                backend=backend,
            )  # fmt: skip
            assert (bits(out) == expected[first : first + count]).all()
            assert (buffer[:start] == 3).all() and (buffer[start + out.numel() :] == 3).all()


@settings(deadline=None, max_examples=40)
@given(matrices(OPERAND_PATTERNS, DTYPES[:3], whole_groups=True))
def test_operand_pattern_has_ones_at_the_two_slots_of_every_group(drawn):
    n, m, mask, values, packed = drawn
    columns = mask.shape[1]
    twice = Slow.columns(bits(values), mask, n, m)
    cases = [(packed, mask, False)] if columns % 4 == 0 else []
    cases.append((torch.from_numpy(Slow.pack(twice)), twice.T, True))
    for backend in BACKENDS:
        for given_mask, plain, transposed in cases:
            made = slope.operand_pattern(
                given_mask, columns, dtype=values.dtype, transposed=transposed, backend=backend
            )
            expected = np.zeros(plain.shape)
            for row, kept in enumerate(plain):
                expected[row, Slow.slots(kept)] = 1
            assert made.dtype == values.dtype and (made.double().numpy() == expected).all()


def test_zero_values_that_are_kept_stay_kept():
    mask = torch.tensor([[True, True, False, False]] * 4)
    packed, values = slope.pack_mask(mask), torch.zeros(4, 2)
    for backend in BACKENDS:
        chosen = slope.select_columns(values, packed, 4, n=2, m=4, backend=backend)
        assert slope.unpack_mask(chosen, 4).tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_equals_reference_on_a_large_matrix_for_any_number_of_threads(dtype):
    rng = np.random.default_rng(3)
    before = torch.get_num_threads()
    try:
        for n, m in ((2, 4), (3, 32), (1, 16)):
            rows, columns = 576, 1056
            packed = slope.pack_mask(torch.from_numpy(draw_mask(rng, rows, columns, n, m)))
            values = draw_values(rng, rows, columns // m * n, dtype, False)
            expected = everything(values, packed, columns, n, m, "reference")
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                ours = everything(values, packed, columns, n, m, "native")
                assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def everything(
    values: torch.Tensor, packed: torch.Tensor, columns: int, n: int, m: int, backend: str
) -> list[torch.Tensor]:
    """The results of every function that takes these arguments."""
    chosen = slope.select_columns(values, packed, columns, n=n, m=m, backend=backend)
    dense = slope.decompress(values, packed, columns, n=n, m=m, backend=backend)
    twice = slope.decompress(values, packed, columns, n=n, m=m, backward_mask=chosen, backend=backend)
    results = [chosen, dense, twice, slope.compress(twice, packed, n=n, m=m, backend=backend)]
    if slope.fits_operand(n, m) and values.element_size() < 8:
        for backward, rows, width in ((None, values.shape[0], columns), (chosen, columns, values.shape[0])):
            out = torch.empty(rows, width // 2, dtype=values.dtype)
            slope.write_operand(
                values, packed, out, columns, n=n, m=m, backward_mask=backward, backend=backend
            )
            mask, transposed = (packed, False) if backward is None else (backward, True)
            results += [
                out,
                slope.operand_pattern(
                    mask, columns, dtype=values.dtype, transposed=transposed, backend=backend
                ),
            ]
    return results


@pytest.mark.parametrize(
    ("n", "m", "percent"), [(1, 2, 12.5), (2, 4, 9.375), (2, 8, 5.84), (1, 4, 7.91), (2, 16, 3.16)]
)
def test_column_pass_takes_the_share_that_the_formula_says(n, m, percent):
    """2:8 gives 5.84 %, not the 3.39 % of the paper's text."""
    assert 100 * slope.expected_extra_zeros(n, m) == pytest.approx(percent, abs=0.005)
    rng = np.random.default_rng(n * m)
    mask = draw_mask(rng, 1024, 2048, n, m)
    values = draw_values(rng, 1024, 2048 // m * n, torch.float32, False)
    packed = slope.pack_mask(torch.from_numpy(mask))
    chosen = slope.unpack_mask(slope.select_columns(values, packed, 2048, n=n, m=m), 2048)
    lost = 100 * (mask.sum() - int(chosen.sum())) / mask.size
    assert lost == pytest.approx(percent, abs=0.2)


def test_index_bits_count_the_subsets():
    answers = {(1, 2): 1, (2, 4): 3, (1, 4): 2, (2, 8): 5, (4, 8): 7, (2, 16): 7}
    assert {pattern: slope.index_bits(*pattern) for pattern in answers} == answers


def example(n: int = 2, m: int = 4, rows: int = 8, columns: int = 40):
    rng = np.random.default_rng(0)
    packed = slope.pack_mask(torch.from_numpy(draw_mask(rng, rows, columns, n, m)))
    return draw_values(rng, rows, columns // m * n, torch.float32, False), packed


def pattern_of(mask: torch.Tensor, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    return slope.operand_pattern(mask, 40, dtype=dtype, transposed=transposed)


V, P = example()
OUT = torch.empty(8, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: slope.pack_mask(torch.ones(3)), r"torch.float32 of shape \(3,\).*bool matrix"),
        (lambda: slope.unpack_mask(P, 70), r"packed.*\(8, 8\).*\(8, 12\) for 70 columns"),
        (lambda: slope.decompress(V, P, 40, n=2, m=6), r"n=2, m=6.*2, 4, 8, 16, 32"),
        (lambda: slope.decompress(V, P, 40, n=4, m=4), r"n=4, m=4.*0 < n < m"),
        (lambda: slope.decompress(V, P, 42, n=2, m=4), r"in_features=42.*multiple of m=4"),
        (lambda: slope.decompress(V, P, 40, n=1, m=4), r"values has 20 columns; 1:4.*gives 10"),
        (lambda: slope.decompress(V.to(torch.int8), P, 40, n=2, m=4), r"torch.int8.*2, 4 or 8 bytes"),
        (lambda: slope.decompress(V.t(), P, 40, n=2, m=4), r"values of shape \(20, 8\).*contiguous"),
        (lambda: slope.decompress(V, P[:4], 40, n=2, m=4), r"forward_mask.*\(4, 8\).*\(8, 8\)"),
        (
            lambda: slope.decompress(V, P, 40, n=2, m=4, backward_mask=P.int()),
            r"backward_mask is torch.int32",
        ),
        (lambda: slope.decompress(V, P, 40, n=2, m=4, backend="cuda"), r"backend='cuda'.*reference"),
        (lambda: slope.decompress(V, P, 40, n=2, m=4, out=OUT), r"out has shape \(8, 20\).*\(8, 40\)"),
        (
            lambda: slope.decompress(V, P, 40, n=2, m=4, out=OUT.half()),
            r"out is torch.float16.*torch.float32",
        ),
        (lambda: slope.decompress(V, P.to("meta"), 40, n=2, m=4), r"forward_mask is on meta; expected cpu"),
        (lambda: slope.compress(torch.ones(8, 42), P, n=2, m=4), r"in_features=42"),
        (lambda: slope.select_columns(V.int(), P, 40, n=2, m=4), r"torch.int32.*torch.bfloat16"),
        (lambda: slope.select_columns(*example(rows=6), 40, n=2, m=4), r"6 rows.*m=4"),
        (lambda: slope.write_operand(*example(4, 8), OUT, 40, n=4, m=8), r"4:8.*more than 2 of 4"),
        (lambda: slope.write_operand(V, P, OUT, 40, n=2, m=4, first_row=1), r"first_row=1.*rows <= 8"),
        (lambda: slope.write_operand(V, P, OUT, 40, n=2, m=4, backward_mask=P), r"expected \(rows, 4\)"),
        (lambda: slope.write_operand(V, P, OUT.double(), 40, n=2, m=4), r"out is torch.float64"),
        (lambda: slope.write_operand(V.double(), P, OUT.double(), 40, n=2, m=4), r"values: torch.float64"),
        (
            lambda: slope.write_operand(*example(1, 2, columns=6), torch.empty(8, 3), 6, n=1, m=2),
            r"in_features=6.*multiple of 4",
        ),
        (lambda: pattern_of(P, torch.float64, False), r"dtype: torch.float64"),
        (lambda: pattern_of(P[:6], torch.float16, True), r"rows of mask=6.*multiple of 4"),
        (
            lambda: pattern_of(P | 7, torch.float16, False),
            r"more than two positions in a group of 4 of a row",
        ),
        (lambda: pattern_of(P | 1, torch.float16, True), r"more than two positions.* of a column"),
        (lambda: slope.check_mask(P | 15, 40, n=2, m=4), r"keeps 4 of columns 0 to 3 in row 0.*2:4"),
        (lambda: slope.check_mask(P | 2**7, 4, n=2, m=4), r"expected a contiguous packed mask"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_check_mask_takes_a_forward_mask_and_refuses_bits_beyond_the_columns():
    slope.check_mask(P, 40, n=2, m=4)
    beyond = P.clone()
    beyond[3, 6] = 1  # column 48
    with pytest.raises(UserError, match=r"bits set beyond column 39"):
        slope.check_mask(beyond, 40, n=2, m=4)


def test_masks_cut_from_a_byte_buffer_are_read_at_any_address():
    buffer = torch.empty(P.numel() + 1, dtype=torch.uint8)
    shifted = buffer[1:].view(P.shape).copy_(P)
    assert shifted.data_ptr() % 4
    expected = everything(V, P, 40, 2, 4, "reference")
    assert all(
        torch.equal(a, b) for a, b in zip(everything(V, shifted, 40, 2, 4, "native"), expected, strict=True)
    )


def test_operators_keep_torchs_contract():
    chosen, dense, ops = slope.select_columns(V, P, 40, n=2, m=4), torch.ones(8, 40), torch.ops.ds_efficient
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, arguments in (
        (ops.slope_unpack_mask, (P, 40)),
        (ops.slope_decompress, (V, P, chosen, 40, 2, 4, "native")),
        (ops.slope_decompress_into, (V, P, None, dense.clone(), 2, 4, "native")),
        (ops.slope_compress, (dense, P, 2, 4, "native")),
        (ops.slope_select_columns, (V, P, 40, 2, 4, "reference")),
        (ops.slope_write_operand, (V, P, None, OUT.clone(), 40, 2, 4, 0, "reference")),
        (ops.slope_write_operand, (V, P, chosen, torch.empty(9, 4), 40, 2, 4, 31, "native")),
        (ops.slope_operand_pattern, (chosen, 40, torch.float32, True, "native")),
    ):
        checks = torch.library.opcheck(operator.default, arguments, test_utils=quick)
        assert set(checks.values()) == {"SUCCESS"}, operator


def test_fake_tensors_need_no_device_and_a_traced_function_gives_the_same():
    with FakeTensorMode():
        values = torch.empty(8, 20, dtype=torch.bfloat16, device="cuda:0")
        mask = torch.empty(8, 8, dtype=torch.uint8, device="cuda:0")
        chosen = slope.select_columns(values, mask, 40, n=2, m=4)
        assert chosen.shape == (8, 8) and chosen.device.type == "cuda"
        assert slope.decompress(values, mask, 40, n=2, m=4, backward_mask=chosen).shape == (8, 40)

    def step(values: torch.Tensor, mask: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        chosen = slope.select_columns(values, mask, 40, n=2, m=4)
        slope.write_operand(values, mask, out, 40, n=2, m=4, backward_mask=chosen)
        dense = slope.decompress(values, mask, 40, n=2, m=4, backward_mask=chosen)
        return slope.compress(dense * 2, mask, n=2, m=4) + out.sum()

    traced = torch.compile(step, backend="aot_eager", fullgraph=True)
    for rows in (8, 12):
        values, mask = example(rows=rows)
        outs = [torch.zeros(40, rows // 2) for _ in range(2)]
        assert torch.equal(traced(values, mask, outs[0]), step(values, mask, outs[1]))
        assert torch.equal(*outs)


def test_without_a_compiler_auto_gives_the_same_bits_and_says_so_and_native_stops(
    monkeypatch, tmp_path, caplog
):
    expected = everything(V, P, 40, 2, 4, "native")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.forget()
    try:
        with caplog.at_level("WARNING"):
            ours = everything(V, P, 40, 2, 4, "auto")
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert len([r for r in caplog.records if "no-such-compiler" in r.getMessage()]) == 1
        with pytest.raises(OpBuildError, match=r'no-such-compiler(.|\n)*backend="reference"'):
            slope.decompress(V, P, 40, n=2, m=4, backend="native")
    finally:
        native.forget()
