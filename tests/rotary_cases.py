"""Inputs of the rotary embedding of many shapes, and what it computes, in double precision pair by pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """Sizes, layout in memory and arguments.

    Attributes:
        order: dimensions of t from the slowest in memory to the fastest, of the first three.
        gap: elements behind each head that are not its own.
        offset: elements before the first one.
        largest: angles are at most this.
    """

    dtype: torch.dtype
    positions: int
    samples: int
    heads: int
    width: int
    rotated: int
    length: int
    indexed: bool = True
    per_sample: bool = False
    transposed: bool = False
    order: tuple[int, int, int] = (0, 1, 2)
    gap: int = 0
    offset: int = 0
    mscale: float = 1.0
    largest: float = 131072.0
    seed: int = 0

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None, float, bool]:
        """t, angles, index, mscale, transposed."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = (self.positions, self.samples, self.heads)
        strides, step = [0, 0, 0], self.width + self.gap
        for dimension in reversed(self.order):
            strides[dimension] = step
            step *= max(1, sizes[dimension])
        memory = torch.full((self.offset + step,), torch.nan, dtype=self.dtype, device=device)
        t = memory.as_strided((*sizes, self.width), (*strides, 1), self.offset)
        t.copy_(torch.randn(t.shape, generator=generator))
        shape = (self.length, self.samples if self.per_sample else 1, 1, self.rotated)
        angles = torch.rand(shape, generator=generator) * self.largest
        index = None
        if self.indexed:
            index = torch.randint(0, self.length, sizes[1::-1], generator=generator).to(device)
        return t, angles.to(device), index, self.mscale, self.transposed

    def check(self, found: Tensor, inputs: tuple[Tensor, Tensor, Tensor | None, float, bool]) -> None:
        """The result is contiguous and as exact as its type, arithmetic in float32 allowed."""
        t = inputs[0]
        assert found.shape == t.shape and found.dtype == t.dtype and found.is_contiguous()
        exact = expected(*inputs)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        largest = float(t.abs().max()) * max(1.0, self.mscale) if t.numel() else 0.0
        kind = torch.finfo(self.dtype)
        bound = (
            kind.eps / 2 * exact.abs() + 8 * torch.finfo(wide).eps * largest + kind.smallest_normal * kind.eps
        )
        assert bool(((found.cpu().double() - exact).abs() <= bound).all())
        assert torch.equal(found[..., self.rotated :], t[..., self.rotated :])


def expected(t: Tensor, angles: Tensor, index: Tensor | None, mscale: float, transposed: bool) -> Tensor:
    """The definition in float64, one pair of channels after the other, as products with 2 x 2 matrices."""
    x, whole = t.double().cpu().numpy(), angles.double().cpu().numpy()
    positions, samples = x.shape[:2]
    rows = np.arange(positions)[:, None] if index is None else index.cpu().numpy().T
    columns = np.arange(samples) if whole.shape[1] > 1 else np.zeros(samples, dtype=np.int64)
    at = whole[rows, columns[None, :], 0]
    out, half = x.copy(), whole.shape[-1] // 2
    for j in range(half):
        one, two = at[..., j], at[..., j + half]
        matrix = mscale * np.array([[np.cos(one), -np.sin(one)], [np.sin(two), np.cos(two)]])
        if transposed:
            matrix = matrix.swapaxes(0, 1)
        out[..., [j, j + half]] = np.einsum("abst,sthb->stha", matrix, x[..., [j, j + half]])
    return torch.from_numpy(out)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Odd and even sizes, all layouts."""
    length, indexed = draw(st.integers(1, 20)), draw(st.booleans())
    half = draw(st.one_of(st.integers(1, 11), st.sampled_from((8, 16, 32))))
    rest = draw(st.sampled_from((0, 0, 1, 3, 8, 16)))
    gap, offset = draw(st.sampled_from(((0, 0), (0, 0), (16, 16), (1, 0), (0, 1), (8, 4))))
    return Case(
        dtype=draw(st.sampled_from(DTYPES)),
        positions=draw(st.integers(1, 12 if indexed else length)),
        samples=draw(st.integers(1, 3)),
        heads=draw(st.sampled_from((1, 2, 3, 16))),
        width=2 * half + rest,
        rotated=2 * half,
        length=length,
        indexed=indexed,
        per_sample=draw(st.booleans()),
        transposed=draw(st.booleans()),
        order=draw(st.sampled_from(((0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2)))),
        gap=gap,
        offset=offset,
        mscale=draw(st.sampled_from((1.0, 1.25))),
        largest=draw(st.sampled_from((3.0, 131072.0))),
        seed=draw(st.integers(0, 2**31)),
    )
