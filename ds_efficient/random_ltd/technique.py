"""random-LTD as a technique: lets layers drop tokens, counts layer tokens, schedules the learning rate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ds_efficient.core.keys import Key
from ds_efficient.core.layer_seam import LayerSeam
from ds_efficient.core.passes import Passes
from ds_efficient.core.technique import Action, Evidence, Outlook, RunContext, StepContext, Technique
from ds_efficient.errors import UserError
from ds_efficient.random_ltd.accounting import LayerTokens
from ds_efficient.random_ltd.config import RandomLtdConfig
from ds_efficient.random_ltd.layer import LayerDrop, install
from ds_efficient.random_ltd.layers import SECTION, chosen_layers, plan_layers
from ds_efficient.random_ltd.learning_rate import LayerTokenLR
from ds_efficient.random_ltd.prediction import describe
from ds_efficient.random_ltd.sampler import TokenSampler, schedule_of

if TYPE_CHECKING:
    from ds_efficient.core.inventory import Inventory

logger = logging.getLogger(__name__)


class RandomLtdTechnique(Technique[RandomLtdConfig]):
    """Random layerwise token dropping with LayerToken accounting.

    Attributes:
        drops: of every dropping layer on this rank, by its number in the whole model.
        passes: counts the forward passes of a step.
        tokens: layer tokens consumed; None before `apply`.
    """

    name = "random_ltd"

    def __init__(self, config: RandomLtdConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.passes = Passes()
        self.drops: dict[int, LayerDrop] = {}
        self.tokens: LayerTokens | None = None
        self._sampler = TokenSampler(
            Key(context.seed, ("random_ltd",)),
            config.random_ltd_schedule,
            self.passes,
            rank=context.data_parallel_rank,
        )
        self._layers = (0, 0)
        self._step_tokens = 0
        self._step_layer_tokens = 0
        self._now = (0, 0)  # tokens of a sequence and kept ones, of the latest pass
        self._group: Any = None

    def plan(self, inventory: Inventory) -> Sequence[Action]:
        """Say for every transformer layer whether it drops tokens, and how many it keeps now."""
        actions = plan_layers(self.config, inventory, step=self.passes.step)
        total = inventory.num_layers
        self._layers = (total, len(chosen_layers(self.config, total)))
        return actions

    def outlook(self, inventory: Inventory) -> Outlook | None:
        """Say what the schedule saves: layer tokens exactly, time by the matrix products."""
        model = inventory.model
        if model is None:
            return None
        layers = inventory.num_layers, len(chosen_layers(self.config, inventory.num_layers))
        schedule = schedule_of(self.config.random_ltd_schedule, model.seq_length, layers=layers)
        causal = self.config.model_type != "encoder"
        return Outlook(*describe(schedule, model, self.context.total_steps, causal=causal))

    def actions_now(self, actions: Sequence[Action]) -> list[Action]:
        """Return the actions with the share of tokens that is kept at the present step."""
        length, kept = self._now
        if not length:
            return list(actions)
        share = {"token_share": kept / length}
        return [
            action if action.skipped else replace(action, options={**action.options, **share})
            for action in actions
        ]

    def apply(self, model: nn.Module, actions: Sequence[Action]) -> None:
        """Let the chosen layers drop tokens, in place; no parameter, buffer or name changes.

        Raises:
            UserError: no layer is left to drop tokens, or one cannot do without some.
        """
        chosen = [action for action in actions if not action.skipped]
        if not chosen and self.context.pipeline_parallel_size == 1:
            raise UserError(
                f"{SECTION}: no layer drops tokens; the model has "
                + (f"{len(actions)} layers: see random_ltd_layer_num" if actions else "no list of layers")
            )
        self._sampler.layers = [action.options["layer"] for action in chosen]
        for number, action in enumerate(actions):
            if not number or not action.skipped:
                self._install(model.get_submodule(action.module), action, first=not number)
        longest = self.config.random_ltd_schedule.max_value or self.config.random_ltd_schedule.min_value
        self.tokens = LayerTokens(schedule_of(self.config.random_ltd_schedule, longest, layers=self._layers))
        self.passes.watch(model)

    def _install(self, layer: nn.Module, action: Action, *, first: bool) -> None:
        """Let a layer drop tokens; the first one of this rank also counts them."""
        number = action.options["layer"]
        drop = LayerDrop(
            action.module,
            number,
            self._sampler,
            drops=not action.skipped,
            on_pass=self._count_pass if first else None,
        )
        order = self.config.hidden_state_order
        if isinstance(layer, LayerSeam) and order == "batch_seq_dim":
            raise UserError(
                f'{SECTION}.hidden_state_order "{order}": the layers of megatron-core have "seq_batch_dim"; '
                "leave it out"
            )
        install(
            layer,
            drop,
            batch_first=None if order is None else order == "batch_seq_dim",
            mask_name=self.config.model_mask_name,
        )
        if drop.drops:
            self.drops[number] = drop

    def _count_pass(self, batch: int, length: int, kept: int) -> None:
        total, dropping = self._layers
        self._now = (length, kept)
        self._step_tokens += batch * length
        self._step_layer_tokens += batch * (dropping * kept + (total - dropping) * length)

    @property
    def schedules_learning_rate(self) -> bool:
        """Whether `lr_scheduler` is to be used, in place of any other schedule."""
        return self.config.layer_token_lr_schedule.enabled

    def lr_scheduler(self, optimizer: Any) -> LayerTokenLR:
        """Return the schedule of the learning rate by the layer tokens counted here."""
        assert self.tokens is not None, "apply comes first"
        schedule = self.config.layer_token_lr_schedule
        return LayerTokenLR(
            optimizer,
            self.tokens,
            warmup_layer_tokens=schedule.warmup_layer_tokens,
            decay_layer_tokens=schedule.decay_layer_tokens,
            decay_style=schedule.decay_style,
            min_lr=schedule.min_lr,
        )

    @property
    def consumed_layer_tokens(self) -> int | None:
        """Layer tokens of the run so far, over all ranks."""
        return None if self.tokens is None else self.tokens.consumed

    def attach(self, engine: Any) -> None:
        """Follow the engine's count of steps."""
        self._start_step(int(engine.global_steps))
        if dist.is_initialized() and dist.get_world_size() > 1:
            own = "gloo" in dist.get_backend()
            self._group = dist.group.WORLD if own else dist.new_group(backend="gloo")

    def loaded(self, step: int) -> None:
        """Follow the checkpoint's count of steps."""
        self._start_step(step)

    def _start_step(self, step: int) -> None:
        self.passes.restart(step)
        self._sampler.forget()
        self._step_tokens = self._step_layer_tokens = 0

    def before_step(self, context: StepContext) -> None:
        """Count the tokens of the step, before the learning rate of the next one is set."""
        assert self.tokens is not None
        own = (self._step_tokens, self._step_layer_tokens, int(self._step_tokens > 0))
        tokens, layer_tokens, counting = own
        if self._group is not None:
            counts = torch.tensor(own, dtype=torch.int64)
            dist.all_reduce(counts, group=self._group)  # on the host: nothing waits for the device
            tokens, layer_tokens, counting = counts.tolist()
            # Every tensor-parallel rank has counted the same, and every pipeline stage that has layers.
            copies = max(1, counting // self.context.data_parallel_size)
            tokens, layer_tokens = tokens // copies, layer_tokens // copies
        self.tokens.add(context.step, tokens, layer_tokens)

    def on_step(self, context: StepContext) -> Mapping[str, float]:
        """Go on to the next step's keys and number of tokens."""
        assert self.tokens is not None
        kept = self._now[1]
        self._start_step(context.step)
        return {
            "kept_tokens": float(kept),
            "layer_tokens": float(self.tokens.consumed),
            "layer_tokens_of_step": float(self.tokens.last),
            "tokens": float(self.tokens.tokens),
            "saving": self.tokens.saving,
        }

    def evidence(self) -> Evidence:
        """Count what every layer left out on this rank, and the layer tokens of all ranks."""
        dropped = {number: drop.dropped for number, drop in self.drops.items()}
        seen = sum(drop.tokens for drop in self.drops.values())
        total, dropping = self._layers
        length, kept = self._now
        consumed = self.tokens.consumed if self.tokens is not None else 0
        saving = self.tokens.saving if self.tokens is not None else 0.0
        left_out = sum(dropped.values())
        summary = (
            f"{dropping} of {total} layers drop tokens, {len(self.drops)} of them here: {left_out:,} of "
            f"{seen:,} tokens left out so far, {kept} of {length} kept in the last pass; {consumed:,} layer "
            f"tokens on all ranks, {saving:.1%} saved"
        )
        counts = {
            "layers": len(self.drops),
            "layers_total": total,
            "layers_dropped": sum(count > 0 for count in dropped.values()),
            "tokens": seen,
            "dropped": left_out,
            "kept": kept,
            "layer_tokens": consumed,
            "saving": saving,
            **{f"dropped_by_layer_{number}": count for number, count in dropped.items()},
        }
        due = not length or kept < length
        return Evidence(left_out > 0, summary, counts, due=due)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; which tokens are kept follows from the step."""
        assert self.tokens is not None
        return self.tokens.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        assert self.tokens is not None
        self.tokens.load_state_dict(state)
