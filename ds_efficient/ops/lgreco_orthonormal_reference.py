"""Orthonormal columns in plain torch: the readable definition of ``csrc/lgreco/orthonormal_common.h``."""

from __future__ import annotations

import torch
from torch import Tensor

VERSION = 2
MOST_COLUMNS = 64
_DEPENDENT = 1e-12  # of a column's squared norm
_MOST_PASSES = 4  # two, and more where columns had to be replaced


def orthonormalize_(matrix: Tensor) -> None:
    """Make the columns of ``matrix`` (n, r) float32 orthonormal, in place."""
    for number in range(_MOST_PASSES):
        wide = matrix.to(torch.float64)
        if not torch.isfinite(wide).all():
            matrix.fill_(torch.nan)
            return
        inverse, dependent = _inverse_root(wide.T @ wide)
        matrix.copy_(wide @ inverse)
        if not dependent and number:
            return
        for column in dependent:
            _complete(matrix, column)


def _inverse_root(gram: Tensor) -> tuple[Tensor, list[int]]:
    """R^-1 of R^T R = G, zeros in the columns that depend on those before; and the numbers of these."""
    gram, diagonal, dependent = gram.clone(), gram.diagonal().clone(), []
    for j in range(len(gram)):
        left = gram[j, j].clone()
        if not left > _DEPENDENT * diagonal[j]:
            dependent.append(j)
            gram[j] = 0
            continue
        gram[j] /= left.sqrt()
        gram[j + 1 :, j + 1 :] -= torch.outer(gram[j, j + 1 :], gram[j, j + 1 :])
    root = torch.triu(gram)
    for j in dependent:
        root[j, j] = 1.0
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    identity[:, dependent] = 0
    return torch.linalg.solve_triangular(root, identity, upper=True), dependent


def _complete(matrix: Tensor, column: int) -> None:
    """Replace a column of zeros by the part of a unit vector that is orthogonal to the others."""
    wide = matrix.to(torch.float64)
    squares = wide.square().sum(1)
    row = int(squares.argmin())
    value = -(wide @ wide[row])
    value[row] += 1
    matrix[:, column] = (value / (1 - squares[row]).sqrt()).to(matrix.dtype)
