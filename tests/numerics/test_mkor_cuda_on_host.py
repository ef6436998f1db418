"""The CUDA kernels of MKOR, compiled for the host (tests/cuda_on_host), against plain torch.

What the kernels compute is checked where there is no GPU: edges, alignment, barriers, shared memory.
"""

from __future__ import annotations

import cuda_host
import mkor_factors
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.core.keys import Key
from ds_efficient.ops import keyed_random
from ds_efficient.ops import mkor_reference as reference
from ds_efficient.ops.mkor_native import GROUP, CudaLibrary

RULE = (0.9, 3.0, 0.8)


class HostLibrary(CudaLibrary):
    """The functions of the library with host tensors."""

    def run(self, matrices: list[torch.Tensor], vectors: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        """Update with `RULE`; returns the outcomes."""
        outcome = torch.full((len(matrices),), -1, dtype=torch.int32)
        return self.update(matrices, vectors, largest, outcome, RULE)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> HostLibrary:
    return cuda_host.on_host(HostLibrary, tmp_path_factory.mktemp("cuda_on_host"))


def guarded(matrix: torch.Tensor, offset: int) -> cuda_host.Guarded:
    """The matrix at an odd address, with guards around it."""
    made = cuda_host.Guarded(tuple(matrix.shape), matrix.dtype, offset)
    made.tensor.copy_(matrix)
    return made


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from((1, 2, 3, 8, 31, 64, 127, 128, 129, 130, 132, 260)), min_size=1, max_size=3),
    st.sampled_from(mkor_factors.DTYPES),
    st.integers(0, 3),
    st.integers(0, 2**32),
)
def test_kernels_update_as_the_reference_in_float64(kernels, sizes, dtype, offset, seed):
    factors = mkor_factors.Factors.draw(sizes, dtype, seed, entry=(0.5, 2.9, 3.1, 50.0))
    held = [guarded(matrix, offset) for matrix in factors.matrices]
    largest = factors.largest.clone()
    outcome = kernels.run([made.tensor for made in held], factors.vectors, largest)
    assert all(made.intact() for made in held)
    factors.check([made.tensor for made in held], largest, outcome, RULE)


def test_only_the_lower_triangle_is_read_and_the_result_is_symmetric(kernels):
    factors = mkor_factors.Factors.draw((150, 300), torch.float32, 1)
    lower = []
    for matrix in factors.matrices:
        blocks = torch.arange(len(matrix)) // 128
        lower.append(torch.where(blocks[:, None] >= blocks, matrix, torch.full_like(matrix, torch.nan)))
    largest = factors.largest.clone()
    outcome = kernels.run(lower, factors.vectors, largest)
    factors.check(lower, largest, outcome, RULE)


@pytest.mark.parametrize("dtype", mkor_factors.DTYPES)
def test_bad_vectors_leave_their_factors_alone(kernels, dtype):
    factors = mkor_factors.Factors.draw((140, 20, 9), dtype, 2)
    for bad in (torch.nan, torch.inf, -torch.inf):
        vectors = factors.vectors.clone()
        vectors[150] = bad  # of the second factor
        matrices, largest = [m.clone() for m in factors.matrices], factors.largest.clone()
        outcome = kernels.run(matrices, vectors, largest)
        assert outcome.tolist()[1] == 2
        assert torch.equal(matrices[1], factors.matrices[1]) and largest[1] == factors.largest[1]
        factors.check(matrices, largest, outcome, RULE, left=(1,))


def test_more_factors_than_one_launch_takes(kernels):
    factors = mkor_factors.Factors.draw([5 + i % 7 for i in range(GROUP + 2)], torch.float32, 3)
    matrices, largest = [m.clone() for m in factors.matrices], factors.largest.clone()
    outcome = kernels.run(matrices, factors.vectors, largest)
    factors.check(matrices, largest, outcome, RULE)


@pytest.mark.parametrize("dtype", mkor_factors.DTYPES)
def test_three_launches_as_for_many_rows_of_tiles(kernels, monkeypatch, dtype):
    monkeypatch.setattr(HostLibrary, "LIMITS", (0,))
    factors = mkor_factors.Factors.draw((260, 140, 1), dtype, 4, entry=(0.5, 2.9, 50.0))
    factors.vectors[-1] = torch.nan
    matrices, largest = [m.clone() for m in factors.matrices], factors.largest.clone()
    outcome = kernels.run(matrices, factors.vectors, largest)
    assert outcome[2] == 2 and largest[2] == factors.largest[2]
    factors.check(matrices, largest, outcome, RULE, left=(2,))


def test_an_indefinite_matrix_starts_again_from_the_identity(kernels):
    factors = mkor_factors.Factors.draw((150, 20), torch.bfloat16, 5)
    factors.matrices[0].neg_()
    outcome = kernels.run(factors.matrices, factors.vectors, factors.largest)
    assert outcome.tolist() == [3, 0]
    assert torch.equal(factors.matrices[0], torch.eye(150).bfloat16()) and factors.largest[0] == 1


# ---- rescaling ----


def tensors(shapes: list[int], dtype: torch.dtype, seed: int, offset: int) -> list[cuda_host.Guarded]:
    """Normal numbers at an odd address."""
    made = []
    for index, size in enumerate(shapes):
        held = cuda_host.Guarded((1, size), dtype, offset)
        held.tensor.copy_(keyed_random.normal(Key(seed).fold(index), (1, size)))
        made.append(held)
    return made


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.sampled_from((1, 7, 8, 63, 64, 1000, 33001)), min_size=1, max_size=4),
    st.sampled_from(mkor_factors.DTYPES),
    st.integers(0, 9),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_rescaling_as_the_reference(kernels, shapes, dtype, offset, subtract, seed):
    gradients, products = tensors(shapes, dtype, seed, offset), tensors(shapes, dtype, seed + 1, offset)
    for g, p in zip(gradients, products, strict=True):
        p.tensor.mul_(0.5) if subtract else p.tensor.add_(g.tensor)  # so that most go the gradient's way
    counts = [1] * (len(shapes) % 2) + [2] * (len(shapes) // 2)
    expected = [made.tensor.clone() for made in gradients]
    values = [made.tensor for made in products]
    wanted = reference.rescale_(expected, values, counts, subtract)
    sums = kernels.rescale([made.tensor for made in gradients], values, counts, subtract)
    torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=1e-12)
    for made, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(made.tensor, value, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert made.intact()


def test_more_layers_than_one_rescaling_takes_and_those_that_are_left_alone(kernels):
    sizes = [3 + index % 5 for index in range(84)]
    gradients = [keyed_random.normal(Key(7).fold(index), (size,)) for index, size in enumerate(sizes)]
    products = [g * (index % 3 - 1) for index, g in enumerate(gradients)]
    products[4] = products[4] * torch.nan
    products[10] = products[10] * torch.inf
    before = [g.clone() for g in gradients]
    expected = [g.clone() for g in gradients]
    counts = [2] * 42
    wanted = reference.rescale_(expected, products, counts)
    sums = kernels.rescale(gradients, products, counts, False)
    torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
    for made, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(made, value)
    assert any(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
