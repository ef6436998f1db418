"""The CUDA kernels of the rank-1 updates, compiled for the host (tests/cuda_on_host), against plain torch.

What the kernels compute is checked where there is no GPU: edges, alignment, barriers, shared memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import cuda_host
import mkor_factors
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.ops.mkor_native import GROUP, CudaLibrary

RULE = (0.9, 3.0, 0.8)


class HostLibrary(CudaLibrary):
    """The functions of the library with host tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._cuda = False
        self._functions = {}
        for name, arguments in self.SIGNATURES.items():
            function = getattr(library, f"{self.PREFIX}{name}")
            function.argtypes = (*arguments, ctypes.c_int, ctypes.c_void_p)
            self._functions[name] = self._without_threads(function)

    @staticmethod
    def _without_threads(function: Callable[..., int]) -> Callable[..., int]:
        return lambda *arguments: function(*arguments[:-1], 0, None)  # device and stream

    def run(self, matrices: list[torch.Tensor], vectors: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        """Update with `RULE`; returns the outcomes."""
        outcome = torch.full((len(matrices),), -1, dtype=torch.int32)
        return self.update(matrices, vectors, largest, outcome, RULE)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> HostLibrary:
    return HostLibrary(cuda_host.build(find_op("mkor", "cuda"), tmp_path_factory.mktemp("cuda_on_host")))


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
    factors = mkor_factors.Factors.draw([5 + i % 7 for i in range(GROUP + 30)], torch.float32, 3)
    matrices, largest = [m.clone() for m in factors.matrices], factors.largest.clone()
    outcome = kernels.run(matrices, factors.vectors, largest)
    factors.check(matrices, largest, outcome, RULE)
