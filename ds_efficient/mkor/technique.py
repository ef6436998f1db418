"""MKOR as a technique: statistics by hooks, factors at their owners, gradients multiplied before the step.

Order of a step: the engine reduces the gradients as always; at the accumulation boundary, before clipping,
the rank-1 vectors go to the owners (in steps that update), the averaged gradients follow, the owners update
and multiply, and every rank takes its elements back. Neither ZeRO nor the optimizer sees a difference.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.core.deepspeed_gradients import AveragedGradients
from ds_efficient.core.keys import Key
from ds_efficient.core.technique import Action, Evidence, Outlook, RunContext, StepContext, Technique
from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.mkor import layers as planning
from ds_efficient.mkor.bank import DTYPES, SIDES, FactorBank
from ds_efficient.mkor.blocks import Block, Layer, assign_owners, make_blocks, make_rounds
from ds_efficient.mkor.config import MkorConfig
from ds_efficient.mkor.exchange import Plane
from ds_efficient.mkor.hybrid import HybridSwitch
from ds_efficient.mkor.owners import Owners
from ds_efficient.mkor.reading import read_layer
from ds_efficient.mkor.signs import RowSketch
from ds_efficient.mkor.sums import Collecting, LayerSums

if TYPE_CHECKING:
    from ds_efficient.core.inventory import Inventory

logger = logging.getLogger(__name__)

_ROUND = 1 << 26  # elements of gradients that an owner handles at a time, where they are exchanged


class MkorTechnique(Technique[MkorConfig]):
    """Gradients of linear layers multiplied by inverse Kronecker factors.

    Attributes:
        layers: of this rank, in the model's order.
        owners: does the work of a step; None before the engine exists, and after MKOR-H has switched.
        switch: of MKOR-H, or None.
    """

    name = "mkor"
    starts_anywhere = True

    def __init__(self, config: MkorConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.layers: list[Layer] = []
        self.owners: Owners | None = None
        hybrid = config.hybrid
        self.switch = HybridSwitch(hybrid.beta, hybrid.ema, hybrid.min_steps) if hybrid.enabled else None
        self._collecting = Collecting()
        self._sums: dict[str, LayerSums] = {}
        self._engine: Any = None
        self._gradients: AveragedGradients | None = None
        self._total_linears = 0
        self._last_update: int | None = None  # step that updated the factors
        self._updated = False  # whether the present one does
        self._updates = self._steps = 0
        self._loss: Tensor | None = None
        self._losses = 0
        self._numbers: dict[str, float] = {}

    def plan(self, inventory: Inventory) -> Sequence[Action]:
        """Say for every linear layer whether its gradient is preconditioned."""
        return planning.plan_layers(self.config, self.context, inventory)

    def outlook(self, inventory: Inventory) -> Outlook:
        """Say what factors and products cost."""
        actions = self.plan(inventory)
        return planning.outlook(self.config, self.context, inventory, actions)

    def apply(self, model: nn.Module, actions: Sequence[Action]) -> None:
        """Find the layers; the model stays as it is.

        Raises:
            UserError: no layer is left, or one is of a kind whose gradient is no matrix here.
        """
        self._total_linears = len(actions)
        chosen = [action for action in actions if not action.skipped]
        if not chosen and self.context.pipeline_parallel_size == 1:
            reasons = sorted({action.reason for action in actions})
            raise UserError(
                f"mkor: no linear layer is preconditioned ({'; '.join(reasons) or 'the model has none'}); "
                "look at mkor.exclude, or set mkor.enabled to false"
            )
        self.layers = [
            read_layer(
                action.module,
                action.options["global_name"],
                model.get_submodule(action.module),
                self.context,
                exact=self.config.tensor_parallel == "exact",
            )
            for action in chosen
        ]

    def attach(self, engine: Any) -> None:
        """Choose the owners, make their factors, and hook the layers; collective over all ranks."""
        self._engine = engine
        context, config = self.context, self.config
        self._gradients = gradients = AveragedGradients(engine, self.name)
        places = (
            context.pipeline_parallel_rank,
            context.data_parallel_rank,
            context.tensor_parallel_rank,
        )
        device = torch.device(engine.device)
        plane = Plane(places, device)
        blocks = make_blocks(self.layers, plane.place, context.tensor_parallel_size, config.tensor_parallel)
        assign_owners(blocks, plane.places, SIDES[config.sides])
        bank = FactorBank(
            {block.name: (block.rows, block.width) for block in blocks if block.owner == plane.rank},
            sides=config.sides,
            form=config.form,
            max_rank=config.max_rank,
            dtype=DTYPES[config.state_dtype],
            operand_dtype=gradients.dtype,
            gamma=config.gamma,
            threshold=config.stabilizer.threshold,
            zeta=config.stabilizer.zeta,
            device=device,
        )
        self._hook(blocks, bank.sides)
        # alone, a rank works on its gradients where they are: no memory to spare, and the most together
        rounds = make_rounds(blocks, plane.size, _ROUND if plane.size > 1 else math.inf)
        dtype, vectors = DTYPES[config.comm_dtype], config.statistics_rank
        self.owners = Owners(plane, blocks, rounds, bank, gradients, self._sums, dtype, vectors)
        if self.switch is not None:
            compat.override(engine, "backward", self._watch_loss)
        self._decide(int(engine.global_steps))

    def _hook(self, blocks: Sequence[Block], sides: Sequence[str]) -> None:
        """Sum the statistics that the blocks need."""
        several = self.config.statistics_rank > 1
        # one output vector of a layer with a bias is the bias's gradient
        hooked = {block.layer.name for block in blocks if several or not block.bias}
        for layer in self.layers:
            self._sums[layer.name] = LayerSums(
                layer.module,
                inputs="right" in sides,
                outputs="left" in sides and layer.name in hooked,
                collecting=self._collecting,
                sketch=self._sketch(layer) if several else None,
            )

    def _sketch(self, layer: Layer) -> RowSketch:
        """Return what draws the signs of a layer's rows."""
        context, collecting = self.context, self._collecting
        # of a layer that is cut, one side's rows are each tensor-parallel rank's own, the other's all ranks'
        own = {"out": "right", "in": "left"}.get(layer.cut or "") if layer.sequence_parallel else None
        return RowSketch(
            Key(context.seed, ("mkor", layer.name)),
            self.config.statistics_rank,
            lambda: collecting.step,
            context.data_parallel_rank,
            {own: context.tensor_parallel_rank} if own else {},
        )

    def _watch_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            part = loss.detach().double().mean()
            self._loss = part if self._loss is None else self._loss + part
            self._losses += 1
            return original(loss, *args, **kwargs)

        return backward

    @property
    def active(self) -> bool:
        """Whether gradients are preconditioned: until MKOR-H switches."""
        return self.switch is None or not self.switch.switched

    @property
    def needs_loss(self) -> bool:
        """Whether the loss of each step is wanted."""
        return self.switch is not None and not self.switch.switched

    def _decide(self, step: int) -> None:
        """Sum statistics in the coming step, where it updates the factors.

        Args:
            step: optimizer steps done.
        """
        self._collecting.step = step
        last, interval = self._last_update, self.config.inversion_interval
        # every multiple of the interval, or the next step that is not skipped
        due = last is None or step < self.config.warmup_steps or step // interval > last // interval
        self._collecting.on = self._updated = due and self.owners is not None

    def loaded(self, step: int) -> None:
        """Follow the checkpoint's count of steps."""
        for sums in self._sums.values():
            sums.clear()
        self._loss, self._losses = None, 0
        self._decide(step)

    def before_step(self, context: StepContext) -> None:
        """Precondition the averaged gradients.

        Raises:
            UserError: MKOR-H, and nobody said what the loss is.
        """
        assert self._gradients is not None
        if self.owners is not None and self.switch is not None and self._observe(self.switch, context):
            self._free()
        if self.owners is not None:
            scale = compat.loss_scale(self._engine)
            self.owners.step(update=self._updated, loss_scale=scale, replicas=self.context.data_parallel_size)
        self._gradients.finish()

    def _observe(self, switch: HybridSwitch, context: StepContext) -> bool:
        """Hand the loss of the step, averaged over all ranks, to MKOR-H; return whether it has switched."""
        if context.loss is not None:
            loss = torch.tensor(context.loss, dtype=torch.float64, device=self._engine.device)
        elif self._loss is not None:
            loss = self._loss / self._losses
        else:
            raise UserError(
                "mkor.hybrid: the loss of the step is not known; train through engine.backward(loss), or set "
                "engine.ds_efficient.loss before each step"
            )
        self._loss, self._losses = None, 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        return switch.observe(float(loss))

    def _free(self) -> None:
        """Give the factors back: the optimizer goes on alone."""
        assert self.switch is not None
        if self.owners is not None:
            self._numbers = {}
        self.owners = None
        self._collecting.on = self._updated = False
        for sums in self._sums.values():
            sums.remove()
        self._sums.clear()
        logger.info("mkor: the first order takes over in step %s", self.switch.switched_at)

    def on_step(self, context: StepContext) -> Mapping[str, float]:
        """Count the step, and say how it went."""
        if self.owners is not None:
            if context.applied:
                self._steps += 1
            if self._updated:
                if context.applied:
                    self._last_update = context.step - 1
                    self._updates += 1
                self._numbers = self.owners.measure(applied=context.applied)
            for sums in self._sums.values():
                sums.clear()
            self._decide(context.step)
        metrics = {"active": float(self.owners is not None), "updates": float(self._updates), **self._numbers}
        if self.switch is not None:
            at = self.switch.switched_at
            metrics["switched_at"] = float(-1 if at is None else at)
            metrics |= {"gain": self.switch.gain, "average_gain": self.switch.average_gain}
        return metrics

    def evidence(self) -> Evidence:
        """Count the layers whose gradients were changed."""
        owners = self.owners
        if owners is None:
            at = None if self.switch is None else self.switch.switched_at
            summary = f"the optimizer alone since step {at} (mkor.hybrid), after {self._updates} updates"
            return Evidence(False, summary, {"updates": self._updates, "layers": 0}, due=at is None)
        changed = owners.changed_layers()
        numbers = self._numbers
        summary = (
            f"{len(self.layers)} of {self._total_linears} linear layers, {len(changed)} of this rank's "
            f"{owners.owned} preconditioned, {self._updates} updates of the factors, "
            f"{owners.bank.nbytes / 2**20:,.1f} MiB of factors here, stabiliser hits "
            f"{numbers.get('stabilizer_hits', 0):g}, updates left out "
            f"{numbers.get('updates_left_out', 0):g}, {owners.plane.sent / 2**20:,.1f} MiB sent"
        )
        counts = {
            "layers": len(self.layers),
            "layers_total": self._total_linears,
            "layers_owned": owners.owned,
            "layers_changed": len(changed),
            "updates": self._updates,
            "steps": self._steps,
            "factor_bytes": owners.bank.nbytes,
            "bytes_sent": owners.plane.sent,
            "vector_bytes_sent": owners.vector_bytes,
            "stabilizer_hits": int(owners.bank.hits.sum()),
            "updates_left_out": int(owners.bank.left_out.sum()),
            "factors_reset": int(owners.bank.resets.sum()),
            **{f"cosine/{name}": cosine for name, cosine in changed.items()},
            **owners.report(),
        }
        # while the loss scale comes down from too high, no step is applied
        return Evidence(len(changed) > 0, summary, counts, due=self._steps > 0)

    def state_dict(self) -> dict[str, Any]:
        """Return counts and MKOR-H's averages; factors are in the shards."""
        return {
            "last_update": self._last_update,
            "updates": self._updates,
            "steps": self._steps,
            "statistics_rank": self.config.statistics_rank,
            "hybrid": None if self.switch is None else self.switch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; a run that has switched stays switched.

        Raises:
            CheckpointError: one of the saved run and this one uses MKOR-H, or another number of vectors.
        """
        saved, here = state.get("statistics_rank", 1), self.config.statistics_rank
        if saved != here:
            raise CheckpointError(
                f"mkor.statistics_rank: saved with {saved}, here {here}; use the value it was saved with"
            )
        if (state["hybrid"] is None) != (self.switch is None):
            raise CheckpointError(
                "mkor.hybrid.enabled: the saved run and this one differ; use the value it was saved with"
            )
        self._last_update = state["last_update"]
        self._updates, self._steps = int(state["updates"]), int(state["steps"])
        if self.switch is not None:
            if self.switch.switched and state["hybrid"]["switched_at"] is None:
                raise CheckpointError(
                    "mkor.hybrid: this run has given its factors back; load the checkpoint into a new one"
                )
            self.switch.load_state_dict(state["hybrid"])
            if self.switch.switched and self.owners is not None:
                self._free()

    def shard_names(self) -> Collection[str]:
        """Name the blocks that this rank owns."""
        return [] if self.owners is None else list(self.owners.bank)

    def shard_state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the factors that this rank owns."""
        if self.owners is None:
            return {}
        return {name: self.owners.bank.state(name) for name in self.owners.bank}

    def load_shard_state_dict(self, shards: Mapping[str, Any]) -> None:
        """Restore the factors that this rank owns, by whichever rank they were saved.

        Raises:
            CheckpointError: some are not in the checkpoint, or of other settings.
        """
        missing = sorted(set(self.shard_names()) - shards.keys())
        if missing:
            raise CheckpointError(
                f"mkor: the checkpoint has no factors of {', '.join(missing[:5])}"
                f"{' and others' if len(missing) > 5 else ''}; use the model, mkor.exclude and "
                "mkor.tensor_parallel that it was saved with"
            )
        assert self.owners is not None or not shards
        for name, state in shards.items():
            assert self.owners is not None
            self.owners.bank.load(name, state)
