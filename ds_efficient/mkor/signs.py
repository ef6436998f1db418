"""Higher-rank statistics of a layer: sums of its rows with random signs.

A mean row says nothing of how rows differ. Let x_1 .. x_n be the rows, e_ij independent random signs, and

    a_j = n^-1/2 sum_i e_ij x_i        j = 1 .. r

Since ``E[e_ij e_mj]`` is 1 for i = m and 0 otherwise, ``E[a_j a_j^T] = C = 1/n sum_i x_i x_i^T``: the mean of
the r outer products is an unbiased estimate of the second moment, the factor of K-FAC. Its variance is

    Var[(a_j a_j^T)_kl] = C_kk C_ll + C_kl^2 - 2/n^2 sum_i x_ik^2 x_il^2

divided by r; of all independent numbers of variance 1, signs have the least. It costs one product of the rows
with an (n, r) matrix, where the vectors c_i of ``C = sum_i c_i c_i^T`` would need a decomposition of C.

For a loss that is a mean over rows, a row's own output gradient is ``n dL/dy_i``, so the vectors of the other
factor are ``g_j = n^1/2 sum_i e_ij dL/dy_i``. A bias makes the inputs' last column one of ones, whose entry
in a_j is ``n^-1/2 sum_i e_ij``.

Signs are keyed by run seed, layer, side, optimizer step, pass and data-parallel rank; and by tensor-parallel
rank where these have different rows (sequence parallelism), but not where they have the same ones, whose
shards of a vector must fit together. So sums over micro-batches and ranks are those of one batch with
independent signs, a recomputation finds the signs of its pass, and a resumed run those of its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ds_efficient.core.keys import Key, Subkeys
from ds_efficient.core.passes import Calls
from ds_efficient.ops.keyed_random import random_bits

_BITS = 32  # signs in a word
_CHUNK = 1 << 24  # elements that are converted to fp32 at a time


def wide_type(x: Tensor) -> torch.dtype:
    """Return the type of sums: fp64 for fp64, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_count(x: Tensor, columns: int = -1) -> int:
    """Return how many rows a tensor has whose elements of one row lie along dimension `columns`."""
    return x.numel() // max(1, x.shape[columns])


def random_signs(
    key: int, rows: int, vectors: int, *, first: int = 0, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return independent signs, one bit of a keyed word each.

    Args:
        key: 64-bit key.
        rows: n.
        vectors: r.
        first: number of the first row; a row's signs depend on nothing but key, number and r.
        dtype: of the result.
        device: of the result.

    Returns:
        (n, r) of 1 and -1.
    """
    words = -(-vectors // _BITS)
    bits = random_bits(key, (rows, words, 1), offset=first * words, device=device)
    places = torch.arange(_BITS, dtype=torch.int32, device=device)
    signs = (((bits >> places) & 1) * 2 - 1).view(rows, words * _BITS)
    return signs[:, :vectors].to(dtype)


class RowSketch:
    """Draws the signs of one layer's rows, and sums rows with them.

    Args:
        key: of the layer.
        vectors: r.
        step: returns the optimizer steps done.
        rank: data-parallel rank.
        shards: by side, "right" for inputs and "left" for outputs, the tensor-parallel rank where that has
            rows of its own; 0 where nothing is said.
    """

    def __init__(
        self,
        key: Key,
        vectors: int,
        step: Callable[[], int],
        rank: int = 0,
        shards: Mapping[str, int] | None = None,
    ) -> None:
        self.vectors = vectors
        self._subkeys = {side: Subkeys(key.fold(side)) for side in ("left", "right")}
        self._step, self._rank, self._shards = step, rank, dict(shards or {})
        self._calls = Calls()

    def begin_pass(self) -> tuple[int, int]:
        """Return what names this forward pass of the layer: the step, and its number within."""
        step = self._step()
        return step, self._calls.count(step)

    def restart(self) -> None:
        """Count passes from 0 again."""
        self._calls.restart()

    def _key(self, side: str, named: tuple[int, int]) -> int:
        return self._subkeys[side].value(*named, self._rank, self._shards.get(side, 0))

    @torch.no_grad()
    def of_rows(self, side: str, named: tuple[int, int], x: Tensor) -> Tensor:
        """Return the sums of rows with signs, and of the signs themselves.

        Args:
            side: "right" for inputs, "left" for output gradients.
            named: what `begin_pass` returned for the pass that the rows are of.
            x: (..., d).

        Returns:
            (r, d + 1) in fp32, fp64 for fp64; the last column is that of a column of ones.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        kind, key = wide_type(x), self._key(side, named)
        total = x.new_zeros(self.vectors, x.shape[1] + 1, dtype=kind)
        step = max(1, len(x) if x.dtype == kind else _CHUNK // max(1, x.shape[1]))
        with torch.autocast(x.device.type, enabled=False):
            for first in range(0, len(x), step):
                part = x[first : first + step].to(kind)
                signs = random_signs(key, len(part), self.vectors, first=first, dtype=kind, device=x.device)
                total[:, :-1].addmm_(signs.t(), part)
                total[:, -1] += signs.sum(0)
        return total

    @torch.no_grad()
    def of_patches(self, named: tuple[int, int], conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, int]:
        """Return what `of_rows` does for the patches of a convolution, and their number.

        The sum of patches with signs is the gradient of a convolution's weight where the signs are that of
        its output: no patch is laid out.

        Args:
            named: see `of_rows`.
            conv: of one group.
            x: its input, (batch, channels, height, width) or without batch.
        """
        x = x.detach().to(wide_type(x))
        x = x if x.dim() == 4 else x[None]
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        sizes = [
            (length - dilation * (kernel - 1) - 1) // stride + 1
            for length, dilation, kernel, stride in zip(
                x.shape[2:], conv.dilation, conv.kernel_size, conv.stride, strict=True
            )
        ]
        signs = self._map(self._key("right", named), len(x), sizes, x)
        with torch.autocast(x.device.type, enabled=False):
            found = conv2d_weight(
                x,
                (self.vectors, x.shape[1], *conv.kernel_size),  # type: ignore[arg-type]
                signs,
                stride=conv.stride,
                dilation=conv.dilation,
            )
        total = torch.cat([found.flatten(1), signs.sum((0, 2, 3))[:, None]], 1)
        return total, len(x) * sizes[0] * sizes[1]

    @torch.no_grad()
    def of_positions(self, named: tuple[int, int], gradient: Tensor) -> Tensor:
        """Return what `of_rows` does for output gradients of a convolution, (..., out, height, width)."""
        return self.of_rows("left", named, gradient.detach().movedim(-3, -1))

    def _map(self, key: int, images: int, sizes: list[int], like: Tensor) -> Tensor:
        """Return signs as (images, r, height, width)."""
        rows = images * sizes[0] * sizes[1]
        signs = random_signs(key, rows, self.vectors, dtype=like.dtype, device=like.device)
        return signs.view(images, *sizes, self.vectors).movedim(-1, 1).contiguous()
