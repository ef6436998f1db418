"""Many inverse factors in low-rank form, updated together without waiting for the device.

After t rank-1 updates from the identity an inverse factor (`ds_efficient.ops.mkor`) is
``M = a I - U S U^T`` with U (d, k) an orthonormal basis of the vectors seen and S (k, k) positive
semidefinite, since every update of the identity subtracts. With the coordinates z of v in that basis,
extended by v's own direction where that is new, ``y = a z - S z`` and ``q = z^T y``, an update is

    a <- a / gamma,    S <- (S + (1 - gamma) / (gamma + (1 - gamma) q) y y^T) / gamma

and a blend with the identity ``a <- zeta a + 1 - zeta, S <- zeta S``: exact until k directions have been
seen. From then on one direction is dropped at each new one: a unit vector x of the extended basis for which
``x^T S x`` is close to the least (M becomes a along x, the largest value that M has anywhere), found as the
dominant direction of ``(I - S / a) ** (2 ** 16)``, so that its loss exceeds the least one by at most some
``2**-16 a``. Deflation keeps S positive semidefinite and below a, so M stays positive definite whatever x is.
The loss relative to a is measured in the spectral norm (`FactoredFactors.truncation_error`).

Memory per factor: ``d k`` numbers of the basis, as many of the operand that products use, and k^2 in float64.
Work per update: some ``20 d k`` operations and a stack of products of (k, k) matrices; per product with M
(`ds_efficient.ops.mkor_precondition`) ``4 d k`` operations for each column in place of ``2 d^2``. The
number of launches depends on the number of distinct sizes, not of factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.ops.mkor_reference import BLENDED, LEFT, ROUNDING, UPDATED

_SQUARINGS = 16
_CHUNK = 64 << 20  # bytes of a float64 copy of some bases
_JITTER = 1e-10  # of S / a before its Cholesky decomposition: S may be singular
_PER_FACTOR = ("a", "core", "rank", "truncations", "truncation_error", "largest_error")


def damping(dtype: torch.dtype) -> float:
    """Share of the identity in operands: W gives ``(1 - damping) M + damping a I``.

    Rounding W moves the eigenvalues of ``I - W W^T`` by up to one epsilon (2^-7 for bfloat16); with twice as
    much of the identity the product stays positive definite nevertheless.
    """
    return 2 * torch.finfo(dtype).eps


class _Group:
    """Factors of one size.

    Attributes:
        members, places: their places among all factors, on the host and on the device.
        basis: U, (n, d, k); columns not yet in use are 0.
        operand: W of `FactoredFactors.operand`, (n, d, k).
        core: S, (n, k, k) float64.
        a, truncation_error, largest_error: (n,) float64.
        rank, truncations: (n,) int64.
    """

    def __init__(
        self,
        members: list[int],
        size: int,
        k: int,
        kinds: tuple[torch.dtype, torch.dtype],
        device: torch.device,
    ) -> None:
        self.members, self.size, self.k = members, size, k
        n = len(members)
        self.basis = torch.zeros(n, size, k, dtype=kinds[0], device=device)
        self.operand = torch.zeros(n, size, k, dtype=kinds[1], device=device)
        self.core = torch.zeros(n, k, k, dtype=torch.float64, device=device)
        self.a = torch.ones(n, dtype=torch.float64, device=device)
        self.truncation_error, self.largest_error = torch.zeros_like(self.a), torch.zeros_like(self.a)
        self.places = torch.tensor(members, device=device)
        self.rank = torch.zeros(n, dtype=torch.int64, device=device)
        self.truncations = torch.zeros_like(self.rank)
        self.updates = 0  # no rank is larger
        self._largest: Tensor | None = None  # entries, once known

    def chunks(self) -> list[slice]:
        """Shares of the factors whose bases fit in `_CHUNK`, in float64."""
        step = max(1, _CHUNK // (8 * self.size * self.k))
        return [slice(first, first + step) for first in range(0, len(self.members), step)]

    def largest_entry(self) -> Tensor:
        """Largest absolute entry of each M, (n,) float64: on its diagonal, as M is positive definite."""
        if self._largest is None:
            taken = []
            for part in self.chunks():
                basis = self.basis[part]
                taken.append((torch.bmm(basis, self.core[part].to(basis.dtype)) * basis).sum(2).amin(1))
            self._largest = self.a - torch.cat(taken).double()
        return self._largest

    def changed(self) -> None:
        """Forget what followed from basis, core and a."""
        self._largest = None

    def stabilize(self, largest: Tensor, threshold: float, zeta: float) -> tuple[Tensor, Tensor]:
        """Blend where ``largest`` is above the threshold; returns where, and the new largest entries."""
        fires = largest > threshold
        self.a = torch.where(fires, zeta * self.a + (1 - zeta), self.a)
        self.core = torch.where(fires[:, None, None], zeta * self.core, self.core)
        return fires, torch.where(fires, zeta * largest + (1 - zeta), largest)

    def coordinates(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates of v in the basis, its direction outside of it, and its length there.

        Args:
            v: (n, d) float64.

        Returns:
            (n, k), (n, d) of length 1 or 0, and (n,) with 0 where v does not leave the span.
        """
        inside, outside, lengths = [], [], []
        eps = torch.finfo(self.basis.dtype).eps
        for part in self.chunks():
            basis, rest = self.basis[part].double(), v[part, :, None]
            p = torch.zeros_like(basis[:, 0, :, None])
            for _ in range(2):  # once more, for orthogonality to the last digit
                step = torch.bmm(basis.mT, rest)
                p, rest = p + step, torch.baddbmm(rest, basis, step, alpha=-1)
            length = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
            new = length > 8 * eps * torch.linalg.vector_norm(v[part], dim=1)[:, None, None]
            new &= (self.rank[part] < self.size)[:, None, None]
            rest = torch.where(new, rest / length, 0.0)
            rest = torch.baddbmm(rest, basis, torch.bmm(basis.mT, rest), alpha=-1)
            rest = torch.where(new, rest / torch.linalg.vector_norm(rest, dim=1, keepdim=True), 0.0)
            inside.append(p[:, :, 0])
            outside.append(rest[:, :, 0])
            lengths.append(torch.where(new, length, 0.0)[:, 0, 0])
        return torch.cat(inside), torch.cat(outside), torch.cat(lengths)

    def dropped(self, core: Tensor, a: Tensor, new: Tensor) -> Tensor:
        """The direction of the extended basis that is dropped, (n, k + 1) of length 1.

        Args:
            core: (n, k + 1, k + 1) of the extended basis.
            a: (n,).
            new: (n,) bool, whether the last column of the extended basis is in use.
        """
        places = torch.arange(self.k + 1, device=core.device)
        # A column not in use yet, or where there is nothing new the place for it.
        at = torch.where(new, self.rank, self.k)
        x = (places == at[:, None]).double()
        if self.updates < self.k:
            return x
        eye = torch.eye(self.k + 1, dtype=core.dtype, device=core.device)
        power = eye - core / a[:, None, None]
        for squaring in range(_SQUARINGS):
            power = torch.bmm(power, power)
            if (
                squaring % 4 == 3
            ):  # its largest eigenvalue is at most 1, and four squarings leave 1e-90 of 1e-5
                power = power / power.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        best = power.diagonal(dim1=1, dim2=2).argmax(1)
        column = power.gather(2, best[:, None, None].expand(-1, self.k + 1, 1))[:, :, 0]
        column = column / torch.linalg.vector_norm(column, dim=1, keepdim=True)
        return torch.where((new & (self.rank == self.k))[:, None], column, x)

    def take_in(self, v: Tensor, gamma: float, largest: Tensor, good: Tensor) -> None:
        """Update by v (n, d) float64 where ``good``; ``largest`` entries of M, (n,)."""
        v = torch.where(good[:, None], v, 0.0)
        p, outside, length = self.coordinates(v)
        if gamma == 1:
            length = torch.zeros_like(length)
        z = torch.cat([p, length[:, None]], 1)
        core = torch.nn.functional.pad(self.core, (0, 1, 0, 1))
        y = self.a[:, None] * z - torch.bmm(core, z[:, :, None])[:, :, 0]
        q = (z * y).sum(1)
        floor = gamma * ROUNDING * torch.finfo(self.basis.dtype).eps * largest * v.square().sum(1)
        weight = torch.minimum((1 - gamma) / (gamma + (1 - gamma) * q), (q - floor) / q.square())
        weight = torch.where(q > floor, weight, 0.0)
        scale = torch.where(good, torch.full_like(self.a, 1 / gamma), 1.0)
        a = self.a * scale
        core = scale[:, None, None] * torch.baddbmm(core, (weight[:, None] * y)[:, :, None], y[:, None, :])
        new = length > 0
        x = self.dropped(core, a, new)
        h = x.clone()
        h[:, -1] += torch.where(x[:, -1] >= 0, 1.0, -1.0)
        h = h / torch.linalg.vector_norm(
            h, dim=1, keepdim=True
        )  # I - 2 h h^T turns x into the last unit vector
        column, row = h[:, :, None], h[:, None, :]
        core = torch.baddbmm(core, column, torch.bmm(row, core), alpha=-2)
        core = torch.baddbmm(core, torch.bmm(core, column), row, alpha=-2)
        core = (core + core.mT) / 2
        self._measure(core, a, new & (self.rank == self.k))
        self._rotate(outside, h)
        self.core, self.a = core[:, :-1, :-1].contiguous(), a
        self.rank = torch.minimum(self.rank + new, torch.full_like(self.rank, self.k))
        self.updates += 1

    def _measure(self, core: Tensor, a: Tensor, truncated: Tensor) -> None:
        """Note what is lost with the last row and column."""
        middle, side = core[:, -1, -1].abs(), core[:, -1, :-1].square().sum(1)
        lost = (middle + (middle.square() + 4 * side).sqrt()) / (2 * a)
        self.truncations = self.truncations + truncated
        self.truncation_error = torch.where(truncated, lost, self.truncation_error)
        self.largest_error = torch.maximum(self.largest_error, self.truncation_error)

    def _rotate(self, outside: Tensor, h: Tensor) -> None:
        """Take the first k columns of the extended basis times ``I - 2 h h^T``."""
        for part in self.chunks():
            basis, row = self.basis[part].double(), h[part, None, :-1]
            product = torch.baddbmm(outside[part, :, None] * h[part, None, -1:], basis, row.mT)
            self.basis[part] = torch.baddbmm(basis, product, row, alpha=-2).to(self.basis.dtype)

    def refresh(self) -> None:
        """Make the operand from basis, core and a."""
        share = self.core * ((1 - damping(self.operand.dtype)) / self.a)[:, None, None]
        share.diagonal(dim1=1, dim2=2).add_(_JITTER)
        root = torch.linalg.cholesky_ex(share).L
        for part in self.chunks():
            self.operand[part] = torch.bmm(self.basis[part].double(), root[part]).to(self.operand.dtype)


