"""The CUDA kernel of the rotary embedding, compiled for the host (tests/cuda_on_host), in double precision.

What the kernel computes is checked where there is no GPU: blocks, edges, alignment, barriers, shared memory,
and that an index outside of the angles stops it.
"""

from __future__ import annotations

import subprocess
import sys

import cuda_host
import pytest
import torch
from hypothesis import example, given, settings
from rotary_cases import Case, cases

from ds_efficient.ops.rotary_native import Library


class HostLibrary(Library):
    """The function of the library with host tensors."""

    def check(self, case: Case) -> None:
        """The result is right, and nothing around it is written."""
        inputs = case.inputs()
        sizes = inputs[0].shape
        for offset in (0, 1):
            made = cuda_host.Guarded((1, sizes.numel()), case.dtype, offset)
            self.turn(*inputs, made.tensor.view(sizes))
            case.check(made.tensor.view(sizes), inputs)
            assert made.intact()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> HostLibrary:
    return cuda_host.on_host(HostLibrary, tmp_path_factory.mktemp("cuda_on_host"))


@settings(deadline=None, max_examples=60)
@given(cases())
@example(Case(torch.bfloat16, 3, 2, 16, 128, 128, 2048))  # words of 16 bytes, several tokens a block
@example(Case(torch.bfloat16, 3, 3, 48, 128, 64, 9, gap=256))  # more words than a block takes at once
@example(Case(torch.float16, 40, 1, 2, 64, 32, 9))
@example(Case(torch.float64, 5, 2, 3, 12, 8, 9))
@example(Case(torch.float32, 20, 3, 1, 6, 6, 9))  # the most tokens a block takes
@example(Case(torch.float64, 3, 1, 1, 2052, 2048, 9))  # the most angles
def test_the_kernel_is_as_exact_as_its_type(kernels, case):
    kernels.check(case)


@pytest.mark.parametrize("value", (0, 8, -1, 9, 2**40, -(2**40)))
def test_an_index_outside_of_the_angles_stops_the_kernel(kernels, value):
    code = """
import ctypes, sys
library, value = sys.argv[1:]
index, memory = (ctypes.c_int64 * 2)(3, int(value)), (ctypes.c_double * 64)()
t, out, angles = (ctypes.c_void_p(ctypes.addressof(memory) + at) for at in (0, 64, 128))
place = [ctypes.c_int64(number) for number in (4, 4, 4)]
sizes = [ctypes.c_int64(number) for number in (9, 2, 1, 1, 4, 4)]
function = ctypes.CDLL(library).ds_efficient_rotary_turn
rows = ctypes.c_void_p(ctypes.addressof(index))
end = (ctypes.c_double(1), 0, 0, 0, None)
sys.exit(function(t, *place, out, angles, ctypes.c_int64(4), ctypes.c_int64(0), rows, *sizes, *end))
"""
    command = [sys.executable, "-I", "-S", "-c", code, kernels._library._name, str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    outside = not 0 <= value < 9
    assert (done.returncode == 0) != outside, done.stderr
    assert ("trap" in done.stderr) == outside
