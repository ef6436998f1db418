"""`initialize`: DeepSpeed's, with the techniques planned, applied, watched and checkpointed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_efficient.config import EfficiencyConfig, load_config
from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.core import evidence as evidence_module
from ds_efficient.core.apply import apply_techniques, build_techniques, gradient_precision
from ds_efficient.core.checkpoint import CheckpointStore
from ds_efficient.core.inventory import Inventory
from ds_efficient.core.parameter_groups import as_lists, split_groups
from ds_efficient.core.technique import Action, Evidence, RunContext, StepContext, Technique
from ds_efficient.errors import ConfigError, UserError
from ds_efficient.registry import TECHNIQUES

logger = logging.getLogger(__name__)


class Attachment:
    """What `initialize` adds to an engine, reachable as ``engine.ds_efficient``.

    Attributes:
        config: the validated configuration.
        context: what holds for the whole run.
        techniques: enabled techniques, in the order of the table.
        actions: what each technique does with each module.
        metrics: the last step's metrics by technique.
        store: named states saved with each checkpoint.
    """

    def __init__(
        self,
        engine: Any,
        config: EfficiencyConfig,
        context: RunContext,
        techniques: list[Technique[Any]],
        actions: Mapping[str, Any],
        mpu: Any,
    ) -> None:
        self.engine = engine
        self.config = config
        self.context = context
        self.techniques = techniques
        self.actions: Mapping[str, list[Action]] = dict(actions)
        self.metrics: dict[str, Mapping[str, float]] = {}
        self.loss: float | None = None
        self.steps_watched = 0
        self.store = CheckpointStore(engine, context)
        self.store.require_equal(weights_facts(techniques))
        self._clip = compat.clip_plain_gradients(engine, mpu) if compat.uses_plain_optimizer(engine) else None
        for technique in techniques:
            self.store.register(
                technique.name,
                technique.state_dict,
                technique.load_state_dict,
                technique.state_version,
                optional=technique.starts_anywhere,
            )
            self.store.register_shards(technique.name, technique)
            technique.attach(engine)
        compat.override(engine, "load_checkpoint", self._loading)
        compat.on_model_step(engine, self._before_step, self._after_step)

    def evidence(self) -> dict[str, Evidence]:
        """Return each technique's proof that it acted, on this rank."""
        return evidence_module.collect(self.techniques)

    def actions_now(self) -> dict[str, list[Action]]:
        """Return `actions` as they stand at the present step."""
        return {
            technique.name: list(technique.actions_now(self.actions[technique.name]))
            for technique in self.techniques
        }

    @property
    def needs_loss(self) -> bool:
        """Whether some technique wants `loss` set before each step, by whoever runs the passes."""
        return any(technique.needs_loss for technique in self.techniques)

    @property
    def consumed_layer_tokens(self) -> int | None:
        """Layer tokens of the run so far, over all ranks; None where every layer sees every token."""
        counts = (technique.consumed_layer_tokens for technique in self.techniques)
        return next((count for count in counts if count is not None), None)

    def _loading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            for technique in self.techniques:
                technique.loaded(int(self.engine.global_steps))
            return result

        return load_checkpoint

    def _before_step(self) -> None:
        if self.techniques:
            context = StepContext(step=int(self.engine.global_steps), loss=self.loss)
            for technique in self.techniques:
                technique.before_step(context)
        if self._clip is not None:
            self._clip()

    def _after_step(self, applied: bool) -> None:
        self.steps_watched += 1
        if not self.techniques:
            return
        context = StepContext(step=int(self.engine.global_steps), applied=applied, loss=self.loss)
        self.metrics = {technique.name: dict(technique.on_step(context)) for technique in self.techniques}
        compat.write_monitor_events(self.engine, self.metrics)
        if self.steps_watched == self.config.general.evidence_steps:
            found = self.evidence()
            evidence_module.require_activity(found, context.step)
            for name, proof in found.items():
                logger.info("%s: %s", name, proof.summary)


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    *,
    total_steps: int | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Build a DeepSpeed engine with the techniques of the configuration.

    Arguments and results are those of ``deepspeed.initialize``; two additions:

    Args:
        model_parameters: also a function from the (changed) model to parameters or parameter groups, for
            when a technique replaces parameters.
        total_steps: optimizer steps of the run, for techniques with a schedule.

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler); ``engine.ds_efficient`` is an `Attachment`.

    Raises:
        ConfigError: every problem of the configuration.
        UserError: something that cannot be combined.
    """
    compat.require_version()
    if model is None:
        raise UserError("initialize: model is needed")
    source = _choose_config(args, config, config_params)
    settings = source if isinstance(source, EfficiencyConfig) else load_config(source)
    for warning in settings.warnings:
        logger.warning("%s", warning)
    if mesh_param is None and dist_init_required is not False and not dist.is_initialized():
        compat.init_distributed()
    context = _run_context(settings, mpu, total_steps)
    techniques = build_techniques(settings, context)
    actions = apply_techniques(model, techniques, Inventory.from_model(model)) if techniques else {}
    parameters = _parameters(model, model_parameters)
    _check_optimizer(model, optimizer)
    engine, engine_optimizer, loader, scheduler = compat.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=parameters,
        training_data=training_data,
        lr_scheduler=_lr_scheduler(techniques, lr_scheduler),
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=settings.for_deepspeed(),
        mesh_param=mesh_param,
    )
    compat.require_plain_engine(engine)
    if hasattr(mpu, "checkpoint_rank"):
        compat.set_checkpoint_rank(engine, mpu.checkpoint_rank())
    compat.fuse_zero_norm(engine)
    engine.ds_efficient = Attachment(engine, settings, context, techniques, actions, mpu)
    return engine, engine_optimizer, loader, scheduler


def weights_facts(techniques: Sequence[Technique[Any]]) -> dict[str, str]:
    """Return what each technique there is makes of the weights, so that no run loads others' weights."""
    facts = {row.name: "off" for row in TECHNIQUES if row.technique is not None}
    return facts | {technique.name: technique.weights_fact() or "off" for technique in techniques}


