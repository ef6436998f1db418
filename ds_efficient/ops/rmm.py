"""Random sketches of a matrix: S^T X without S in memory, S a pure function of a key.

The rows of X are cut into blocks, each projected by its own random matrix (`partition`); E[S S^T] = I, so
that (S^T Y)^T (S^T X) is an unbiased estimate of Y^T X. S is the same on the CPU and on CUDA, compiled or
not, before it is rounded to the dtype of X; it is defined in ``csrc/rmm/rmm_common.h``, the readable form is
`ds_efficient.ops.rmm_reference`. Source: RMM, arXiv 2201.13195; the block-diagonal S and the srht, count and
rows sketches are additions.

Each function is also an operator, ``torch.ops.ds_efficient.rmm_project`` and ``rmm_matrix``, with a fake
implementation, so that FakeTensor and ``torch.compile`` see it. None is differentiable; an autograd function
calls them.

``backend`` of every function: ``"auto"`` (compiled code; on the CPU plain torch where no compiler is found,
which is logged once), ``"native"`` (compiled code or an error), ``"reference"`` (plain torch). `project` also
takes ways of the compiled code by name: ``"gemm"`` (S of some blocks is generated and torch's batched
products take it; for rows torch copies them), ``"fused"`` (one function does all: for rows a copy; the
others only on the CPU) and ``"hadamard"`` (the fast transform, srht only); else
`ds_efficient.ops.rmm_operators.choose_way` chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.ops import keyed_random
from ds_efficient.ops import rmm_operators as operators
from ds_efficient.ops.native import is_plain
from ds_efficient.ops.rmm_partition import SKETCHES, Partition, partition

__all__ = ["BACKENDS", "DTYPES", "SKETCHES", "Partition", "partition", "project", "sketch_matrix"]

BACKENDS = ("auto", "native", "reference")
_WAYS = (*BACKENDS, *operators.WAYS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPERATORS = operators.LIBRARY  # the operators exist as long as this object


def project(x: Tensor, key: Key | int, sketch: str, parts: Partition, *, backend: str = "auto") -> Tensor:
    """S^T x.

    Args:
        x: (rows, features), float32, bfloat16, float16 or float64, any strides.
        key: `Key` or 64-bit integer, 0 <= key < 2^64; one key serves one sketch.
        sketch: one of `SKETCHES`.
        parts: result of `partition` for the rows of ``x``.
        backend: see the module.

    Returns:
        (parts.total, features) in the dtype of ``x``: sums in float32 (float64 for float64), rounded once.
        Where ``parts.exact``, S = I and ``x`` itself is returned, detached.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise UserError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; expected a matrix (rows, features) of "
            f"{', '.join(map(str, DTYPES))}"
        )
    if x.shape[0] != parts.rows:
        raise UserError(f"x has {x.shape[0]} rows, the partition is of {parts.rows}")
    number = _checked(key, sketch, backend, _WAYS)
    if x.requires_grad:
        x = x.detach()
    if parts.exact:
        return x
    plain = is_plain(x) and not x.is_meta
    run = operators.project if plain else torch.ops.ds_efficient.rmm_project
    return run(x, number, sketch, parts.block, parts.projected, parts.last_projected, backend)


def sketch_matrix(
    key: Key | int,
    sketch: str,
    parts: Partition,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """S itself, dense; for tests and for reading.

    Args:
        key, sketch, parts, backend: as in `project`.
        dtype: of the result: the unit elements are rounded to it, scaled, and rounded again. float64 holds
            the numbers that float32 sketches take, not rounded after scaling.
        device: where the result is made.

    Returns:
        (parts.rows, parts.total) block-diagonal; the identity where ``parts.exact``.

    Raises:
        UserError: an argument does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    number = _checked(key, sketch, backend, BACKENDS)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is not supported; allowed: {', '.join(map(str, DTYPES))}")
    place = torch.device(device)
    if parts.exact:
        return torch.eye(parts.rows, dtype=dtype, device=place)
    return torch.ops.ds_efficient.rmm_matrix(
        number, sketch, parts.rows, parts.block, parts.projected, parts.last_projected, dtype, place, backend
    )


def _checked(key: Key | int, sketch: str, backend: str, allowed: tuple[str, ...]) -> int:
    """Validate; return the key as the signed number that an operator takes."""
    if sketch not in SKETCHES:
        raise UserError(f"sketch={sketch!r} is not known; allowed: {', '.join(SKETCHES)}")
    if backend not in allowed:
        raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(allowed)}")
    return keyed_random.signed_key(key)