class FactoredFactors:
    """Inverse factors ``a I - U S U^T``, each the identity at first; nothing here waits for the device.

    Args:
        sizes: d of each factor.
        max_rank: most columns of U, at least 1; d and more keeps a factor exact for ever.
        device: where they lie.
        dtype: of the bases, float32, or float64 for studies.
        operand_dtype: of the operands of products: that of the gradients.

    Raises:
        UserError: max_rank or a size below 1, or a half type for the bases, which would not stay orthonormal.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        max_rank: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        operand_dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_rank < 1 or any(size < 1 for size in sizes):
            raise UserError(f"max_rank={max_rank}, sizes={list(sizes)}; allowed: 1 and more")
        if dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"dtype={dtype} for the factored form; allowed: torch.float32 or torch.float64 "
                "(the form is small already), or the dense form"
            )
        self.sizes, self.max_rank, self.device = tuple(sizes), max_rank, torch.device(device)
        self._groups: list[_Group] = []
        self._places: list[tuple[_Group, int]] = [None] * len(sizes)  # type: ignore[list-item]
        for size in dict.fromkeys(self.sizes):
            members = [index for index, other in enumerate(self.sizes) if other == size]
            group = _Group(members, size, min(max_rank, size), (dtype, operand_dtype), self.device)
            self._groups.append(group)
            for place, index in enumerate(members):
                self._places[index] = (group, place)
        # made once: the memory stays
        self._operands = [group.operand[place] for group, place in self._places]
        self._stale: set[int] = set()

    def __len__(self) -> int:
        """Number of factors."""
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes that the factors and their operands take."""
        return sum(g.basis.nbytes + g.operand.nbytes + g.core.nbytes for g in self._groups)

    @torch.no_grad()
    def update_(self, vectors: Tensor, *, gamma: float, threshold: float, zeta: float) -> Tensor:
        """Stabilise and update every factor; arguments and outcomes of `ds_efficient.ops.mkor.update_`.

        Along v a factor keeps at least 32 epsilon of the type of its basis, relative to its largest entry.

        Args:
            vectors: (sum of all d,) the vectors one behind the other.
            gamma: weight of the old statistics, 0 < gamma <= 1.
            threshold: a factor whose largest entry exceeds it becomes zeta M + (1 - zeta) I before.
            zeta: 0 <= zeta <= 1.

        Returns:
            (number of factors,) int32: UPDATED, BLENDED or, where v is not finite, LEFT.

        Raises:
            UserError: gamma, threshold, zeta or the number of vectors' elements do not fit.
        """
        if not (0 < gamma <= 1 and threshold > 0 and 0 <= zeta <= 1):
            raise UserError(
                f"gamma={gamma}, threshold={threshold}, zeta={zeta}; allowed: 0 < gamma <= 1, threshold > 0 "
                "and 0 <= zeta <= 1"
            )
        if vectors.shape != (sum(self.sizes),):
            raise UserError(f"vectors of shape {tuple(vectors.shape)}; expected ({sum(self.sizes)},)")
        outcome = torch.empty(len(self), dtype=torch.int32, device=self.device)
        parts = vectors.split(list(self.sizes))
        for group in self._groups:
            v = torch.stack([parts[index] for index in group.members]).double()
            good = torch.isfinite(v).all(1) & (group.a / gamma < torch.finfo(group.basis.dtype).max)
            largest = group.largest_entry()
            fires, largest = group.stabilize(torch.where(good, largest, 0.0), threshold, zeta)
            group.take_in(v, gamma, largest, good)
            group.changed()
            self._stale.add(id(group))  # once for several updates one after another
            kind = torch.where(fires, BLENDED, UPDATED)
            found = torch.where(good, kind, LEFT).to(torch.int32)
            outcome.index_copy_(0, group.places, found)
        return outcome

    def operand(self, index: int) -> Tensor:
        """Return W (d, k) with ``M = a (I - W W^T)``, up to `damping`; made when first asked for."""
        group, _ = self._places[index]
        if id(group) in self._stale:
            group.refresh()
            self._stale.discard(id(group))
        return self._operands[index]

    def times(self, index: int, x: Tensor) -> Tensor:
        """Return ``M x`` for x (d, n), in x's type."""
        group, place = self._places[index]
        basis = group.basis[place].to(x.dtype)
        inner = group.core[place].to(x.dtype) @ (basis.mT @ x)
        return group.a[place].to(x.dtype) * x - basis @ inner

    def dense(self, index: int) -> Tensor:
        """Return M (d, d) in float64; takes the memory that this form saves."""
        group, place = self._places[index]
        basis = group.basis[place].double()
        eye = torch.eye(group.size, dtype=torch.float64, device=self.device)
        return group.a[place] * eye - basis @ group.core[place] @ basis.mT

    def largest_entry(self) -> Tensor:
        """Return the largest absolute entry of each factor, (n,) float64."""
        return self._in_order([group.largest_entry() for group in self._groups])

    @property
    def a(self) -> Tensor:
        """What each M is outside of its basis, (n,) float64."""
        return self._in_order([group.a for group in self._groups])

    @property
    def rank(self) -> Tensor:
        """Directions that each factor holds, (n,) int64."""
        return self._in_order([group.rank for group in self._groups])

    @property
    def truncations(self) -> Tensor:
        """How often each factor has dropped a direction, (n,) int64."""
        return self._in_order([group.truncations for group in self._groups])

    @property
    def truncation_error(self) -> Tensor:
        """What the latest truncation of each factor changed, relative to a, spectral norm, (n,) float64."""
        return self._in_order([group.truncation_error for group in self._groups])

    @property
    def largest_error(self) -> Tensor:
        """The largest `truncation_error` of each factor so far, (n,) float64."""
        return self._in_order([group.largest_error for group in self._groups])

    def _in_order(self, found: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(found))
        return torch.empty_like(joined).index_copy_(
            0, torch.cat([group.places for group in self._groups]), joined
        )

    def state(self, index: int) -> dict[str, Tensor]:
        """Return copies of all that makes up one factor."""
        group, place = self._places[index]
        return {name: getattr(group, name)[place].clone() for name in ("basis", *_PER_FACTOR)}

    def load_state(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned, of a factor of the same size, rank limit and type.

        Raises:
            CheckpointError: another form, size, rank limit or type.
        """
        group, place = self._places[index]
        basis, here = state.get("basis"), group.basis[place]
        complete = all(isinstance(state.get(name), Tensor) for name in _PER_FACTOR)
        if not complete or basis is None or basis.shape != here.shape or basis.dtype != here.dtype:
            found = "no factored form" if basis is None else f"{tuple(basis.shape)} {basis.dtype}"
            raise CheckpointError(
                f"inverse factor {index}: {found} in the state, {tuple(here.shape)} {here.dtype} here; use "
                "the model, form, max_rank and state_dtype that it was saved with"
            )
        for name in ("basis", *_PER_FACTOR):
            getattr(group, name)[place] = state[name].to(self.device)
        group.updates = group.k  # the ranks are not known here
        group.changed()
        self._stale.add(id(group))
