"""Accordion: less compression in critical phases of training, chosen for each layer by its gradient's norm.

Source: Accordion (arXiv 2010.16248) as L-GreCo uses it (arXiv 2210.17357, section 5): it sets each layer's
    default,
whose errors sum to the budget. A layer is in a critical phase if | |g_before| - |g_now| | >= eta *
|g_before|, where g is the gradient accumulated over a period, or if the learning rate was cut at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_efficient.errors import CheckpointError, UserError


class Accordion:
    """The default option of each layer, period by period.

    Args:
        layers: number of layers.
        low: option, or one a layer, in critical phases (low compression).
        high: option, or one a layer, otherwise (high compression).
        eta: relative change of the norm from which on a phase is critical, 0 < eta < 1.

    Raises:
        UserError: an argument does not fit.
    """

    def __init__(
        self, layers: int, low: int | Sequence[int], high: int | Sequence[int], *, eta: float = 0.5
    ) -> None:
        if not 0 < eta < 1:
            raise UserError(f"eta={eta} is not allowed; it must be > 0 and < 1")
        self._eta = eta
        self._low, self._high = _each("low", low, layers), _each("high", high, layers)
        self._norms: list[float | None] = [None] * layers
        self._critical = [True] * layers

    @property
    def critical(self) -> list[bool]:
        """Whether each layer is in a critical phase; all are until two norms are known."""
        return list(self._critical)

    @property
    def defaults(self) -> list[int]:
        """The default option of each layer, for `plan_compression` and `error_budget`."""
        rows = zip(self._critical, self._low, self._high, strict=True)
        return [low if critical else high for critical, low, high in rows]

    def update(self, norms: Sequence[float] | Tensor, *, learning_rate_cut: bool = False) -> list[int]:
        """Take the norms of one period and return the defaults of the next.

        Args:
            norms: (L,) norm of each layer's gradient accumulated over the period, the same on every rank. A
                norm that is not finite makes its layer critical and is not remembered.
            learning_rate_cut: whether a step schedule cut the learning rate in the period, which makes all
                layers critical. A schedule that falls in every step is no such cut.

        Raises:
            UserError: there are not as many norms as layers, or one is negative.
        """
        values = [float(value) for value in norms]
        if len(values) != len(self._norms):
            raise UserError(
                f"norms has {len(values)} elements; expected one for each of {len(self._norms)} layers"
            )
        if any(value < 0 for value in values):
            raise UserError(f"norms: {min(values)} is negative; norms are >= 0")
        for layer, (before, now) in enumerate(zip(self._norms, values, strict=True)):
            known = before is not None and math.isfinite(now)
            self._critical[layer] = learning_rate_cut or not known or self._changed(before or 0.0, now)
            if math.isfinite(now):
                self._norms[layer] = now
        return self.defaults

    def _changed(self, before: float, now: float) -> bool:
        return before != now and abs(before - now) >= self._eta * before

    def state_dict(self) -> dict[str, Any]:
        """Norms and phases, as plain values."""
        return {"norms": list(self._norms), "critical": list(self._critical)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: it belongs to another number of layers.
        """
        if len(state["norms"]) != len(self._norms):
            raise CheckpointError(
                f"Accordion's state is of {len(state['norms'])} layers, the model has {len(self._norms)}; "
                "resume with the model that was saved"
            )
        self._norms, self._critical = list(state["norms"]), list(state["critical"])


def _each(name: str, value: int | Sequence[int], layers: int) -> list[int]:
    values = [value] * layers if isinstance(value, int) else [int(one) for one in value]
    if len(values) != layers or any(one < 0 for one in values):
        raise UserError(
            f"{name}={value!r} is not allowed; expected the number of an option, or one for each of "
            f"{layers} layers"
        )
    return values
