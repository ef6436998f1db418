"""Which option each layer gets, anew every so many steps: error table, budget, plan, the same on all ranks.

Rank 0 plans and the others take its choice, as in L-GreCo (arXiv 2210.17357, Algorithm 1). The budget is the
error of the configuration's default on the same gradients, layer by layer of what Accordion picks where it is
switched on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.lgreco.accordion import Accordion
from ds_efficient.lgreco.config import LgrecoConfig
from ds_efficient.lgreco.error_tables import ErrorTable, Exchange, measure_errors, option_sizes
from ds_efficient.lgreco.options import RAW, Option, default_option, layer_options
from ds_efficient.lgreco.planner import error_budget, plan_compression
from ds_efficient.lgreco.timing import Floats, SynchronisationModel


class CompressionPlan(NamedTuple):
    """What each layer is sent as, from one choice to the next.

    Attributes:
        choices: option of each layer, by name.
        defaults: the default of each layer, whose errors are the budget.
        budget: largest sum of errors; NaN before anything is measured, like the two that follow.
        error: sum of the true errors of the choices.
        norm: of the gradient that they were measured on, over all layers.
        nbytes, default_nbytes, raw_nbytes: bytes a step and rank of the choices, the defaults, and raw.
        seconds: that measuring and planning took on this rank.
        measured_nbytes: that this rank sent for it.
    """

    choices: dict[str, Option]
    defaults: dict[str, Option]
    budget: float
    error: float
    norm: float
    nbytes: int
    default_nbytes: int
    raw_nbytes: int
    seconds: float = 0.0
    measured_nbytes: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for checkpoints and JSON."""
        plain: dict[str, Any] = self._asdict()
        for key in ("choices", "defaults"):
            plain[key] = {name: list(option) for name, option in plain[key].items()}
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> CompressionPlan:
        """The plan of `to_plain`."""
        values = dict(plain)
        for key in ("choices", "defaults"):
            values[key] = {name: Option(*option) for name, option in values[key].items()}
        return cls(**values)


