"""Inverse factors of MKOR: the rank-1 update, the stabiliser and the rescaled product (arXiv 2306.01685).

A factor ``F`` is an exponential average of outer products, ``F' = gamma F + (1 - gamma) v v^T``. Its inverse
``M`` follows without an inversion (Sherman-Morrison), with ``u = M v`` and ``q = v^T M v``:

    M' = (M - (1 - gamma) / (gamma + (1 - gamma) q) u u^T) / gamma

``M'`` is positive definite for every v and every gamma in (0, 1]: of all directions v is the one that shrinks
most relative to M, and ``v^T M' v = q / (gamma + (1 - gamma) q) > 0``. The paper prints ``gamma M``, a plus
sign and ``gamma`` for ``1 / gamma`` in the denominator (equations 5 and 6): that is not the inverse of its
equation 3, and it overflows after some hundred updates (`printed_inverse_update` is there to show it).

Directions that no v excites grow as ``gamma^-t``, hence the stabiliser: it blends an inverse with the
identity (equation 9; equations 7 and 8 blend the factors, which would bound nothing). An update and a blend
multiply such a direction by ``zeta / gamma``, so it stays bounded only where zeta is below gamma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_efficient.errors import CheckpointError, UserError

# What rounding may do to M relative to its largest entry, in units of its type's epsilon: an update does not
# shrink M along v to less than that, so that M stays positive definite as stored.
_ROUNDING = 32


def check_gamma(gamma: float) -> None:
    """Raise UserError unless 0 < gamma <= 1."""
    if not 0 < gamma <= 1:
        raise UserError(f"gamma={gamma}; allowed: above 0 and at most 1, for example 0.95")


def _precise(m: Tensor) -> Tensor:
    """`m` in the type to calculate in: fp32 for half types."""
    return m if m.dtype in (torch.float32, torch.float64) else m.float()


def _shrinkage(
    m: Tensor, v: Tensor, gamma: float, largest: Tensor, kind: torch.finfo
) -> tuple[Tensor, Tensor]:
    """Find w with ``gamma M' = M - w w^T``, and whether v and the result are finite in the type stored.

    v is divided by its largest entry s first, which any size of v survives:
    ``(1 - gamma) / (gamma / s^2 + (1 - gamma) q)`` with q that of v / s.
    """
    scale = v.abs().amax()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    v = v / scale
    u = m @ v
    q = v @ u
    weight = (1 - gamma) / (gamma * scale.reciprocal().square() + (1 - gamma) * q)
    floor = gamma * _ROUNDING * kind.eps * largest * (v @ v)
    weight = torch.minimum(weight, (q - floor) / q.square()).clamp_min(0)
    weight = torch.where(q > floor, weight, torch.zeros_like(weight))
    w = u * weight.sqrt()
    finite = torch.isfinite(scale) & torch.isfinite(w).all() & (largest / gamma < kind.max)
    return w, finite


@torch.no_grad()
def rank1_inverse_update(m: Tensor, v: Tensor, gamma: float) -> Tensor:
    """Return the inverse of ``gamma inv(m) + (1 - gamma) v v^T``.

    Exact but for one guard: along v the result keeps at least 32 epsilon (of m's type) times the largest
    entry of m, where an exact one would be lost in rounding. Costs one matrix-vector product and one pass
    over m; nothing waits for the device.

    Args:
        m: (d, d), symmetric positive definite; fp32 or fp64, or a half type, then calculated in fp32.
        v: (d,).
        gamma: weight of the old factor, in (0, 1]; 1 returns m as it is.

    Returns:
        (d, d) of m's type, exactly symmetric where m is; m unchanged where v is not finite.

    Raises:
        UserError: gamma outside of (0, 1].
    """
    return update_of_block(m, v, gamma, m.diagonal().amax())  # the largest entry, as m is positive definite


@torch.no_grad()
def update_of_block(m: Tensor, v: Tensor, gamma: float, largest: Tensor) -> Tensor:
    """Do `rank1_inverse_update` for a block of a larger matrix whose other blocks v does not touch.

    Args:
        m: (d, d), the block.
        v: (d,).
        gamma: weight of the old factor, in (0, 1].
        largest: largest entry of the larger matrix, no dimensions; rounding is relative to it.

    Raises:
        UserError: gamma outside of (0, 1].
    """
    check_gamma(gamma)
    wide = _precise(m)
    w, finite = _shrinkage(wide, v.to(wide.dtype), gamma, largest.to(wide.dtype), torch.finfo(m.dtype))
    updated = torch.outer(w, w).neg_().add_(wide).div_(gamma).to(m.dtype)
    return torch.where(finite, updated, m)


@torch.no_grad()
def printed_inverse_update(m: Tensor, v: Tensor, gamma: float) -> Tensor:
    """Return what equations 5 and 6 of the paper print, for studies only: it is no inverse, and diverges.

    ``gamma m + (1 - gamma) / (gamma^2 (1 + gamma (1 - gamma) q)) u u^T`` multiplies q by up to
    ``gamma + gamma^-3``, 2.1 at gamma = 0.95, with every update. No guards.

    Args:
        m: (d, d), symmetric.
        v: (d,).
        gamma: weight of the old factor, in (0, 1].

    Raises:
        UserError: gamma outside of (0, 1].
    """
    check_gamma(gamma)
    wide = _precise(m)
    u = wide @ v.to(wide.dtype)
    q = v.to(wide.dtype) @ u
    weight = (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * q))
    return (gamma * wide + weight * torch.outer(u, u)).to(m.dtype)


def vector_weights(gamma: float, vectors: int) -> tuple[float, list[float]]:
    """Return how r vectors are taken in one after the other, so that in exact arithmetic

        F' = gamma F + (1 - gamma) / r sum_j v_j v_j^T

    Each is a rank-1 update with gamma^(1/r). Left at that, the j-th would weigh
    ``(1 - gamma^(1/r)) gamma^((r - j) / r)``, the last most; with a factor before each they weigh the same,
    which among weights of that sum gives an average of independent estimates the least variance.

    Args:
        gamma: weight of the old statistics in all, in (0, 1].
        vectors: r.

    Returns:
        gamma of each update, and the factor of each vector; gamma itself and 1 for one vector.

    Raises:
        UserError: gamma outside of (0, 1].
    """
    check_gamma(gamma)
    each = gamma ** (1 / vectors)
    if each == 1 or vectors == 1:
        return each, [1.0] * vectors
    share = (1 - gamma) / (vectors * (1 - each))
    return each, [math.sqrt(share / each ** (vectors - 1 - j)) for j in range(vectors)]


UPDATES = {"sherman_morrison": rank1_inverse_update, "printed": printed_inverse_update}


def check_stabilizer(threshold: float, zeta: float) -> None:
    """Raise UserError unless threshold > 0 and 0 <= zeta < 1."""
    if not threshold > 0:
        raise UserError(f"threshold={threshold}; allowed: above 0, for example 10")
    if not 0 <= zeta < 1:
        raise UserError(f"zeta={zeta}; allowed: from 0 to below 1, for example 0.9")


@torch.no_grad()
def stabilize(m: Tensor, threshold: float, zeta: float) -> tuple[Tensor, Tensor]:
    """Blend an inverse factor with the identity where it has grown too large.

    Args:
        m: (d, d).
        threshold: largest absolute entry that is left alone.
        zeta: weight of m in the blend, in [0, 1); 0 starts again from the identity.

    Returns:
        ``zeta m + (1 - zeta) I``, or m; and whether it was blended, a bool tensor of no dimensions.

    Raises:
        UserError: values outside of these ranges.
    """
    check_stabilizer(threshold, zeta)
    fires = m.abs().amax() > threshold
    wide = _precise(m) * zeta
    wide.diagonal().add_(1 - zeta)
    return torch.where(fires, wide.to(m.dtype), m), fires


class InverseFactor(Protocol):
    """What stores the inverse of one Kronecker factor: `DenseInverse` or `ds_efficient.mkor.factored`'s."""

    size: int
    hits: Tensor

    def update(self, v: Tensor, gamma: float) -> None:
        """Take in a vector (size,); one that is not finite changes nothing."""

    def stabilize(self, threshold: float, zeta: float) -> None:
        """Blend with the identity where the largest entry is above the threshold."""

    def times(self, x: Tensor) -> Tensor:
        """Return ``M x`` for x (size, n)."""

    def dense(self) -> Tensor:
        """Return M (size, size)."""

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, as tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; CheckpointError where it does not fit."""


class DenseInverse:
    """An inverse factor as a matrix, the identity at first.

    Attributes:
        size: d.
        m: (d, d).
        hits: int64, how often the stabiliser blended.

    Args:
        size: d.
        dtype: of the stored matrix. Rounding to a half type can cost a large matrix its positive
            definiteness, in spite of the guard of `rank1_inverse_update`; `precondition` then leaves
            gradients alone that the product would turn round.
        device: where it lies.
        formula: "sherman_morrison", or "printed" for studies.

    Raises:
        UserError: an unknown formula.
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        formula: str = "sherman_morrison",
    ) -> None:
        if formula not in UPDATES:
            raise UserError(f"formula={formula!r}; allowed: {', '.join(UPDATES)}")
        self.size = size
        self.m = torch.eye(size, dtype=dtype, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self._update = UPDATES[formula]

    def update(self, v: Tensor, gamma: float) -> None:
        """Take in a vector (size,); one that is not finite changes nothing."""
        self.m = self._update(self.m, v, gamma)

    def stabilize(self, threshold: float, zeta: float) -> None:
        """Blend with the identity where the largest entry is above the threshold."""
        self.m, fired = stabilize(self.m, threshold, zeta)
        self.hits += fired

    def times(self, x: Tensor) -> Tensor:
        """Return ``M x`` for x (size, n), in x's type: 2 d^2 n operations."""
        return self.m.to(x.dtype) @ x

    def dense(self) -> Tensor:
        """Return M (size, size)."""
        return self.m

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the matrix and of the count."""
        return {"m": self.m.clone(), "hits": int(self.hits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: another form, size or type.
        """
        m = state.get("m")
        if not isinstance(m, Tensor) or m.shape != self.m.shape or m.dtype != self.m.dtype:
            found = f"{tuple(m.shape)} {m.dtype}" if isinstance(m, Tensor) else "no dense factor"
            raise CheckpointError(
                f"inverse factor: {found} in the state, {tuple(self.m.shape)} {self.m.dtype} here; use the "
                "model, form, sides and state_dtype that it was saved with"
            )
        self.m = m.to(self.m.device, copy=True)
        self.hits.fill_(state["hits"])


@torch.no_grad()
def precondition(
    gradient: Tensor,
    left: InverseFactor | None = None,
    right: InverseFactor | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return ``M_L G M_R`` rescaled to the Frobenius norm of G.

    Since both factors are positive definite, the result keeps an angle below 90 degrees to G. With a bias, G
    is the weight's gradient with the bias's as last column, so that both are rescaled together.

    Args:
        gradient: (out, in) fp32 or fp64.
        left: factor of size out; None: the identity.
        right: factor of size in; None: the identity.
        keep: sets the product to zero where a sparse weight has no elements; it must leave the gradient as
            it is. Applied before the norm is restored.

    Returns:
        (out, in). The gradient itself where it is zero or not finite, where the product overflows, and where
        rounding turned the product away from it.
    """
    product = gradient
    if right is not None:
        product = right.times(product.T).T  # M is symmetric
    if left is not None:
        product = left.times(product)
    if keep is not None:
        product = keep(product)
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    scale = norm / torch.linalg.vector_norm(product, dtype=torch.float64)
    descends = product.flatten() @ gradient.flatten() > 0
    usable = torch.isfinite(scale) & (scale > 0) & descends
    return torch.where(usable, product * scale.to(product.dtype), gradient)
