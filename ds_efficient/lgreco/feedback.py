"""Error feedback, and the size of compression errors.

What a rank's compressor loses in one step is added to its gradient in the next. Summed over the steps, what
was sent is then the sum of the gradients less the last error (it telescopes): Karimireddy et al., arXiv
1901.09847. Needed by biased compressors (largest entries, low rank), not by unbiased quantisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ds_efficient.errors import UserError

ErrorKind = Literal["l2", "l2_squared"]


class ErrorFeedback:
    """The errors of one rank, by name of the tensor, float32, in the units of unscaled gradients.

    A step: ``corrected`` before compression; ``record`` after it; then ``commit``, or ``rollback`` where the
    step is not taken (gradient overflow), which leaves the errors as they were.
    """

    def __init__(self) -> None:
        self._errors: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def corrected(self, name: str, gradient: Tensor, *, unscale: float = 1.0) -> Tensor:
        """``unscale`` * gradient + error, float32, in new memory.

        Args:
            name: of the tensor.
            gradient: any shape, the same in every step.
            unscale: 1 / loss scale where the gradient is scaled.

        Raises:
            UserError: the shape is not that of the error.
        """
        total = gradient.detach().to(torch.float32, copy=True).mul_(unscale)
        error = self._errors.get(name)
        if error is None:
            return total
        if error.shape != total.shape:
            raise UserError(
                f"the error of {name!r} has shape {tuple(error.shape)}, its gradient {tuple(total.shape)}"
            )
        return total.add_(error)

    def record(self, name: str, corrected: Tensor, sent: Tensor) -> None:
        """Note the error ``corrected`` - ``sent`` of this step; overwrites ``corrected`` with it.

        Args:
            name: of the tensor.
            corrected: result of `corrected`.
            sent: what the other ranks make of this rank's payload, the same shape.
        """
        self._pending[name] = corrected.sub_(sent)

    def commit(self) -> None:
        """Take the errors noted since the last commit."""
        self._errors.update(self._pending)
        self._pending.clear()

    def rollback(self) -> None:
        """Forget the errors noted since the last commit."""
        self._pending.clear()

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
        self._pending.clear()


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
