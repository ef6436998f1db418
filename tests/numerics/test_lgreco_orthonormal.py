"""Orthonormal columns: plain torch, C++, and the CUDA kernel compiled for the host alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import cuda_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.errors import UserError
from ds_efficient.ops import keyed_random
from ds_efficient.ops import lgreco_orthonormal as op
from ds_efficient.ops import lgreco_orthonormal_reference as reference
from ds_efficient.ops.lgreco_orthonormal_native import SPLIT_ROWS, CudaLibrary, Library

WAYS = ("kernel", "compiled", "reference")
Way = Callable[[Sequence[torch.Tensor]], None]


@pytest.fixture(scope="module")
def ways(tmp_path_factory) -> dict[str, Way]:
    folder = tmp_path_factory.mktemp("cuda_on_host")
    built = cuda_host.on_host(CudaLibrary, folder)
    return {
        "kernel": built.orthonormalize,
        "compiled": Library("cpu").orthonormalize,
        "reference": lambda matrices: [reference.orthonormalize_(matrix) for matrix in matrices],
    }


def draw(n: int, r: int, seed: int = 1) -> torch.Tensor:
    return keyed_random.normal(seed, (n, r))


def assert_orthonormal(made: torch.Tensor, atol: float = 2e-6) -> None:
    wide = made.double()
    torch.testing.assert_close(wide.T @ wide, torch.eye(wide.shape[1]).double(), rtol=0, atol=atol)


def assert_spans(made: torch.Tensor, of: torch.Tensor, rtol: float = 1e-5) -> None:
    """Each column of ``of`` lies in the span of ``made``, to ``rtol`` of its norm."""
    wide, basis = of.double(), made.double()
    rest = wide - basis @ (basis.T @ wide)
    assert (rest.norm(dim=0) <= rtol * wide.norm(dim=0)).all()


@settings(deadline=None, max_examples=12)
@given(
    st.lists(
        st.tuples(st.one_of(st.integers(1, 9), st.sampled_from((16, 31))), st.integers(0, 90)),
        min_size=1, max_size=2,
    ),
    st.sampled_from(WAYS), st.sampled_from((1e-38, 1e-20, 1.0, 1e36)), st.integers(0, 2**32),
)  # fmt: skip
def test_columns_are_those_of_gram_schmidt(ways, shapes, way, scale, seed):
    given = [draw(r + more, r, seed + i) * scale for i, (r, more) in enumerate(shapes)]
    made = [cuda_host.Guarded(tuple(matrix.shape), torch.float32, 1) for matrix in given]
    for place, matrix in zip(made, given, strict=True):
        place.tensor.copy_(matrix)
    ways[way]([place.tensor for place in made])
    for place, matrix in zip(made, given, strict=True):
        assert place.intact()
        assert_orthonormal(place.tensor)
        q, r = torch.linalg.qr(matrix.double())
        worst = torch.linalg.cond(matrix.double() / matrix.double().norm(dim=0))
        expected = q * torch.sign(r.diagonal())
        torch.testing.assert_close(
            place.tensor.double(), expected, rtol=0, atol=3e-6 * max(1.0, float(worst))
        )


@pytest.mark.parametrize("way", WAYS)
def test_as_many_columns_as_are_allowed(ways, way):
    made = draw(100, op.MOST_COLUMNS)
    ways[way]([made])
    assert_orthonormal(made)
    assert_spans(made, draw(100, op.MOST_COLUMNS))


@pytest.mark.parametrize("way", WAYS)
def test_nearly_dependent_columns_are_orthonormal_and_span_the_same(ways, way):
    for distance in (1e-2, 1e-4, 1e-5):
        matrix = draw(300, 1) + distance * draw(300, 12, 2)
        made = matrix.clone()
        ways[way]([made])
        assert_orthonormal(made)
        assert_spans(made, matrix, rtol=3e-6)


@pytest.mark.parametrize("way", WAYS)
def test_dependent_columns_are_replaced(ways, way):
    zeros, one, some, square = torch.zeros(9, 4), draw(40, 1) @ draw(1, 7, 2), draw(50, 6), torch.zeros(5, 5)
    some[:, 2], some[:, 4] = 0, some[:, 1] * -3
    square[:, 3] = torch.tensor([1.0, 1, 1, 1, 1])
    given = [zeros, one, some, square]
    made = [matrix.clone() for matrix in given]
    ways[way](made)
    for result, matrix in zip(made, given, strict=True):
        assert_orthonormal(result)
        assert_spans(result, matrix)
    assert torch.equal(made[0], torch.eye(9, 4))
    plain = some.clone()
    reference.orthonormalize_(plain)
    torch.testing.assert_close(made[2], plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_only_the_matrix_that_is_not_finite_becomes_nan(ways, way, bad):
    given = [draw(20, 3, seed) for seed in range(3)]
    given[1][7, 2] = bad
    ways[way](given)
    assert torch.isnan(given[1]).all()
    assert_orthonormal(given[0])
    assert_orthonormal(given[2])


def test_matrices_of_many_rows_are_shared_by_blocks(ways):
    rows = SPLIT_ROWS + 1
    given = [draw(rows, 3), draw(30, 2), draw(rows, 3, 2), draw(2 * rows, 2, 3), draw(rows, 2, 4)]
    given[2][:, 1] = 2 * given[2][:, 0]
    given[4][rows - 1, 0] = math.nan
    made = [cuda_host.Guarded(tuple(matrix.shape), torch.float32, 1) for matrix in given]
    for place, matrix in zip(made, given, strict=True):
        place.tensor.copy_(matrix)
    ways["kernel"]([place.tensor for place in made])
    assert torch.isnan(made[4].tensor).all() and all(place.intact() for place in made)
    for place, matrix in zip(made[:4], given, strict=False):
        assert_orthonormal(place.tensor)
        assert_spans(place.tensor, matrix)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    one, several, threads = draw(20_000, 5), draw(20_000, 5), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        op.orthonormalize_([one], backend="native")
        torch.set_num_threads(3)
        op.orthonormalize_([several], backend="native")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, several)
    assert_orthonormal(one)


@pytest.mark.parametrize("backend", op.BACKENDS)
def test_operator_is_as_torch_wants_it(backend):
    torch.library.opcheck(
        torch.ops.ds_efficient.lgreco_orthonormalize_.default,
        ([draw(9, 4), draw(5, 5)], backend),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3, 4), "shape \\(3, 4\\)"),
        (torch.zeros(70, 65), "shape \\(70, 65\\)"),
        (torch.zeros(3), "shape \\(3,\\)"),
        (torch.zeros(4, 3).double(), "float64"),
        (torch.zeros(3, 4).T, "strides \\(1, 4\\)"),
    ],
)
def test_matrices_that_do_not_fit_are_named(matrix, message):
    with pytest.raises(UserError, match=message):
        op.orthonormalize_([torch.zeros(4, 2), matrix])
    op.orthonormalize_([])
