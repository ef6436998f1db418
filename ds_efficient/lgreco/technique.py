"""L-GreCo as a technique: the adaptive reducer in DeepSpeed's place of reduction."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.core import deepspeed_reduction as reduction
from ds_efficient.core.keys import Key
from ds_efficient.core.technique import Action, Evidence, Outlook, RunContext, StepContext, Technique
from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.lgreco import prediction
from ds_efficient.lgreco.adaptive import AdaptiveReducer
from ds_efficient.lgreco.config import LgrecoConfig
from ds_efficient.lgreco.transport import Transport, make_transport

if TYPE_CHECKING:
    from ds_efficient.core.inventory import Inventory

logger = logging.getLogger(__name__)


class LgrecoTechnique(Technique[LgrecoConfig]):
    """Compressed gradient reduction over the data-parallel ranks.

    Attributes:
        adaptive: reducer and planner of this rank's data-parallel group, once there is an engine.
        transport: the group.
    """

    name = "lgreco"
    starts_anywhere = True

    adaptive: AdaptiveReducer
    transport: Transport

    def __init__(self, config: LgrecoConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self._engine: Any = None
        self._plain_bytes = 0.0  # of the steps before compression starts
        self._before = (0.0, 0.0)  # bytes sent and uncompressed, before the step under way
        self._restored = False

    def plan(self, inventory: Inventory) -> Sequence[Action]:
        """Say for every module how its weight's gradient is sent at first."""
        return prediction.plan_modules(self.config, self.context, inventory)

    def outlook(self, inventory: Inventory) -> Outlook | None:
        """Say how many bytes a step sends with the uniform default."""
        return prediction.outlook(self.config, self.context, inventory)

    def apply(self, model: nn.Module, actions: Sequence[Action]) -> None:
        """Change nothing in the model.

        Raises:
            UserError: there is one data-parallel rank.
        """
        if self.context.data_parallel_size < 2:
            raise UserError(
                "lgreco: this run has one data-parallel rank, which has no gradients to exchange; start more "
                "ranks, or set lgreco.enabled to false"
            )

    def attach(self, engine: Any) -> None:
        """Take the place of the engine's gradient reduction.

        Raises:
            UserError: a setting of the engine, or the backend, does not go together with the section.
        """
        self._engine = engine
        prediction.require_stage(self.config, compat.zero_stage(engine))
        group = reduction.data_parallel_group(engine)
        self.transport = make_transport(self.config.backend, group, reduction.gradient_device(engine))
        self._start_anew()
        self._require_compression()
        if reduction.place_of(engine) == "slices":
            reduction.replace_reduce_scatter(engine, self._reduce_scatter)
        else:
            reduction.replace_reduction(engine, self._reduce, self)

    def _start_anew(self) -> None:
        context, engine = self.context, self._engine
        copied = reduction.copied_elsewhere(
            engine,
            tensor_parallel=context.tensor_parallel_size,
            pipeline_parallel=context.pipeline_parallel_size,
        )
        shapes = reduction.whole_shapes(engine)
        self.adaptive = AdaptiveReducer(
            self.config,
            {name: shape for name, shape in shapes.items() if name not in copied},
            self.transport,
            key=Key(context.seed, ("lgreco",)).fold(
                context.pipeline_parallel_rank, context.tensor_parallel_rank
            ),
            dtype=reduction.gradient_dtype(engine),
            device=reduction.gradient_device(engine),
            immediate=not reduction.steps_can_be_skipped(engine),
            partitioned=compat.zero_stage(engine) >= 2,
        )
        self._before = self._bytes()

    def _require_compression(self) -> None:
        """Refuse a default that makes no gradient smaller: its error, the budget, would be zero for ever."""
        if self.adaptive.compressed_layers() or self.context.pipeline_parallel_size > 1:
            return
        shapes = self.adaptive.shapes.values()
        largest = max(shapes, key=math.prod) if shapes else None
        raise UserError(
            f"lgreco.default {self.config.default:g} with compressor {self.config.compressor}: no gradient "
            f"would become smaller; the largest matrix of this rank is {largest or 'too small'} in "
            f"{self.adaptive.dtype}. Lower the default, or set lgreco.enabled to false"
        )

    # In the backward pass or at its end.

    @property
    def _step(self) -> int:
        """Number of the step whose gradients are reduced, from 1."""
        return int(self._engine.global_steps) + 1

    @torch.no_grad()
    def _reduce(self, gradients: Mapping[str, Tensor], original: Callable[[], None]) -> None:
        scale = compat.loss_scale(self._engine) or 1.0
        observed = self.adaptive.observes(self._step)
        partitioned = compat.zero_stage(self._engine) >= 2
        if observed and not partitioned:  # this rank's own gradients, before the means take their place
            self.adaptive.observe(gradients, scale=scale)
        if self.adaptive.compresses(self._step):
            self.adaptive.reducer.reduce(gradients, scale=scale)
        else:
            self._count_plain(gradients, 2)
            original()
        if observed and partitioned:
            self.adaptive.observe(gradients, scale=scale)

    def begins(self) -> bool:
        """Whether gradients are taken during the backward pass: once they are compressed."""
        return self.adaptive.compresses(self._step)

    @torch.no_grad()
    def start(self, gradients: Mapping[str, Tensor]) -> None:
        """Begin to reduce gradients that the backward pass has made."""
        scale = compat.loss_scale(self._engine) or 1.0
        if self.adaptive.observes(self._step):
            self.adaptive.observe(gradients, scale=scale)
        self.adaptive.reducer.start(gradients, scale=scale)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the means in them."""
        self.adaptive.reducer.finish()

    @torch.no_grad()
    def _reduce_scatter(
        self, gradients: Mapping[str, Tensor], original: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if self.adaptive.compresses(self._step):
            slices = self.adaptive.reducer.reduce_scatter(gradients)
        else:
            self._count_plain(gradients, 1)
            slices = original()
        if self.adaptive.observes(self._step):
            self.adaptive.observe(slices, scale=compat.loss_scale(self._engine) or 1.0)
        return slices

    def _count_plain(self, gradients: Mapping[str, Tensor], ways: int) -> None:
        ranks = self.transport.ranks
        self._plain_bytes += ways * (ranks - 1) / ranks * sum(g.nbytes for g in gradients.values())

    # After the optimizer step.

    def on_step(self, context: StepContext) -> Mapping[str, float]:
        """Take up or forget what the step changed, plan where it is time, and count bytes."""
        sent, raw = self._bytes()
        metrics = {"bytes": sent - self._before[0], "raw_bytes": raw - self._before[1]}
        metrics["ratio"] = metrics["raw_bytes"] / metrics["bytes"] if metrics["bytes"] else 1.0
        self._before = sent, raw
        rates = self._engine.get_lr()
        self.adaptive.end_step(
            context.step, applied=context.applied, learning_rate=float(rates[0]) if rates else None
        )
        return metrics | self.adaptive.metrics()

    def _bytes(self) -> tuple[float, float]:
        """Bytes of gradients that this rank has sent so far, and would have sent uncompressed."""
        whole = 1.0 if reduction.place_of(self._engine) != "slices" else 0.5
        sent = self.transport.sent.gradients + self._plain_bytes
        return sent, self.adaptive.reducer.raw_bytes * whole + self._plain_bytes

    def evidence(self) -> Evidence:
        """Count the gradients that were compressed, and the bytes."""
        adaptive = self.adaptive
        (sent, raw), matrices = self._bytes(), len(adaptive.shapes)
        compressed = adaptive.reducer.compressed
        due = int(self._engine.global_steps) > self.config.start_step
        summary = (
            f"{adaptive.compressed_layers()} of {matrices} matrices are sent compressed "
            f"({self.config.compressor}); this rank sent {sent / 2**20:,.2f} MiB for gradients over "
            f"{self.transport.name}, {raw / 2**20:,.2f} MiB without compression; {adaptive.plans} plans"
        )
        if due and not compressed:
            summary += "; all gradients are vectors, have too few elements, or would not become smaller"
        counts = {
            "matrices": matrices,
            "matrices_compressed": adaptive.compressed_layers(),
            "compressed": compressed,
            "bytes": sent,
            "raw_bytes": raw,
            "plans": adaptive.plans,
        }
        return Evidence(compressed > 0 and sent < raw, summary, counts, due=due)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return what the ranks of the group have in common: the plan, factors, and counts."""
        return self.adaptive.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them; with other settings the uniform default comes first, and errors go on."""
        self._start_anew()
        self.adaptive.load_state_dict(state)
        self._restored = True

    def loaded(self, step: int) -> None:
        """Start anew where a checkpoint without this state was loaded."""
        if not self._restored:
            self._start_anew()
        self._restored = False

    def shard_names(self) -> Collection[str]:
        """Name this rank's errors and sums."""
        return (f"rank {self.transport.rank} of {self.transport.ranks}{self._place}",)

    @property
    def _place(self) -> str:
        context = self.context
        return f", stage {context.pipeline_parallel_rank}, shard {context.tensor_parallel_rank}"

    def shard_state_dict(self) -> dict[str, dict[str, Any]]:
        """Return this rank's errors, and its sums for the next plan."""
        (name,) = self.shard_names()
        return {name: self.adaptive.rank_state()}

    def wants_shard(self, name: str) -> bool:
        """Whether it is of a rank of the same pipeline stage and tensor-parallel shard."""
        return name.endswith(self._place)

    def load_shard_state_dict(self, shards: Mapping[str, Any]) -> None:
        """Restore this rank's; with another number of ranks each one gets the mean of all.

        Raises:
            CheckpointError: a rank's are missing.
        """
        (own,) = self.shard_names()
        if own in shards:
            self.adaptive.load_rank_state([shards[own]])
            return
        saved = {int(name.partition(",")[0].rpartition(" ")[2]) for name in shards}
        if saved != {len(shards)}:
            raise CheckpointError(
                f"lgreco: the checkpoint has the errors of {len(shards)} data-parallel ranks, which is not "
                "all of them; restore its ds_efficient_shard files, or load the weights only (--finetune)"
            )
        logger.info(
            "lgreco: saved on %d data-parallel ranks; each takes the mean of their errors", len(shards)
        )
        self.adaptive.load_rank_state(list(shards.values()))
