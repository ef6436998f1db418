"""What L-GreCo's measurements compare, and how the gradients of an arm are averaged in plain torch.

Arms: ``none``; a uniform setting of each compressor, ``powersgd`` (a given rank), ``qsgd`` (4 bits), ``topk``
(1 %); and L-GreCo on each, ``lgreco_<compressor>``, with the uniform setting as its default and the
configuration's own range around it, and on all of them together, ``lgreco_mixed``. All but the quantised ones
have error feedback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_efficient.core.keys import Key
from ds_efficient.lgreco.choosing import CompressionPlan, Planner
from ds_efficient.lgreco.compressors import sent_raw
from ds_efficient.lgreco.config import LgrecoConfig
from ds_efficient.lgreco.error_tables import Alone
from ds_efficient.lgreco.options import make_compressor
from ds_efficient.lgreco.reducer import Reducer
from ds_efficient.lgreco.simulated import SimulatedGroup, reduce_together

WINDOW = 10  # steps whose gradients a plan is made from
COMPRESSORS = ("powersgd", "qsgd", "topk", "mixed")
ARMS = ("none", *COMPRESSORS[:3], *(f"lgreco_{name}" for name in COMPRESSORS))


def section(arm: str, rank: int) -> LgrecoConfig | None:
    """The section of an arm, None for "none"; ``rank`` is the default of low rank."""
    if arm == "none":
        return None
    name = arm.removeprefix("lgreco_")
    default = rank if name in ("powersgd", "mixed") else {"qsgd": 4, "topk": 0.01}[name]
    keys: dict[str, Any] = {"compressor": name, "default": default}
    if not arm.startswith("lgreco_"):
        keys["range"] = [default, default]
    return LgrecoConfig.model_validate({"enabled": True, **keys})


class Averaging:
    """Averages gradients as one arm does, and plans anew every so many steps.

    Args:
        config: the section.
        model: whose gradients are averaged.
        transports: of this process's ranks: its own one, or all of a `SimulatedGroup`.
        key: of all random draws.
        interval: steps between two plans; 0 keeps the uniform default.

    Attributes:
        plans: (step, plan) of each choice, the defaults first.
    """

    def __init__(
        self, config: LgrecoConfig, model: nn.Module, transports: Sequence[Any], key: Key, interval: int
    ) -> None:
        shapes = {name: p.shape for name, p in model.named_parameters() if not sent_raw(p.shape)}
        self._simulated = len(transports) > 1
        self.reducers = [Reducer(transport=one, key=key, immediate=True) for one in transports]
        exchange = Alone() if self._simulated else transports[0]
        self._planner = Planner(config, shapes, exchange, key=key, ranks=transports[0].ranks)
        self._interval, self._shapes = interval, shapes
        self._accumulated: dict[str, Tensor] = {}
        self.plans: list[tuple[int, CompressionPlan]] = []
        self._take(0, self._planner.first())

    def average(self, gradients: Sequence[Mapping[str, Tensor]], step: int) -> None:
        """Replace each rank's gradients by their mean; plan after the step where it is due.

        Args:
            gradients: of each of this process's ranks, by parameter name.
            step: from 0.
        """
        due = self._interval > 0 and (step + 1) % self._interval == 0
        if self._interval and (step % self._interval) >= self._interval - min(self._interval, WINDOW):
            self._accumulate(gradients)
        if self._simulated:
            reduce_together(self.reducers, gradients)
        else:
            self.reducers[0].reduce(gradients[0])
        for reducer in self.reducers:
            reducer.commit()
        if due:
            self._take(step + 1, self._planner.plan(self._accumulated, step))
            self._accumulated = {}

    def stop_planning(self) -> None:
        """Keep the plan from now on, and sum no gradients for another one."""
        self._interval = 0

    def _accumulate(self, gradients: Sequence[Mapping[str, Tensor]]) -> None:
        for name in self._shapes:
            total = torch.stack([one[name].to(torch.float32) for one in gradients]).mean(0)
            held = self._accumulated.get(name)
            self._accumulated[name] = total if held is None else held.add_(total)

    def _take(self, step: int, plan: CompressionPlan) -> None:
        self.plans.append((step, plan))
        for reducer in self.reducers:
            reducer.take(plan.choices)


def simulated(config: LgrecoConfig, model: nn.Module, ranks: int, key: Key, interval: int) -> Averaging:
    """An `Averaging` of ranks in this process."""
    return Averaging(config, model, SimulatedGroup(ranks).transports, key, interval)


def choices_rows(
    plans: Sequence[tuple[int, CompressionPlan]], shapes: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """A row for each plan and layer: what was chosen, its bits an element and how the plan stands."""
    rows = []
    for step, plan in plans:
        for name, option in plan.choices.items():
            size = make_compressor(option).nbytes(tuple(shapes[name]))
            elements = torch.Size(shapes[name]).numel()
            rows.append(
                {
                    "step": step, "layer": name, "elements": elements, "compressor": option.compressor,
                    "setting": option.setting, "bits": 8 * size / elements, "plan_bytes": plan.nbytes,
                    "default_bytes": plan.default_nbytes, "raw_bytes": plan.raw_nbytes, "error": plan.error,
                    "budget": plan.budget, "norm": plan.norm, "plan_seconds": plan.seconds,
                }
            )  # fmt: skip
    return rows
