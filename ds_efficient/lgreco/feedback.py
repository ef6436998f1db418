"""Error feedback, and the size of compression errors.

What a rank's compressor loses in one step is added to its gradient in the next. Summed over the steps, what
was sent is then the sum of the gradients less the last error (it telescopes): Karimireddy et al., arXiv
1901.09847. Needed by biased compressors (largest entries, low rank), not by unbiased quantisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.lgreco.compressors import QSGD, TopK
from ds_efficient.ops import lgreco_low_rank as low_rank

ErrorKind = Literal["l2", "l2_squared"]


class ErrorFeedback:
    """The errors of one rank, by name of the tensor, float32, in the units of unscaled gradients.

    A step: ``corrected`` before compression; ``record`` after it; then ``commit``, or ``rollback`` where the
    step is not taken (gradient overflow), which leaves the errors as they were. Until then both are held.

    Args:
        immediate: replace an error at once, so that one is held and nothing can be rolled back: for training
            in which no step is left out.
    """

    def __init__(self, *, immediate: bool = False) -> None:
        self._immediate = immediate
        self._errors: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._released: set[str] = set()

    def corrected(self, name: str, gradient: Tensor, *, unscale: float = 1.0) -> Tensor:
        """``unscale`` * gradient + error, float32; in new memory, or where ``immediate`` in the error's.

        Args:
            name: of the tensor.
            gradient: any shape, the same in every step.
            unscale: 1 / loss scale where the gradient is scaled.

        Raises:
            UserError: the shape is not that of the error.
        """
        gradient, error = gradient.detach(), self._error_for(name, gradient)
        if error is None:
            return gradient.to(torch.float32, copy=True).mul_(unscale)
        if self._immediate:
            return error.add_(gradient, alpha=unscale)
        return torch.add(error, gradient, alpha=unscale)

    def projected(self, name: str, gradient: Tensor, q: Tensor, p: Tensor, *, unscale: float = 1.0) -> Tensor:
        """As `corrected`, and its product with q^T is written over ``p``, on the CPU in one pass.

        Args:
            name, gradient, unscale: as in `corrected`; (n, ...), m elements a row.
            q: (r, m) float32, contiguous.
            p: (n, r) float32, contiguous.

        Raises:
            UserError: the shape is not that of the error.
        """
        error = self._error_for(name, gradient)
        made = error if self._immediate and error is not None else _empty(gradient)
        low_rank.project(gradient, error, q, made, p, unscale=unscale)
        return made

    def keep(self, name: str, error: Tensor) -> None:
        """Note the error of this step as it is; takes the memory."""
        (self._errors if self._immediate else self._pending)[name] = error

    def record(self, name: str, corrected: Tensor, sent: Tensor) -> None:
        """Note the error ``corrected`` - ``sent`` of this step; overwrites ``corrected`` with it.

        Args:
            name: of the tensor.
            corrected: result of `corrected`.
            sent: what the other ranks make of this rank's payload, the same shape.
        """
        self.keep(name, corrected.sub_(sent))

    def compress(
        self,
        name: str,
        gradient: Tensor,
        compressor: QSGD | TopK,
        key: Key | int = 0,
        *,
        unscale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Payload of ``unscale`` * gradient + error, its error noted: `corrected` and `record` in one pass.

        Args:
            name: of the tensor.
            gradient: contiguous or not, the same shape in every step.
            compressor: the payload is its; of `TopK` with float32 values.
            key: of the rounding.
            unscale: 1 / loss scale where the gradient is scaled.
            out: uint8 of the payload's size, to write it to.

        Raises:
            UserError: the shape is not that of the error, or another argument does not fit.
            OpBuildError: the compiled code cannot be built.
        """
        error = self._error_for(name, gradient)
        new_error = error if self._immediate and error is not None else _empty(gradient)
        payload = compressor.compress(
            gradient, key, error=error, unscale=unscale, new_error=new_error, out=out
        )
        self.keep(name, new_error)
        return payload

    def commit(self) -> None:
        """Take the errors noted since the last commit."""
        self._errors.update(self._pending)
        for name in self._released:
            self._errors.pop(name, None)
        self.rollback()

    def rollback(self) -> None:
        """Forget the errors noted since the last commit."""
        self._pending.clear()
        self._released.clear()

    def release(self, name: str, gradient: Tensor, *, scale: float = 1.0) -> None:
        """Add what is left of a tensor's error to its gradient, in place: it goes without feedback now.

        Args:
            name: of the tensor.
            gradient: ``scale`` times the unscaled one, of any floating dtype.
            scale: loss scale.
        """
        error = self._errors.get(name)
        if error is None or name in self._released:
            return
        gradient.copy_(gradient.to(torch.float32).add_(error, alpha=scale))
        self._released.add(name)
        if self._immediate:
            del self._errors[name]

    def forget(self, names: Iterable[str]) -> None:
        """Do not take the errors noted of these since the last commit; ``immediate`` ones begin anew."""
        for name in names:
            self._pending.pop(name, None)
            if self._immediate:
                self._errors.pop(name, None)

    def _error_for(self, name: str, gradient: Tensor) -> Tensor | None:
        error = self._errors.get(name)
        if error is not None and error.shape != gradient.shape:
            raise UserError(
                f"the error of {name!r} has shape {tuple(error.shape)}, its gradient {tuple(gradient.shape)}"
            )
        return error

    def error(self, name: str) -> Tensor | None:
        """The error of a tensor, None before the first commit."""
        return self._errors.get(name)

    @property
    def nbytes(self) -> int:
        """Memory of the errors, those not committed included."""
        return sum(error.nbytes for errors in (self._errors, self._pending) for error in errors.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The committed errors by name; the tensors themselves."""
        return dict(self._errors)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all errors by copies of these.

        Raises:
            UserError: one is not float32.
        """
        for name, error in state.items():
            if error.dtype != torch.float32:
                raise UserError(f"the error of {name!r} is {error.dtype}; expected torch.float32")
        self._errors = {name: error.detach().clone() for name, error in state.items()}
        self.rollback()


def _empty(gradient: Tensor) -> Tensor:
    return torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)


def compression_error(original: Tensor, sent: Tensor, kind: ErrorKind = "l2") -> Tensor:
    """Size of ``original`` - ``sent``: norm (``"l2"``) or its square (``"l2_squared"``), which is additive.

    Args:
        original, sent: the same shape, any floating dtypes.
        kind: as ``error`` in the configuration.

    Returns:
        0-dimensional float64, summed in float64; NaN or infinite where a number is not finite.

    Raises:
        UserError: ``kind`` is neither, or the shapes differ.
    """
    if kind not in ("l2", "l2_squared"):
        raise UserError(f"error={kind!r} is not known; allowed: l2, l2_squared")
    if original.shape != sent.shape:
        raise UserError(f"shapes {tuple(original.shape)} and {tuple(sent.shape)} differ")
    difference = original.detach().to(torch.float32) - sent.detach().to(torch.float32)
    norm = torch.linalg.vector_norm(difference, dtype=torch.float64)
    return norm if kind == "l2" else norm.square()
