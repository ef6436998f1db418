"""A reducer that chooses each layer's compression anew every so many steps.

What the technique puts into DeepSpeed, without DeepSpeed: `Reducer`, `Planner` and `GradientWindow` of one
data-parallel group, their order in a step, and their state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import CheckpointError
from ds_efficient.lgreco.calibration import measure_synchronisation
from ds_efficient.lgreco.choosing import CompressionPlan, Planner
from ds_efficient.lgreco.compressors import Raw, sent_raw
from ds_efficient.lgreco.config import LgrecoConfig
from ds_efficient.lgreco.options import RAW, make_compressor
from ds_efficient.lgreco.reducer import Reducer
from ds_efficient.lgreco.timing import SynchronisationModel
from ds_efficient.lgreco.transport import Transport
from ds_efficient.lgreco.window import STEPS, GradientWindow, mean_of
from ds_efficient.lgreco.wire import slice_of

logger = logging.getLogger(__name__)

_TIMED_BUCKETS = 16
_LEAST_SLOPE = 0.01  # of the mean: the time of a byte in a bucket whose measured time does not show it
_CUT = 0.8  # a learning rate that falls below this share of itself in one step was cut


class AdaptiveReducer:
    """Averages gradients, compressed by plan. One step: `observe` and `reduce`, then `end_step`.

    Args:
        config: the section.
        shapes: of the whole gradients by name, the same on all ranks; which of them may be compressed
            follows.
        transport: the data-parallel group.
        key: the same on all ranks of the group, another one in every other group.
        dtype: of the gradients.
        device: of the gradients.
        immediate: no step is ever left out (see `Reducer`).
        partitioned: ranks keep slices of the gradients only (ZeRO 2 and 3): see `GradientWindow`.

    Attributes:
        current: the plan in force.
        plans: how many were made from measured gradients.
        shapes: of the gradients that may be compressed.
        dtype: of the gradients.
        reducer: what reduces.
    """

    def __init__(
        self,
        config: LgrecoConfig,
        shapes: Mapping[str, Sequence[int]],
        transport: Transport,
        *,
        key: Key,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        immediate: bool = True,
        partitioned: bool = False,
    ) -> None:
        self._config, self._transport, self._key = config, transport, key
        self.dtype, self._device = dtype, torch.device(device)
        self._partitioned = partitioned
        self.shapes = {name: tuple(shape) for name, shape in shapes.items() if not sent_raw(tuple(shape))}
        self.reducer = Reducer(
            default=Raw(), key=key.fold("reduce"), transport=transport, immediate=immediate
        )
        self._planner = Planner(config, self.shapes, transport, key=key.fold("plan"), dtype=dtype)
        self._window = GradientWindow(
            self.shapes,
            slices=(lambda count: slice_of(count, transport.rank, transport.ranks)) if partitioned else None,
            ranks=transport.ranks,
            immediate=immediate,
        )
        self._times: SynchronisationModel | None = None
        self._rate: float | None = None
        self._rate_cut = False
        self._tables_nbytes = 0.0
        self.plans = 0
        self.current: CompressionPlan
        self._use(self._planner.first())

    def compresses(self, step: int) -> bool:
        """Whether gradients of a step, counted from 1, are compressed: not in the warm-up."""
        return step > self._config.start_step

    def observes(self, step: int) -> bool:
        """Whether the next plan wants the gradients of a step, counted from 1."""
        return self._next_plan(step) - step < min(STEPS, self._config.interval)

    def observe(self, gradients: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
        """Sum gradients for the next plan: this rank's own, or where it keeps slices the means.

        Args:
            gradients: by name; those of a step that `observes` says, before they are reduced. Where ranks
                keep slices: whole means, or this rank's flat slices.
            scale: what they are multiplied with (fp16).
        """
        self._window.add(gradients, unscale=1 / scale)

    def end_step(self, step: int, *, applied: bool = True, learning_rate: float | None = None) -> bool:
        """Take up or forget what the step changed, and plan where it is time; all ranks call it.

        Args:
            step: its number, from 1.
            applied: whether the optimizer took it (no gradient overflow).
            learning_rate: for Accordion; a cut makes all layers critical.

        Returns:
            Whether there is a new plan.
        """
        for part in (self.reducer, self._window):
            if applied:
                part.commit()
            else:
                part.rollback()
        before, self._rate = self._rate, learning_rate
        if before and learning_rate is not None and learning_rate < _CUT * before:
            self._rate_cut = True
        if step != self._next_plan(step) or not self._window:
            return False
        self._plan(step)
        return True

    @property
    def nbytes(self) -> int:
        """Memory of errors, factors and sums."""
        return self.reducer.nbytes + self._window.nbytes

    def metrics(self) -> dict[str, float]:
        """Numbers of the plan in force, and of each layer the bits that an element of its gradient takes."""
        plan = self.current
        found = {
            "plans": float(self.plans),
            "planned_bytes": float(plan.nbytes),
            "default_bytes": float(plan.default_nbytes),
            "ratio_to_default": plan.default_nbytes / max(1, plan.nbytes),
            "state_bytes": float(self.nbytes),
        }
        if self.plans:
            found |= {"error": plan.error, "budget": plan.budget, "plan_seconds": plan.seconds}
        return found | self._bits

    def _next_plan(self, step: int) -> int:
        """The first step from ``step`` on after which the layers are planned."""
        interval, start = self._config.interval, self._config.start_step
        periods = max(0 if start else 1, -(-(step - start) // interval))
        return start + periods * interval

    def _plan(self, step: int) -> None:
        if self._config.objective == "time" and self._times is None:
            self._measure_times()
        plan = self._planner.plan(self._window.take(), step, learning_rate_cut=self._rate_cut)
        self._rate_cut = False
        self.plans += 1
        self._use(plan)
        logger.info(
            "lgreco: plan after step %d: %.1f times fewer bytes than none, %.2f times fewer than the "
            "default, error %.4g of %.4g, made in %.2f s",
            step,
            plan.raw_nbytes / max(1, plan.nbytes),
            plan.default_nbytes / max(1, plan.nbytes),
            plan.error,
            plan.budget,
            plan.seconds,
        )

    def _use(self, plan: CompressionPlan) -> None:
        self.current = plan
        self.reducer.take(plan.choices)
        self._bits = {
            f"bits/{name}": 8.0 * make_compressor(option).nbytes(shape, self.dtype) / math.prod(shape)
            for (name, option), shape in zip(plan.choices.items(), self.shapes.values(), strict=True)
        }

    def _measure_times(self) -> None:
        """Time the transfers of consecutive layers; the planner then counts seconds instead of bytes."""
        buckets = self._timed_buckets()
        sizes = [0] * (max(buckets.values()) + 1)
        for name, bucket in buckets.items():
            sizes[bucket] += 4 * math.prod(self.shapes[name])
        times = measure_synchronisation(self._transport, sizes, self._key.fold("times"), device=self._device)
        # Where bytes seemed to cost nothing, fewer of them are still better than more.
        mean = sum(times.seconds_per_byte) / len(sizes)
        slopes = tuple(max(slope, _LEAST_SLOPE * mean) if mean else 1.0 for slope in times.seconds_per_byte)
        self._times = replace(times, seconds_per_byte=slopes)
        self._planner.time_by(self._times, buckets)

    def _timed_buckets(self) -> dict[str, int]:
        """Layers in their order, in buckets of about one size."""
        total = sum(math.prod(shape) for shape in self.shapes.values())
        each = total / min(_TIMED_BUCKETS, len(self.shapes))
        places, before = {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            places[name] = int((before + size / 2) / each)
            before += size
        numbers = {place: number for number, place in enumerate(sorted(set(places.values())))}
        return {name: numbers[place] for name, place in places.items()}

    def state_dict(self) -> dict[str, Any]:
        """What the ranks of the group have in common: plan, factors, counts."""
        times = self._times
        return {
            "settings": self._settings(),
            "plan": self.current.to_plain(),
            "plans": self.plans,
            "planner": self._planner.state_dict(),
            "reducer": self.reducer.state_dict(),
            "learning_rate": [self._rate, self._rate_cut],
            "times": None
            if times is None
            else [times.latency, list(times.seconds_per_byte), times.r_squared, times.samples],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; a plan that was made by other settings is dropped for the default."""
        reducer = dict(state["reducer"])
        same = state["settings"] == self._settings()
        if not same:
            logger.info("lgreco: the checkpoint was saved with other settings: the default comes first again")
            reducer["q"] = {}
        self.reducer.load_state_dict(reducer)
        self.plans = int(state["plans"])
        self._rate, self._rate_cut = state["learning_rate"]
        if not same:
            return
        self._planner.load_state_dict(state["planner"])
        self._use(CompressionPlan.from_plain(state["plan"]))
        if state["times"] is not None:
            latency, slopes, explained, samples = state["times"]
            self._times = SynchronisationModel(latency, tuple(slopes), explained, samples)
            self._planner.time_by(self._times, self._timed_buckets())

    def _settings(self) -> dict[str, Any]:
        """What a plan is made by."""
        chosen = self._config.model_dump(
            mode="json", exclude={"enabled", "interval", "start_step", "backend"}
        )
        return {**chosen, "shapes": {name: list(shape) for name, shape in self.shapes.items()}}

    def rank_state(self) -> dict[str, dict[str, Tensor]]:
        """What this rank alone has: its errors, and its sums for the next plan."""
        return {"errors": self.reducer.errors(), "sums": self._window.state_dict()}

    def load_rank_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore this rank's own state, or redistribute those of another number of ranks.

        Redistributed, every rank gets the mean: what the errors contribute to the averaged gradient, their
        sum divided by the number of ranks, stays the same. Sums of slices are dropped, which depend on it.

        Args:
            states: this rank's own, or those of all ranks that there were.

        Raises:
            CheckpointError: an entry is missing.
        """
        if any(part.keys() < {"errors", "sums"} for part in states) or not states:
            raise CheckpointError("lgreco: a rank's state has no errors or no sums; it is damaged")
        whole = len(states) == 1
        errors = states[0]["errors"] if whole else mean_of([part["errors"] for part in states])
        sums = states[0]["sums"] if whole else mean_of([part["sums"] for part in states])
        self.reducer.load_errors(
            {
                name: error.to(self._device)
                for name, error in errors.items()
                if tuple(error.shape) == self.shapes.get(name)
            }
        )
        self._window.load_state_dict(sums if whole or not self._partitioned else {}, self._device)

    def compressed_layers(self) -> int:
        """Gradients that the plan in force compresses."""
        return sum(option != RAW for option in self.current.choices.values())