class Planner:
    """Plans for the layers of one data-parallel group.

    Args:
        config: the section.
        shapes: shape of each layer that may be compressed, by parameter name; the same on all ranks.
        exchange: the group.
        key: of what is drawn, the same on all ranks.
        dtype: in which raw gradients and the values of "topk" are sent.
        model: measured times, for the objective "time".
        buckets: bucket of each layer in ``model``, by name.
        ranks: whose bytes count, by default those of ``exchange``.

    Raises:
        UserError: ``model`` does not know a layer's bucket.
    """

    def __init__(
        self,
        config: LgrecoConfig,
        shapes: Mapping[str, Sequence[int]],
        exchange: Exchange,
        *,
        key: Key,
        dtype: torch.dtype = torch.float32,
        model: SynchronisationModel | None = None,
        buckets: Mapping[str, int] | None = None,
        ranks: int | None = None,
    ) -> None:
        self._config, self._exchange, self._key, self._dtype = config, exchange, key, dtype
        self._names, self._shapes = list(shapes), dict(shapes)
        self._ranks = ranks = exchange.ranks if ranks is None else ranks
        self.options = {
            name: layer_options(config, shape, dtype, ranks=ranks) for name, shape in shapes.items()
        }
        self.sizes = {
            name: option_sizes(self.options[name], shape, dtype, ranks=ranks)
            for name, shape in shapes.items()
        }
        self._uniform = self._places(shapes, None)
        self._accordion: Accordion | None = None
        if config.accordion.enabled:
            low, high = (self._places(shapes, getattr(config.accordion, one)) for one in ("low", "high"))
            self._accordion = Accordion(len(self._names), low, high, eta=config.accordion.eta)
        self.time_by(model, buckets)

    def time_by(self, model: SynchronisationModel | None, buckets: Mapping[str, int] | None) -> None:
        """Take measured times for the objective "time", the same on all ranks.

        Raises:
            UserError: a layer has no bucket, or the model does not know it.
        """
        self._costs: list[Floats] | None = None
        if model is None or self._config.objective != "time":
            return
        missing = [name for name in self._names if name not in (buckets or {})]
        if missing:
            raise UserError(f'buckets: layer {missing[0]!r} is in none; the objective "time" needs one each')
        places = [(buckets or {})[name] for name in self._names]
        costs = model.costs([self.sizes[name] for name in self._names], places)
        self._costs = costs

    def _places(self, shapes: Mapping[str, Sequence[int]], setting: float | None) -> list[int]:
        """Number of each layer's default in its options."""
        return [
            self.options[name].index(
                default_option(self._config, shape, self._dtype, ranks=self._ranks, setting=setting)
            )
            for name, shape in shapes.items()
        ]

    @property
    def _defaults(self) -> list[int]:
        return self._uniform if self._accordion is None else self._accordion.defaults

    def first(self) -> CompressionPlan:
        """The defaults everywhere, before anything is measured."""
        return self._result(self._defaults, self._defaults, None)

    def plan(
        self, accumulated: Mapping[str, Tensor], step: int, *, learning_rate_cut: bool = False
    ) -> CompressionPlan:
        """Measure the errors and choose; all ranks call it at the same step and get the same plan.

        Args:
            accumulated: this rank's gradient of each layer, summed over some steps: float32, in unscaled
                units, neither compressed nor with errors fed back. Read one by one, and overwritten. One
                that is missing counts as zeros.
            step: number of the step, part of the keys.
            learning_rate_cut: see `Accordion.update`.

        Returns:
            The plan. A layer whose gradient is zero on all ranks, or not finite, keeps its default and is not
            in the sums of errors.

        Raises:
            UserError: the objective is "time" and no times were given.
        """
        begin = time.perf_counter()
        if self._config.objective == "time" and self._costs is None:
            raise UserError('objective "time" needs measured times; call time_by before plan')
        table = measure_errors(
            accumulated,
            self._shapes,
            self.options,
            self._key.fold("errors", step),
            exchange=self._exchange,
            kind=self._config.error,
        )
        if self._accordion is not None:
            self._accordion.update(table.norms, learning_rate_cut=learning_rate_cut)
        defaults = self._defaults
        choices = self._choose(table, defaults) if self._exchange.rank == 0 else None
        choices = self._agreed(choices)
        found = self._result(choices, defaults, table)
        return found._replace(seconds=time.perf_counter() - begin)

    def _choose(self, table: ErrorTable, defaults: Sequence[int]) -> list[int]:
        """The plan of rank 0."""
        known = [
            number for number, default in enumerate(defaults) if table.errors[number][default].isfinite()
        ]
        choices = list(defaults)
        if not known:
            return choices
        errors = [table.errors[number] for number in known]
        usual = [defaults[number] for number in known]
        costs = self._costs or [np.asarray(self.sizes[name], dtype=np.float64) for name in self._names]
        plan = plan_compression(
            errors,
            [costs[number] for number in known],
            error_budget(errors, usual),
            buckets=self._config.buckets,
            default=usual,
        )
        for number, choice in zip(known, plan.tolist(), strict=True):
            choices[number] = choice
        return choices

    def _agreed(self, choices: Sequence[int] | None) -> list[int]:
        """Rank 0's choices, on all ranks: a sum in which the others have zeros."""
        spread = torch.zeros(len(self._names), dtype=torch.float64)
        if choices is not None:
            spread.copy_(torch.tensor(choices, dtype=torch.float64))
        self._exchange.all_reduce(spread)
        return [int(value) for value in spread.tolist()]

    def _result(
        self, choices: Sequence[int], defaults: Sequence[int], table: ErrorTable | None
    ) -> CompressionPlan:
        budget = error = norm = math.nan
        if table is not None:
            rows = [
                (row, float(size), choice, default)
                for row, size, choice, default in zip(
                    table.errors, table.norms, choices, defaults, strict=True
                )
                if row[default].isfinite()
            ]
            budget = math.fsum(float(row[default]) for row, _, _, default in rows)
            error = math.fsum(float(row[choice]) for row, _, choice, _ in rows)
            norm = math.sqrt(math.fsum(size * size for _, size, _, _ in rows))
        return CompressionPlan(
            choices=self._named(choices),
            defaults=self._named(defaults),
            budget=budget,
            error=error,
            norm=norm,
            nbytes=self._total(choices),
            default_nbytes=self._total(defaults),
            raw_nbytes=sum(self.sizes[name][self.options[name].index(RAW)] for name in self._names),
            measured_nbytes=0 if table is None else table.nbytes,
        )

    def _named(self, places: Sequence[int]) -> dict[str, Option]:
        return {name: self.options[name][place] for name, place in zip(self._names, places, strict=True)}

    def _total(self, places: Sequence[int]) -> int:
        return sum(self.sizes[name][place] for name, place in zip(self._names, places, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What the next plan depends on beside the gradients, as plain values."""
        return {"accordion": None if self._accordion is None else self._accordion.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; a run that switches Accordion on starts it afresh.

        Raises:
            CheckpointError: the state belongs to other layers.
        """
        if "accordion" not in state:
            raise CheckpointError(
                "the planner's state has no entry accordion; it was saved by something else"
            )
        if self._accordion is not None and state["accordion"] is not None:
            self._accordion.load_state_dict(state["accordion"])