def _choose_config(args: Any, config: Any, config_params: Any) -> Any:
    """Return the configuration that DeepSpeed would take."""
    from_args = getattr(args, "deepspeed_config", None)
    given = config if config is not None else config_params
    if given is not None and from_args is not None:
        raise ConfigError(
            "initialize", ["config= and args.deepspeed_config: both given; give the configuration once"]
        )
    chosen = given if given is not None else from_args
    if chosen is None:
        raise ConfigError("initialize", ["config: needed (a path or a dict), or args.deepspeed_config"])
    return os.fspath(chosen) if isinstance(chosen, Path) else chosen


def _run_context(settings: EfficiencyConfig, mpu: Any, total_steps: int | None) -> RunContext:
    """Gather ranks and sizes from `mpu`, or from torch.distributed without one."""
    initialized = dist.is_initialized()
    micro_batch = settings.deepspeed.get("train_micro_batch_size_per_gpu")
    rank, size = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)

    def ask(name: str, default: int) -> int:
        method: Callable[[], int] | None = getattr(mpu, name, None)
        return default if method is None else int(method())

    return RunContext(
        seed=settings.general.seed,
        total_steps=total_steps,
        data_parallel_rank=ask("get_data_parallel_rank", rank),
        data_parallel_size=ask("get_data_parallel_world_size", size),
        tensor_parallel_rank=ask("get_tensor_model_parallel_rank", 0),
        tensor_parallel_size=ask("get_tensor_model_parallel_world_size", 1),
        pipeline_parallel_rank=ask("get_pipeline_model_parallel_rank", 0),
        pipeline_parallel_size=ask("get_pipeline_model_parallel_world_size", 1),
        zero_stage=int(settings.deepspeed.get("zero_optimization", {}).get("stage", 0)),
        micro_batch_size=micro_batch if isinstance(micro_batch, int) else None,
        micro_batches=_micro_batches(settings.deepspeed, ask("get_data_parallel_world_size", size)),
        gradient_precision=gradient_precision(settings.deepspeed, settings.precision),
    )


def _micro_batches(deepspeed: Mapping[str, Any], data_parallel_size: int) -> int | None:
    """Return the passes of a rank in an optimizer step, as DeepSpeed derives them; None where it refuses."""
    passes, micro, whole = (
        deepspeed.get(name)
        for name in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")
    )
    if isinstance(passes, int):
        return passes
    if isinstance(micro, int) and isinstance(whole, int):
        return max(1, whole // (micro * data_parallel_size))
    return 1 if isinstance(micro, int) or isinstance(whole, int) else None


def _lr_scheduler(techniques: Sequence[Technique[Any]], given: Any) -> Any:
    """Return what DeepSpeed gets as lr_scheduler; a technique's replaces the one of the configuration."""
    own = [technique for technique in techniques if technique.schedules_learning_rate]
    if not own:
        return given
    if given is not None:
        raise UserError(
            f"lr_scheduler: given, but {own[0].name} schedules the learning rate itself; leave one of them "
            "out"
        )
    return own[0].lr_scheduler


def _parameters(model: torch.nn.Module, given: Any) -> Any:
    """Return what DeepSpeed gets as model_parameters, checked against the changed model."""
    chosen = given(model) if callable(given) else given
    if chosen is None:
        return split_groups([parameter for parameter in model.parameters() if parameter.requires_grad])
    groups = as_lists(chosen)
    known = {id(parameter) for parameter in model.parameters()}
    if not compat.parameter_ids(groups) <= known:
        raise UserError(
            "model_parameters: some are no longer in the model, because a technique replaced them; "
            "give a function instead, e.g. model_parameters=lambda model: model.parameters()"
        )
    return split_groups(groups)


def _check_optimizer(model: torch.nn.Module, optimizer: Any) -> None:
    """Refuse an optimizer that was made for the parameters of before."""
    held = compat.parameter_ids(getattr(optimizer, "param_groups", []))
    if not held <= {id(parameter) for parameter in model.parameters()}:
        raise UserError(
            "optimizer: it holds parameters that are no longer in the model, because a technique replaced "
            "them; give a function instead, e.g. optimizer=lambda parameters: torch.optim.AdamW(parameters)"
        )
