"""RMM as a technique: makes layers save projections, counts steps, measures and chooses how many rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.core.keys import Key
from ds_efficient.core.linear_seam import LinearSeam
from ds_efficient.core.plain_linears import replace_everywhere
from ds_efficient.core.technique import Action, Evidence, RunContext, StepContext, Technique
from ds_efficient.core.weight_gradient import taker_of
from ds_efficient.errors import UserError
from ds_efficient.rmm.config import AUTO, RmmConfig
from ds_efficient.rmm.layers import plan_layers
from ds_efficient.rmm.linear import RandomizedLinear, check_kind
from ds_efficient.rmm.measurement import Measurement
from ds_efficient.rmm.product import RandomizedProduct
from ds_efficient.rmm.sketch import Clock, Sketch

if TYPE_CHECKING:
    from ds_efficient.core.inventory import Inventory

logger = logging.getLogger(__name__)


class RmmTechnique(Technique[RmmConfig]):
    """Weight gradients from a random sketch of the layer's input.

    Attributes:
        sketches: of every layer on this rank, by its name in the whole model.
        clock: what they have in common.
    """

    name = "rmm"
    starts_anywhere = True

    def __init__(self, config: RmmConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.sketches: dict[str, Sketch] = {}
        self.clock = Clock(rank=context.data_parallel_rank, interval=config.variance_interval)
        self._measurement = Measurement(self.sketches)
        self._predicted: dict[str, float] = {}
        self._total_linears = 0
        self._noise: dict[str, float] = {}
        self._engine: Any = None

    def plan(self, inventory: Inventory) -> Sequence[Action]:
        """Say for every linear layer whether its input is projected."""
        return plan_layers(self.config, self.context, inventory)

    def apply(self, model: nn.Module, actions: Sequence[Action]) -> None:
        """Put a sketch into each layer, in place; parameters stay the same objects, or have the same data.

        Raises:
            UserError: no layer is left to project, or one is of a kind that takes no product.
        """
        self._total_linears = len(actions)
        chosen = [action for action in actions if not action.skipped]
        if not chosen and self.context.pipeline_parallel_size == 1:
            known = sorted({action.module.rpartition(".")[2] for action in actions})
            reasons = sorted({action.reason for action in actions})
            raise UserError(
                f"rmm.modules {list(self.config.modules)}: no linear layer is projected "
                f"({'; '.join(reasons) or 'the model has none'}); the model's linear layers are called "
                f"{', '.join(known) or '-'}"
            )
        for action in chosen:  # all of them before the first is changed
            _check_kind(action.module, model.get_submodule(action.module))
        for action in chosen:
            name = action.options["global_name"]
            self.sketches[name] = self._install(model, action)
            self._predicted[name] = action.saved_activation_fraction

    def _install(self, model: nn.Module, action: Action) -> Sketch:
        config = self.config
        sketch = Sketch(
            Key(self.context.seed, ("rmm", action.options["global_name"])),
            ratio=config.first_ratio,
            kind=config.sketch,
            block_size=config.block_size,
            min_rows=config.min_rows,
            clock=self.clock,
        )
        layer: Any = model.get_submodule(action.module)
        taker = taker_of(layer)
        if taker is not None:
            taker.weight_gradient_by(sketch)
        elif isinstance(layer, LinearSeam):
            layer.install_product(RandomizedProduct(sketch), layer.weight.detach())
        else:
            replace_everywhere(model, layer, RandomizedLinear.around(layer, sketch))
        return sketch

    def attach(self, engine: Any) -> None:
        """Follow the engine's count of steps."""
        self._engine = engine
        self.clock.step = int(engine.global_steps)
        self._measurement.attach()

    def loaded(self, step: int) -> None:
        """Follow the checkpoint's count of steps."""
        self._start_step(step)

    def _start_step(self, step: int) -> None:
        self.clock.step = step
        for sketch in self.sketches.values():
            sketch.restart()

    def on_step(self, context: StepContext) -> Mapping[str, float]:
        """Go on to the next step's keys; after a measured step, read the variance and choose ratios."""
        tallies = [sketch.tally for sketch in self.sketches.values()]
        rows = sum(tally.rows for tally in tallies)
        metrics = {
            "layers": float(sum(tally.projections > 0 for tally in tallies)),
            "ratio": sum(tally.projected for tally in tallies) / rows if rows else 1.0,
            "saved_bytes": float(sum(tally.exact_bytes - tally.kept_bytes for tally in tallies)),
        }
        if self.clock.measuring:
            self._read_variance(applied=context.applied)
        self._start_step(context.step)
        return {**metrics, **self._noise}

    def _read_variance(self, *, applied: bool) -> None:
        """Take up the measurements of the step that is done."""
        found = self._measurement.read()
        if not applied or not found:  # an overflow measured nothing
            return
        # of the gradient averaged over data-parallel ranks, without the loss scale
        scale = self.context.data_parallel_size * (compat.loss_scale(self._engine) or 1.0)
        variance = sum(max(0.0, noise.variance) for noise in found.values())
        own = sum(max(0.0, noise.sgd_variance) for noise in found.values())
        ratios = [noise.ratio for noise in found.values()]
        self._noise = {
            "variance": variance / scale**2,
            "sgd_variance": own / scale**2,
            "variance_ratio": variance / own if own else 0.0,
            "variance_ratio_max": max(ratios),
        }
        for name, noise in found.items():
            logger.debug("rmm: %s: variance ratio %.3g", name, noise.ratio)
        if self.config.ratio == AUTO:
            self._measurement.choose(found, float(self.config.target_variance_ratio))

    def evidence(self) -> Evidence:
        """Count the layers that projected, the rows, and the bytes that were saved and predicted."""
        tallies = {name: sketch.tally for name, sketch in self.sketches.items()}
        projected = sum(tally.projections > 0 for tally in tallies.values())
        rows = sum(tally.rows for tally in tallies.values())
        kept = sum(tally.projected for tally in tallies.values())
        exact = sum(tally.exact_bytes for tally in tallies.values())
        saved = exact - sum(tally.kept_bytes for tally in tallies.values())
        predicted = sum(tally.exact_bytes * self._predicted[name] for name, tally in tallies.items())
        summary = (
            f"{len(tallies)} of {self._total_linears} linear layers have a {self.config.sketch} sketch, "
            f"{projected} projected, {kept} of {rows} rows kept in the last micro-batch, inputs saved for "
            f"the backward pass {saved / 2**20:,.1f} of {exact / 2**20:,.1f} MiB smaller "
            f"({predicted / 2**20:,.1f} predicted)"
        )
        if rows and not projected:
            summary += (
                f"; {rows // len(tallies)} rows are no more than the sketch would keep: see rmm.min_rows"
            )
        counts = {
            "layers": len(tallies),
            "layers_projected": projected,
            "layers_total": self._total_linears,
            "projections": sum(tally.projections for tally in tallies.values()),
            "rows": rows,
            "rows_kept": kept,
            "exact_bytes": exact,
            "saved_bytes": saved,
            "predicted_bytes": predicted,
        }
        return Evidence(projected > 0, summary, counts)

    def state_dict(self) -> dict[str, Any]:
        """Return the ratios, which "auto" chooses, and the last measurement; keys follow from the step."""
        ratios = {name: sketch.ratio for name, sketch in self.sketches.items()}
        return {"ratios": ratios if self.config.ratio == AUTO else {}, "noise": dict(self._noise)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the ratios of the layers that are here."""
        if self.config.ratio == AUTO:
            for name, ratio in state["ratios"].items():
                if name in self.sketches:
                    self.sketches[name].ratio = float(ratio)
        self._noise = {name: float(value) for name, value in state["noise"].items()}


def _check_kind(name: str, module: nn.Module) -> None:
    """Raise UserError unless the module takes a weight gradient or a product, or can be replaced."""
    if taker_of(module) is not None or isinstance(module, LinearSeam):
        return
    try:
        check_kind(module)
    except UserError as error:
        raise UserError(
            f"rmm: {name}: {error}; add it to rmm.exclude, or build the model with "
            "megatron_patches.layer_spec(config) (--transformer-impl local)"
        ) from None
