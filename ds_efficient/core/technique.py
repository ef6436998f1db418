"""The interface of a technique: plan, apply, attach, act on each step, prove it, keep state.

Shared by the techniques and by the engine, so it imports neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ds_efficient.config.base import Section

if TYPE_CHECKING:
    import torch

    from ds_efficient.core.inventory import Inventory

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True)
class RunContext:
    """What holds for the whole run.

    Attributes:
        seed: run seed; every random draw is keyed by it (`ds_efficient.core.keys`).
        total_steps: optimizer steps of the run, or None where it is not known.
        data_parallel_rank, data_parallel_size: place in the data-parallel group.
        tensor_parallel_rank, tensor_parallel_size: place in the tensor-parallel group.
        pipeline_parallel_rank, pipeline_parallel_size: place in the pipeline.
        zero_stage: DeepSpeed's ``zero_optimization.stage``.
        micro_batch_size: samples of one pass of one data-parallel rank, or None where it is not known.
        micro_batches: passes of one data-parallel rank in an optimizer step, or None where it is not known.
        gradient_precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``: of the gradients that are reduced.
    """

    seed: int = 1234
    total_steps: int | None = None
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_rank: int = 0
    pipeline_parallel_size: int = 1
    zero_stage: int = 0
    micro_batch_size: int | None = None
    micro_batches: int | None = None
    gradient_precision: str = "fp32"


@dataclass(frozen=True)
class StepContext:
    """What a technique sees after one optimizer step.

    Attributes:
        step: optimizer steps done, this one included.
        applied: False when the optimizer skipped the step (fp16 overflow).
        loss: loss of the step where it is known, averaged over data-parallel ranks.
    """

    step: int
    applied: bool = True
    loss: float | None = None


@dataclass(frozen=True)
class Action:
    """What a technique does with one module.

    Sizes are full ones: of the whole module, before tensor parallelism cuts it. Of `parameters`, what is
    neither in `extra_parameters` nor in the dense layer's bias is the module's weight, which is cut as the
    dense weight was (`ds_efficient.core.inventory.Inventory.with_actions`). A column-parallel layer, for
    example, whose (out, in) weight becomes half as large and which gets adapters (out, r), cut, and (r, in),
    on each rank whole, has ``parameters = out * in // 2 + bias + r * (out + in)`` and
    ``extra_parameters = (r * out, r * in)``.

    Attributes:
        module: dotted module name in the model.
        action: what is done, in a few words (``"sparse 2:4"``), or ``"skip"``.
        reason: for ``"skip"``: why.
        parameters: all parameters the module has afterwards, or None when unchanged.
        extra_parameters: those of `parameters` that the technique adds beside weight and bias: how many
            tensor parallelism cuts, and how many each of its ranks holds whole. Where the layer itself is not
            cut, only their sum counts.
        buffer_bytes: bytes of the buffers that the technique keeps for the module (masks, operands). They
            are cut with the layer by tensor parallelism; ZeRO does not partition them.
        saved_activation_fraction: share of the module's saved input that is no longer kept, 0 to 1.
        options: plain values that `Technique.apply` needs.

    Raises:
        ValueError: a negative size, or extra parameters that `parameters` does not contain.
    """

    module: str
    action: str
    reason: str = ""
    parameters: int | None = None
    extra_parameters: tuple[int, int] = (0, 0)
    buffer_bytes: int = 0
    saved_activation_fraction: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.parameters or 0, *self.extra_parameters, self.buffer_bytes) < 0:
            raise ValueError(f"{self.module}: a size in {self} is negative")
        if sum(self.extra_parameters) > (self.parameters or 0):
            raise ValueError(
                f"{self.module}: extra_parameters {self.extra_parameters} are more than parameters = "
                f"{self.parameters}, which includes them"
            )

    @property
    def skipped(self) -> bool:
        """Whether the technique leaves the module alone."""
        return self.action == "skip"


@dataclass(frozen=True)
class Evidence:
    """Proof that a technique acted.

    Attributes:
        acted: whether it did what it is for, so far.
        summary: one line for the log and the report.
        counts: the numbers behind it.
        due: False while nothing is to be expected yet (a technique that starts at a later step).
    """

    acted: bool
    summary: str
    counts: Mapping[str, float] = field(default_factory=dict)
    due: bool = True


@dataclass(frozen=True)
class Outlook:
    """What a technique will save over a whole run, where that follows from its schedule.

    Attributes:
        summary: one line for the plan.
        numbers: those behind it.
    """

    summary: str
    numbers: Mapping[str, float] = field(default_factory=dict)


class Technique(ABC, Generic[SectionT]):
    """One technique of one run.

    The order of calls: `plan` (also without a model on any device), `apply` before the engine exists,
    `attach` once it does, then for each optimizer step `before_step`, the optimizer, `on_step`.
    """

    name: ClassVar[str]
    state_version: ClassVar[int] = 1
    starts_anywhere: ClassVar[bool] = False
    """Whether it may be switched on in the middle of a run: a checkpoint without its state is loaded."""

    def __init__(self, config: SectionT, context: RunContext) -> None:
        self.config = config
        self.context = context

    @abstractmethod
    def plan(self, inventory: Inventory) -> Sequence[Action]:
        """Say what happens to each module the section could mean, skipped ones with the reason."""

    def outlook(self, inventory: Inventory) -> Outlook | None:
        """Say what the run will save, for a technique that changes over time; None for others."""
        return None

    @abstractmethod
    def apply(self, model: torch.nn.Module, actions: Sequence[Action]) -> None:
        """Change the model accordingly, in place, before the engine is built."""

    def attach(self, engine: Any) -> None:
        """Connect to the DeepSpeed engine (only through `ds_efficient.core.deepspeed_compat`)."""

    def loaded(self, step: int) -> None:
        """Act after the engine has loaded a checkpoint, the weights alone included.

        Args:
            step: optimizer steps done, as the engine counts them now.
        """

    def before_step(self, context: StepContext) -> None:
        """Act on the reduced gradients at the accumulation boundary, before the optimizer."""

    @abstractmethod
    def on_step(self, context: StepContext) -> Mapping[str, float]:
        """Act after an optimizer step; return the step's metrics (plain numbers)."""

    @abstractmethod
    def evidence(self) -> Evidence:
        """Prove that the technique acted."""

    def actions_now(self, actions: Sequence[Action]) -> Sequence[Action]:
        """Return `plan`'s actions as they stand now, for a technique that changes over time."""
        return actions

    @property
    def needs_loss(self) -> bool:
        """Whether `StepContext.loss` is wanted where the engine does not see the loss itself (a pipeline)."""
        return False

    @property
    def schedules_learning_rate(self) -> bool:
        """Whether the learning rate follows `lr_scheduler` instead of any other schedule."""
        return False

    def lr_scheduler(self, optimizer: Any) -> Any:
        """Return a torch scheduler for the optimizer; called where `schedules_learning_rate` says so."""
        raise AssertionError(f"{self.name} has no schedule of the learning rate")

    @property
    def consumed_layer_tokens(self) -> int | None:
        """Layer tokens of the run so far, over all ranks, where the technique changes them; else None."""
        return None

    def weights_fact(self) -> str:
        """What the technique makes of the model's parameters and buffers, in a few words; "" for nothing.

        A checkpoint is loaded only into a run with the same.
        """
        return ""

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint: tensors and plain values only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result, possibly at another data-parallel size."""

    def shard_names(self) -> Collection[str]:
        """Name the parts of the state that this rank alone has; no two ranks use the same name."""
        return ()

    def shard_state_dict(self) -> dict[str, dict[str, Any]]:
        """State for the checkpoint by `shard_names`: tensors and plain values only."""
        return {}

    def wants_shard(self, name: str) -> bool:
        """Whether this rank needs a part that was saved under this name, by whichever rank."""
        return name in self.shard_names()

    def load_shard_state_dict(self, shards: Mapping[str, Any]) -> None:
        """Restore parts after `load_state_dict`; also called without any, where none was saved.

        Args:
            shards: this rank's own ones where it saved all of `shard_names`; else, as with another number of
                ranks, all that `wants_shard` accepts.
        """
