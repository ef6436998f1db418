"""Symmetric positive definite matrices and vectors for the rank-1 updates, and what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.ops import keyed_random
from ds_efficient.ops import mkor_reference as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Factors:
    """Arguments of a call.

    Attributes:
        matrices: symmetric positive definite.
        vectors: one behind the other.
        largest: largest absolute entry of each matrix.
    """

    matrices: list[Tensor]
    vectors: Tensor
    largest: Tensor

    @classmethod
    def draw(
        cls,
        sizes: Sequence[int],
        dtype: torch.dtype,
        seed: int,
        *,
        entry: Sequence[float] = (2.0,),
        length: float = 1.0,
        device: str = "cpu",
    ) -> Factors:
        """Matrices with the largest entries ``entry`` in turn; vectors of normal numbers times ``length``."""
        matrices, key = [], Key(seed).fold("mkor_factors")
        for index, size in enumerate(sizes):
            half = keyed_random.normal(key.fold(index), (size, size), device=device).double()
            matrix = half @ half.T / size + torch.eye(size, dtype=torch.float64, device=device)
            matrix *= entry[index % len(entry)] / matrix.abs().max()
            matrices.append(((matrix + matrix.T) / 2).to(dtype))
        vectors = length * keyed_random.normal(key.fold("v"), (sum(sizes),), device=device)
        largest = torch.stack([matrix.abs().max().float() for matrix in matrices])
        return cls(matrices, vectors, largest)

    def check(
        self,
        made: Sequence[Tensor],
        largest: Tensor,
        outcome: Tensor,
        rule: tuple[float, float, float],
        left: Sequence[int] = (),
    ) -> None:
        """Error against float64 at most twice that of plain torch in this dtype, and a few float32 roundings.

        Args:
            made, largest, outcome: what a call left and returned.
            rule: its gamma, threshold, zeta.
            left: factors not to be compared.
        """
        parts = self.vectors.split([len(matrix) for matrix in self.matrices])
        for index, (matrix, vector) in enumerate(zip(self.matrices, parts, strict=True)):
            if index in left:
                continue
            before = self.largest[index]
            expected, _, wanted = reference.updated(
                matrix.double(), vector.double(), before.double(), *rule, matrix.dtype
            )
            plain = reference.updated(matrix, vector, before, *rule)[0]
            allowed = 2 * (plain.double() - expected).abs().max()
            eps = torch.finfo(matrix.dtype).eps
            floor = (eps / 2 + 2.0**-21) * expected.abs().max() + 2.0**-21 * matrix.double().abs().max()
            error = (made[index].double() - expected).abs().max()
            assert error <= torch.maximum(allowed, floor), (index, float(error), float(allowed), float(floor))
            assert torch.equal(made[index], made[index].T)
            assert largest[index] == made[index].abs().max()
            assert outcome[index] == wanted
