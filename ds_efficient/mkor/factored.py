"""An inverse factor as identity plus low rank: ``M = a I + U C U^T`` in O(d k) memory.

After t updates from the identity, M differs from a multiple of the identity only in the span of the t vectors
seen. U (d, k) is an orthonormal basis of that span and ``B = C + a I`` (k, k) is M inside of it; outside, M
is ``a I``. So an update by v, whose coordinates in the basis (extended by v's own direction where that is
new) are p, is the rank-1 update of a small matrix:

    a' = a / gamma,    B' = rank1_inverse_update(B, p, gamma)

exact, and B is stored rather than C, whose difference to a would lose the small eigenvalues of M.

Where the basis would grow beyond `max_rank`, the eigenvector of B' whose eigenvalue is nearest to a' is
dropped: M becomes a' along it. Of all directions of the basis this changes M least, by ``|eigenvalue - a'|``
in the spectral norm; the result is positive definite as before. Relative to the largest eigenvalue of M that
is `truncation_error`. A Householder reflection turns the dropped direction into the last column of U, so that
an update costs O(d k + k^3); multiplying a (d, n) matrix by M costs 4 d k n operations in place of 2 d^2 n.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.mkor.inverse import check_gamma, check_stabilizer, update_of_block


class FactoredInverse:
    """An inverse factor ``a I + U C U^T``, the identity at first.

    Unlike the dense form, an update waits for the device, to learn whether the vector is a new direction.

    Attributes:
        size: d.
        max_rank: most columns of U.
        a: fp64 of no dimensions.
        basis: U, (d, rank), orthonormal columns.
        core: B = C + a I, (rank, rank).
        hits: int64, how often the stabiliser blended.
        truncations: how often a direction was dropped.
        truncation_error: relative error of the latest truncation in the spectral norm, 0.0 before.
        largest_error: the largest of them.

    Args:
        size: d.
        max_rank: most columns of U, at least 1; d and more keeps M exact for ever.
        dtype: of U and B, fp32 or fp64.
        device: where it lies.

    Raises:
        UserError: max_rank below 1, or a half type, in which U would not stay orthonormal.
    """

    def __init__(
        self,
        size: int,
        max_rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_rank < 1:
            raise UserError(f"max_rank={max_rank}; allowed: 1 and more")
        if dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"state_dtype={dtype} with the factored form; allowed: torch.float32 or torch.float64 "
                "(the form is small already), or the dense form"
            )
        self.size = size
        self.max_rank = min(max_rank, size)
        self.a = torch.ones((), dtype=torch.float64, device=device)
        self.basis = torch.zeros(size, 0, dtype=dtype, device=device)
        self.core = torch.zeros(0, 0, dtype=dtype, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.truncations = 0
        self.truncation_error = self.largest_error = 0.0

    @property
    def rank(self) -> int:
        """Columns of U."""
        return self.basis.shape[1]

    @property
    def c(self) -> Tensor:
        """C, (rank, rank): the low-rank part in the basis."""
        return self.core - self.a.to(self.core.dtype) * self._identity(self.rank)

    def _identity(self, n: int) -> Tensor:
        return torch.eye(n, dtype=self.core.dtype, device=self.core.device)

    @torch.no_grad()
    def update(self, v: Tensor, gamma: float) -> None:
        """Take in a vector (size,); one that is not finite changes nothing.

        Raises:
            UserError: gamma outside of (0, 1].
        """
        check_gamma(gamma)
        v = v.to(self.basis.dtype)
        grown = self.a / gamma
        scale = v.abs().amax()
        # Bounds: what the type can hold of the coordinates of v, and of M.
        most = torch.finfo(v.dtype).max
        finite = (scale < most / self.size) & (grown < most)
        if gamma == 1 or not bool(finite):
            return
        if not bool(scale > 0):
            self.core = self.core / gamma
            self.a = grown
            return
        p = self._coordinates(v / scale)
        largest = torch.maximum(self.core.diagonal().amax().double(), self.a)
        self.core = update_of_block(self.core, p * scale, gamma, largest)
        self.a = grown
        if self.rank > self.max_rank:
            self._truncate()

    def _coordinates(self, v: Tensor) -> Tensor:
        """Coordinates of v (largest entry 1) in the basis, after extending it where v leaves its span."""
        p = self.basis.T @ v
        rest = v - self.basis @ p
        again = self.basis.T @ rest  # once more, for orthogonality to the last digit
        p, rest = p + again, rest - self.basis @ again
        length = torch.linalg.vector_norm(rest)
        negligible = 8 * torch.finfo(v.dtype).eps * torch.linalg.vector_norm(v)
        if self.rank == self.size or bool(length <= negligible):
            return p
        rest = rest / length
        rest = rest - self.basis @ (self.basis.T @ rest)
        self.basis = torch.cat([self.basis, (rest / torch.linalg.vector_norm(rest))[:, None]], 1)
        grown = self._identity(self.rank) * self.a.to(self.core.dtype)
        grown[:-1, :-1] = self.core
        self.core = grown
        return torch.cat([p, length[None]])

    def _truncate(self) -> None:
        """Drop the eigenvector of the core that is nearest to what M is outside of the basis."""
        values, vectors = torch.linalg.eigh(self.core.double())
        distance = (values - self.a).abs()
        at = int(distance.argmin())
        x = vectors[:, at]
        h = x.clone()
        h[-1] += torch.where(x[-1] >= 0, 1.0, -1.0)
        h = h / torch.linalg.vector_norm(h)  # I - 2 h h^T turns x into the last unit vector, or minus that
        core = self.core.double()
        core = core - 2 * torch.outer(h, h @ core)
        core = core - 2 * torch.outer(core @ h, h)
        core = (core + core.T) / 2
        h = h.to(self.basis.dtype)
        self.basis = (self.basis - 2 * torch.outer(self.basis @ h, h))[:, :-1].contiguous()
        self.core = core[:-1, :-1].to(self.core.dtype).contiguous()
        self.truncations += 1
        self.truncation_error = float(distance[at] / torch.maximum(values.amax(), self.a))
        self.largest_error = max(self.largest_error, self.truncation_error)

    @torch.no_grad()
    def largest_entry(self) -> Tensor:
        """Return the largest absolute entry of M: on its diagonal, as M is positive definite."""
        if not self.rank:
            return self.a
        return (self.a + ((self.basis @ self.c) * self.basis).sum(1).double()).amax()

    @torch.no_grad()
    def stabilize(self, threshold: float, zeta: float) -> None:
        """Blend with the identity where the largest entry is above the threshold.

        Raises:
            UserError: threshold <= 0, or zeta outside of [0, 1).
        """
        check_stabilizer(threshold, zeta)
        fires = self.largest_entry() > threshold
        self.a = torch.where(fires, zeta * self.a + (1 - zeta), self.a)
        blended = zeta * self.core + (1 - zeta) * self._identity(self.rank)
        self.core = torch.where(fires, blended, self.core)
        self.hits += fires

    def times(self, x: Tensor) -> Tensor:
        """Return ``M x`` for x (size, n), in x's type."""
        u = self.basis.to(x.dtype)
        return self.a.to(x.dtype) * x + u @ (self.c.to(x.dtype) @ (u.T @ x))

    def dense(self) -> Tensor:
        """Return M (size, size); takes the memory that this form saves."""
        eye = torch.eye(self.size, dtype=self.basis.dtype, device=self.basis.device)
        return self.a.to(eye.dtype) * eye + self.basis @ self.c @ self.basis.T

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all of it."""
        return {
            "a": self.a.clone(),
            "basis": self.basis.clone(),
            "core": self.core.clone(),
            "hits": int(self.hits),
            "truncations": self.truncations,
            "truncation_error": self.truncation_error,
            "largest_error": self.largest_error,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: another form, size or type, or a larger rank than `max_rank`.
        """
        basis = state.get("basis")
        if (
            not isinstance(basis, Tensor)
            or basis.dtype != self.basis.dtype
            or basis.shape[0] != self.size
            or basis.shape[1] > self.max_rank
        ):
            found = f"{tuple(basis.shape)} {basis.dtype}" if isinstance(basis, Tensor) else "no factored form"
            raise CheckpointError(
                f"inverse factor: {found} in the state; here the size is {self.size}, the rank at most "
                f"{self.max_rank}, the type {self.basis.dtype}; use the settings that it was saved with"
            )
        device = self.basis.device
        self.basis = basis.to(device, copy=True)
        self.core = state["core"].to(device, copy=True)
        self.a = state["a"].to(device, copy=True)
        self.hits.fill_(state["hits"])
        self.truncations = state["truncations"]
        self.truncation_error, self.largest_error = state["truncation_error"], state["largest_error"]
