"""The CUDA kernels of token dropping, compiled for the host (tests/cuda_on_host), against plain torch.

What the kernels compute is checked where there is no GPU: tiles, edges, alignment, barriers, and that an
index that does not ascend stops them.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass

import cuda_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_ltd_plain import plain_gather, plain_scatter

from ds_efficient.ops import keyed_random_reference, random_ltd
from ds_efficient.ops.random_ltd_native import Library

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
KEY = 0x9E3779B97F4A7C15


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Library:
    return cuda_host.on_host(Library, tmp_path_factory.mktemp("cuda_on_host"))


@dataclass(frozen=True)
class Case:
    """A hidden state and what is kept of it: elements of a row, between rows and to the first one."""

    dtype: torch.dtype
    batch: int
    length: int
    keep: int
    features: int
    gap: int
    offset: int
    batch_first: bool
    key: int = KEY

    def state(self, positions: int, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A tensor of ``positions`` positions whose elements differ as far as they can, and its memory."""
        sizes = (self.batch, positions) if self.batch_first else (positions, self.batch)
        row = self.features + self.gap
        memory = torch.full((self.offset + math.prod(sizes) * row + 40,), 77, dtype=self.dtype)
        x = memory.as_strided((*sizes, self.features), (sizes[1] * row, row, 1), self.offset)
        number = torch.arange(x.numel()) * 2654435761 + fill
        x.copy_((number % 2 ** (8 * memory.element_size() - 1)).to(self.dtype).view(x.shape))
        return x, memory

    def index(self) -> torch.Tensor:
        device = torch.device("cpu")
        return keyed_random_reference.choice(self.key, 0, self.batch, self.length, self.keep, device)

    def check(self, kernels: Library) -> None:
        """All functions write what plain indexing gives, and nothing else."""
        index, first = self.index(), self.batch_first
        x, before = self.state(self.length, 1)
        part, _ = self.state(self.keep, 1 << 20)
        before = before.clone()
        zeros, empty = torch.zeros_like(x), torch.zeros_like(part)
        made, memory = self.state(self.length, 5)
        for rest, few in ((x, part), (None, part), (x, None)):
            kernels.scatter(rest, few, index, first, made)
            expected = plain_scatter(
                x if rest is not None else zeros, part if few is not None else empty, index, first
            )
            assert torch.equal(made, expected)
        taken, few_memory = self.state(self.keep, 5)
        made.fill_(3)
        kernels.split(x, index, first, made, taken)
        assert torch.equal(made, plain_scatter(x, empty, index, first))
        assert torch.equal(taken, plain_gather(x, index, first))
        if self.keep:
            taken.fill_(3)
            kernels.gather(x, index, first, taken)
            assert torch.equal(taken, plain_gather(x, index, first))
            kernels.put(made.copy_(x), part, index, first)
            assert torch.equal(made, plain_scatter(x, part, index, first))
        assert torch.equal(self.state(self.length, 1)[1], before)
        for tensor, around in ((made, memory), (taken, few_memory)):
            tensor.fill_(77)
            assert bool((around == 77).all())


@st.composite
def cases(draw) -> Case:
    length = draw(st.one_of(st.integers(1, 40), st.sampled_from((64, 257, 300))))
    keep = draw(st.one_of(st.integers(0, length), st.sampled_from((0, 1, length))))
    features = draw(st.one_of(st.integers(1, 70), st.sampled_from((128, 256, 520))))
    gap, offset = draw(st.sampled_from(((0, 0), (0, 0), (16, 16), (1, 0), (0, 1), (2, 4), (8, 0))))
    return Case(
        draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3)), length, min(keep, length), features, gap,
        offset, draw(st.booleans()), draw(st.integers(0, 2**64 - 1)),
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(cases())
def test_rows_are_moved_as_plain_indexing_moves_them(kernels, case):
    case.check(kernels)


@pytest.mark.parametrize("keep", (33, 1090))
def test_searches_of_two_and_three_steps_find_every_slot(kernels, keep):
    Case(torch.int16, 1, 1200, keep, 2100, 4, 0, True).check(kernels)


@pytest.mark.parametrize("bytes_of_a_row", (4096, 8192, 8208, 65536 + 16))
def test_rows_of_several_segments_and_rows_longer_than_a_tile(kernels, bytes_of_a_row):
    Case(torch.int32, 2, 19, 7, bytes_of_a_row // 4, 0, 0, False).check(kernels)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 1300), st.floats(0, 1), st.integers(0, 2**64 - 1))
def test_choices_have_the_bits_of_the_reference(kernels, layers, batch, length, share, key):
    keep = max(1, round(share * length))
    keys = [(key + layer) % 2**64 for layer in range(layers)]
    out = torch.full((layers * batch * keep + 8,), -7)
    made = out[: layers * batch * keep].view(layers, batch, keep)
    kernels.sample(keys, length, made)
    assert torch.equal(made, random_ltd.sample_layers(length, keep, batch, keys, backend="reference"))
    assert bool((out[-8:] == -7).all())


def test_more_layers_than_the_kernel_takes_keys(kernels):
    keys, made = list(range(3, 261)), torch.empty(258, 1, 2, dtype=torch.int64)
    kernels.sample(keys, 5, made)
    assert torch.equal(made, random_ltd.sample_layers(5, 2, 1, keys, backend="reference"))


BAD = ([0, 2, 2], [2, 1, 3], [-1, 2, 3], [1, 2, 8], [7, 2**40, 2**41])


@pytest.mark.parametrize("name", ("gather", "put", "scatter", "split"))
def test_an_index_that_does_not_ascend_within_the_length_stops_the_kernel(kernels, name):
    code = """
import ctypes, sys
library, name, *numbers = sys.argv[1:]
index, rows = (ctypes.c_int64 * 3)(*map(int, numbers)), (ctypes.c_int64 * 8)()
some = (ctypes.c_void_p(ctypes.addressof(rows)), ctypes.c_int64(64), ctypes.c_int64(8))
several = some * (2 if name in ("gather", "put") else 3)
function = getattr(ctypes.CDLL(library), "ds_efficient_ltd_" + name)
sizes = map(ctypes.c_int64, (1, 8, 3, 8))
sys.exit(function(ctypes.c_void_p(ctypes.addressof(index)), *sizes, *several, 0, None))
"""
    for index in ([1, 4, 7], *BAD):
        command = [sys.executable, "-I", "-S", "-c", code, kernels._library._name, name, *map(str, index)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode == 0) == (index not in BAD), (index, done.stderr)
        assert ("trap" in done.stderr) == (index in BAD)
