"""The inverse factors that one rank owns: updated in one call, and applied to many gradients in one call.

The work is that of `ds_efficient.ops.mkor` (matrices), `ds_efficient.ops.mkor_factored` (identity plus low
rank) and `ds_efficient.ops.mkor_precondition` (products). Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_efficient.errors import CheckpointError
from ds_efficient.mkor.inverse import precondition, vector_weights
from ds_efficient.ops import mkor as ops
from ds_efficient.ops.mkor_factored import FactoredFactors
from ds_efficient.ops.mkor_precondition import LowRank, precondition_

SIDES = {"both": ("left", "right"), "left": ("left",), "right": ("right",)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_ON_CPU = 2048  # size of a matrix whose condition is estimated there
Gradient = tuple[Tensor, Tensor | None]
"""(rows, columns) of a weight, and (rows,) of its bias where that is the last column."""


class _Times:
    """A factor as `ds_efficient.mkor.inverse.precondition` takes it."""

    def __init__(self, times: Callable[[Tensor], Tensor]) -> None:
        self.times = times


class FactorBank:
    """Inverse factors by block name and side, identities at first.

    Attributes:
        sides: "left", "right" or both.
        taken, hits, left_out, resets: (factors,) int64 in order, how many updates a factor has taken; how
            many of them blended it with the identity first; were left out because a vector was not finite;
            found that rounding had cost it its definiteness.

    Args:
        sizes: (rows, columns with the bias's) of the blocks, by name.
        sides: "both", "left" or "right".
        form: "dense" or "factored".
        max_rank: of the factored form.
        dtype: of the stored factors.
        operand_dtype: of the gradients, in which the factored form keeps what products take.
        gamma, threshold, zeta: see `ds_efficient.ops.mkor.update_`.
        device: where they lie.
    """

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, int]],
        *,
        sides: str,
        form: str,
        max_rank: int,
        dtype: torch.dtype,
        operand_dtype: torch.dtype,
        gamma: float,
        threshold: float,
        zeta: float,
        device: torch.device,
    ) -> None:
        self.sides = SIDES[sides]
        self._gamma, self._threshold, self._zeta = gamma, threshold, zeta
        self._device = device
        self._numbers = {name: number * len(self.sides) for number, name in enumerate(sizes)}
        every = [{"left": rows, "right": columns} for rows, columns in sizes.values()]
        self._sizes = [pair[side] for pair in every for side in self.sides]
        # each size's factors, on the host and on the device, and the block of each entry of all vectors
        alike: dict[int, list[int]] = {}
        for number, size in enumerate(self._sizes):
            alike.setdefault(size, []).append(number)
        self._alike = [(numbers, torch.tensor(numbers, device=device)) for numbers in alike.values()]
        spans = [sum(pair[side] for side in self.sides) for pair in every]
        blocks = torch.arange(len(spans), dtype=torch.int32)
        self._block_of = blocks.repeat_interleave(torch.tensor(spans, dtype=torch.int64)).to(device)
        self._matrices: list[Tensor] = []
        self._factored: FactoredFactors | None = None
        if form == "factored":
            operand = operand_dtype if device.type == "cuda" else torch.float32
            self._factored = FactoredFactors(self._sizes, max_rank, device=device, operand_dtype=operand)
        else:
            self._matrices = [torch.eye(size, dtype=dtype, device=device) for size in self._sizes]
        self._largest = torch.ones(len(self._sizes), device=device)
        self._counts = torch.zeros(4, len(self._sizes), dtype=torch.int64, device=device)
        self.taken, self.hits, self.left_out, self.resets = self._counts.unbind()

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        if self._factored is not None:
            return self._factored.nbytes if self._sizes else 0
        return sum(matrix.nbytes for matrix in self._matrices)

    @torch.no_grad()
    def update(
        self, vectors: Mapping[str, Mapping[str, Tensor | Sequence[Tensor]]], good: Tensor | None = None
    ) -> None:
        """Stabilise all factors and take vectors in.

        Args:
            vectors: of every block by name and side, fp32, (size,), or (r, size) of an update by r of them
                (`ds_efficient.mkor.inverse.vector_weights`); or pieces of that, to be joined along the size.
                Where one of a block's is not finite, both its factors stay.
            good: a number that all of them are multiplied by, 1 or NaN, on the device.
        """
        if not self._sizes:
            return
        parts: list[Tensor] = []
        for name in self._numbers:
            for side in self.sides:
                given = vectors[name][side]
                parts += [given] if isinstance(given, Tensor) else given
        joined = torch.atleast_2d(torch.cat(parts, -1).float())
        checked = self._checked(joined if good is None else joined * good)
        each, weights = vector_weights(self._gamma, len(checked))
        outcomes = []
        for number, (flat, weight) in enumerate(zip(checked, weights, strict=True)):
            # blended once an update: the growth that a blend outweighs is that by 1 / gamma
            threshold = self._threshold if number == 0 else math.inf
            outcomes.append(self._take_in(flat if weight == 1 else flat * weight, each, threshold))
        outcome = torch.stack(outcomes)
        self.taken += (outcome != ops.LEFT).any(0)
        self.hits += outcome[0] == ops.BLENDED
        self.left_out += (outcome == ops.LEFT).any(0)
        self.resets += (outcome == ops.RESET).any(0)

    def _take_in(self, flat: Tensor, gamma: float, threshold: float) -> Tensor:
        """Update every factor by one vector, (sum of all sizes,); return the outcomes."""
        if self._factored is not None:
            return self._factored.update_(flat, gamma=gamma, threshold=threshold, zeta=self._zeta)
        return ops.update_(
            self._matrices, flat, self._largest, gamma=gamma, threshold=threshold, zeta=self._zeta
        )

    def _checked(self, vectors: Tensor) -> Tensor:
        """Return (r, sum of all sizes), all NaN for a block where one of its entries is not finite."""
        finite = torch.empty(len(self._sizes), dtype=torch.bool, device=self._device)
        parts = vectors.split(self._sizes, 1)
        for numbers, places in self._alike:
            same = torch.stack([parts[number] for number in numbers])
            finite.index_copy_(0, places, same.isfinite().flatten(1).all(1))
        good = finite.view(-1, len(self.sides)).all(1)
        return torch.where(good.index_select(0, self._block_of), vectors, math.nan)

    def _factor(self, name: str, side: str) -> Tensor | LowRank | None:
        if side not in self.sides:
            return None
        number = self._numbers[name] + self.sides.index(side)
        return self._matrices[number] if self._factored is None else LowRank(self._factored.operand(number))

    def precondition(self, names: Sequence[str], gradients: Sequence[Gradient]) -> Tensor:
        """Precondition the gradients of some blocks in place.

        Args:
            names: of the blocks.
            gradients: of them, contiguous, fp32, bf16 or fp16.

        Returns:
            (blocks, 3) float64: squared norms of gradient and product, and their scalar product.
        """
        return precondition_(
            [weight for weight, _ in gradients],
            [bias for _, bias in gradients],
            [self._factor(name, "left") for name in names],
            [self._factor(name, "right") for name in names],
        )

    @torch.no_grad()
    def precondition_sparse(
        self, name: str, gradient: Gradient, keep: Callable[[Tensor], Tensor]
    ) -> tuple[Gradient, Tensor]:
        """Precondition the gradient of a sparse weight, zero outside of its pattern.

        Args:
            name: of the block.
            gradient: of it.
            keep: sets an (rows, columns) matrix to zero outside of the pattern.

        Returns:
            The product, zero there too and of the gradient's norm, fp32; and what `precondition` returns, as
            one row.
        """
        weight, bias = gradient
        whole = weight.float()
        if bias is not None:
            whole = torch.cat([whole, bias.float()[:, None]], 1)
        columns = weight.shape[1]

        def masked(product: Tensor) -> Tensor:
            return torch.cat([keep(product[:, :columns].contiguous()), product[:, columns:]], 1)

        result = precondition(whole, self._multiplier(name, "left"), self._multiplier(name, "right"), masked)
        size = torch.linalg.vector_norm(whole, dtype=torch.float64).square()
        sums = torch.stack([size, size, (whole.double() * result.double()).sum()])
        return (result[:, :columns].contiguous(), None if bias is None else result[:, -1].contiguous()), sums

    def _multiplier(self, name: str, side: str) -> Any:
        if side not in self.sides:
            return None
        number, factored = self._numbers[name] + self.sides.index(side), self._factored
        if factored is not None:
            return _Times(lambda x: factored.times(number, x))
        return _Times(lambda x: self._matrices[number].to(x.dtype) @ x)

    def largest_entries(self) -> Tensor:
        """Return the largest entry of each factor, fp32, on the device."""
        if self._factored is not None and self._sizes:
            return self._factored.largest_entry().float()
        return self._largest

    def truncation_errors(self) -> Tensor:
        """Return the largest relative error that a truncation of each factor has made, 0 for matrices."""
        if self._factored is not None and self._sizes:
            return self._factored.largest_error.float()
        return torch.zeros_like(self._largest)

    @torch.no_grad()
    def conditions(self) -> list[float]:
        """Estimate the condition number of each factor, in order; waits for the device.

        The largest eigenvalue by power iteration on M, the smallest on its inverse by a Cholesky
        decomposition; inf where M has lost its definiteness, NaN for matrices on the CPU of which that would
        take seconds. For the factored form from the core, exactly.
        """
        if self._factored is not None:
            held = self._factored
            return [
                _low_rank_condition(held.state(number), held.sizes[number]) for number in range(len(held))
            ]
        found = []
        for matrix in self._matrices:
            if len(matrix) > _LARGEST_ON_CPU and self._device.type == "cpu":
                found.append(math.nan)
                continue
            wide = matrix.float()
            root, failed = torch.linalg.cholesky_ex(wide)
            if int(failed):
                found.append(math.inf)
                continue
            found.append(_growth(wide.mv, wide) * _growth(partial(_solve, root), wide))
        return found

    def state(self, name: str) -> dict[str, Any]:
        """Return a block's factors as tensors and plain values."""
        first = self._numbers[name]
        held: dict[str, Any] = {}
        for number, side in enumerate(self.sides, first):
            if self._factored is not None:
                held[side] = self._factored.state(number)
            else:
                held[side] = {"m": self._matrices[number].clone()}
        span = slice(first, first + len(self.sides))
        return {
            "factors": held,
            "largest": self._largest[span].clone(),
            "counts": self._counts[:, span].clone(),
        }

    def load(self, name: str, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            CheckpointError: of another form, type, size, or other sides.
        """
        if set(state["factors"]) != set(self.sides):
            raise CheckpointError(
                f"mkor: {name}: saved with the sides {', '.join(state['factors'])}, here mkor.sides means "
                f"{', '.join(self.sides)}; use the same"
            )
        first = self._numbers[name]
        for number, side in enumerate(self.sides, first):
            if self._factored is not None:
                try:
                    self._factored.load_state(number, state["factors"][side])
                except CheckpointError as error:
                    raise CheckpointError(f"mkor: {name}: {error}") from None
                continue
            saved, here = state["factors"][side].get("m"), self._matrices[number]
            if not isinstance(saved, Tensor) or saved.shape != here.shape or saved.dtype != here.dtype:
                found = "no matrix" if saved is None else f"{tuple(saved.shape)} {saved.dtype}"
                raise CheckpointError(
                    f"mkor: {name}: {found} in the checkpoint, {tuple(here.shape)} {here.dtype} here; use "
                    "the model, mkor.form and mkor.state_dtype that it was saved with"
                )
            here.copy_(saved)
        span = slice(first, first + len(self.sides))
        self._largest[span] = state["largest"].to(self._device)
        self._counts[:, span] = state["counts"].to(self._device)


def _solve(root: Tensor, x: Tensor) -> Tensor:
    return torch.cholesky_solve(x[:, None], root)[:, 0]


def _growth(times: Callable[[Tensor], Tensor], like: Tensor, iterations: int = 20) -> float:
    """Return the largest eigenvalue of a symmetric positive definite operator, from below."""
    places = torch.arange(len(like), dtype=like.dtype, device=like.device)
    x = torch.cos(places * places)  # no draw, and not orthogonal to anything in particular
    x = x / torch.linalg.vector_norm(x)
    length = x.new_ones(())
    for _ in range(iterations):
        y = times(x)
        length = torch.linalg.vector_norm(y)
        x = y / length
    return float(length)


def _low_rank_condition(state: Mapping[str, Tensor], size: int) -> float:
    """Return the condition number of ``a I - U S U^T``: a where U does not reach, a less S inside."""
    a, values = float(state["a"]), torch.linalg.eigvalsh(state["core"])
    largest = a if int(state["rank"]) < size else a - float(values[0])
    smallest = a - float(values[-1])
    return largest / smallest if smallest > 0 else math.inf
