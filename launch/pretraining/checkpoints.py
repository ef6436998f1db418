"""What a run must remember besides the engine: samples seen, random streams, the data it asked for."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel

from ds_efficient.core.state import latest_tag, others
from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.random_ltd.learning_rate import LayerTokenLR
from pretraining.schedule import LRScheduler
from pretraining.settings import Settings

logger = logging.getLogger(__name__)

# What decides the meaning of the weights; their shapes do not show all of it (heads, for one).
_MODEL_ARGUMENTS = (
    "num_layers hidden_size num_attention_heads ffn_hidden_size kv_channels num_query_groups "
    "position_embedding_type normalization norm_epsilon qk_layernorm swiglu squared_relu "
    "disable_bias_linear add_qkv_bias untie_embeddings_and_output_weights"
).split()
_ROTARY_ARGUMENTS = ("rotary_base", "rotary_percent")


@dataclass
class Progress:
    """Where the run stands.

    Attributes:
        step: optimizer steps done.
        consumed_samples: training samples seen by all ranks.
        seconds: training time so far, over all starts.
    """

    step: int = 0
    consumed_samples: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return vars(self).copy()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore."""
        self.step = int(state["step"])
        self.consumed_samples = int(state["consumed_samples"])
        self.seconds = float(state["seconds"])


def random_state() -> dict[str, Any]:
    """Return every generator that training draws from, on this rank."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    state["streams"] = dict(tensor_parallel.get_cuda_rng_tracker().get_states())
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore `random_state`'s result."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(state["streams"]))


class DataOrder:
    """What decides the order of the samples, as a state of the checkpoint.

    Args:
        identity: plain values that decide it.
        changes_since: says in lines what differs from an earlier identity.
    """

    def __init__(
        self, identity: Mapping[str, Any], changes_since: Callable[[dict[str, Any]], list[str]]
    ) -> None:
        self._identity = identity
        self._changes_since = changes_since
        self._saved: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the identity as JSON text: plain, whatever it holds."""
        return {"identity": json.dumps(self._identity, sort_keys=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the identity of the checkpoint's data."""
        self._saved = json.loads(state["identity"])

    def warn(self) -> None:
        """Warn where the data is not what the checkpoint's run would have gone on with."""
        changes = [] if self._saved is None else self._changes_since(self._saved)
        if changes:
            logger.warning(
                "the order of the data changes from here on, so the run is not the unbroken one: %s",
                "; ".join(changes),
            )


def model_facts(args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Return what must be the same for the weights to mean the same, by argument."""
    names = list(_MODEL_ARGUMENTS)
    if args.position_embedding_type == "rope":
        names += _ROTARY_ARGUMENTS
    elif args.position_embedding_type == "learned_absolute":
        names.append("max_position_embeddings")
    facts = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    return {**facts, "padded vocabulary size": vocab_size}


def register_states(
    engine: Any,
    args: argparse.Namespace,
    settings: Settings,
    vocab_size: int,
    tokenizer: Any,
    progress: Progress,
    data_order: DataOrder,
) -> None:
    """Save progress, data order and random streams with every checkpoint, and what a later run must share."""
    store = engine.ds_efficient.store
    store.register("training", progress.state_dict, progress.load_state_dict)
    store.register("data", data_order.state_dict, data_order.load_state_dict)
    store.register("random", random_state, restore_random_state, each_rank=True)
    store.require_equal(model_facts(args, vocab_size))
    store.require_equal({"precision": settings.precision}, weights_only=False)
    store.describe(_description(engine, args, tokenizer))


def _description(engine: Any, args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Return what an export needs besides the weights and `model_facts`."""
    config = engine.module.config
    model = None if args.tokenizer_model is None else Path(args.tokenizer_model).resolve()
    if model is not None and model.is_dir():
        model = model / "tokenizer.json"
    return {
        "max_position_embeddings": args.max_position_embeddings,
        # megatron-core's fused kernel of bias and GELU computes the tanh approximation
        "tanh_gelu": bool(config.bias_activation_fusion and not (args.swiglu or args.squared_relu)),
        "tokenizer": {**tokenizer.identity(), "path": None if model is None else str(model)},
    }


def tag_of(step: int) -> str:
    """Return the folder name of a checkpoint."""
    return f"global_step{step}"


def tag_to_load(args: argparse.Namespace) -> str | None:
    """Return the checkpoint in ``--load`` that the run resumes from, or None where there is none.

    Raises:
        CheckpointError: ``latest`` there names what does not exist.
    """
    if args.load is None:
        return None
    return tag_of(args.ckpt_step) if args.ckpt_step is not None else latest_tag(Path(args.load))


def load(
    engine: Any, args: argparse.Namespace, settings: Settings, progress: Progress, data_order: DataOrder
) -> bool:
    """Resume from ``--load`` if it holds a checkpoint.

    The optimizer's hyperparameters and the schedule are those of this run; the checkpoint has the moments and
    the step.

    Returns:
        Whether something was loaded.

    Raises:
        CheckpointError: none there where one is needed, damaged, or of another model or layout.
    """
    if args.load is None:
        return False
    folder = Path(args.load)
    tag = tag_to_load(args)
    if tag is None:
        if args.exit_on_missing_checkpoint or args.finetune or args.skip_train:
            raise CheckpointError(
                f"--load {folder}: holds no checkpoint (no file {folder / 'latest'}); correct the path, name "
                f"one by --ckpt-step{others(folder)}"
            )
        return False
    weights_only = args.finetune or args.no_load_optim or args.skip_train
    before, hyperparameters = random_state(), _hyperparameters(engine)
    path, _ = engine.load_checkpoint(
        str(folder),
        tag,
        load_optimizer_states=not weights_only,
        load_lr_scheduler_states=not args.finetune,
        load_module_only=args.finetune,
    )
    if path is None:
        raise CheckpointError(f"--load {folder}: DeepSpeed found no checkpoint {tag}")
    if args.no_load_rng or args.finetune:
        restore_random_state(before)
    if args.finetune:
        engine.global_steps = 0
        engine.global_samples = 0
    elif progress.step != engine.global_steps:
        # A checkpoint of DeepSpeed alone knows the step, not the samples.
        progress.step = int(engine.global_steps)
        progress.consumed_samples = progress.step * settings.global_batch_size
    _restore_hyperparameters(engine, hyperparameters)
    if not (args.finetune or args.skip_train):
        data_order.warn()
    return True


def _hyperparameters(engine: Any) -> list[dict[str, Any]]:
    """Return weight decay, betas and so on of each parameter group."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in engine.optimizer.param_groups
    ]


def _restore_hyperparameters(engine: Any, wanted: list[dict[str, Any]]) -> None:
    """Put this run's values over the checkpoint's, which would win in silence."""
    for group, values in zip(engine.optimizer.param_groups, wanted, strict=True):
        changed = [name for name, value in values.items() if group.get(name) != value]
        if changed:
            logger.info("parameter group %s: %s as in this run", group.get("name", ""), ", ".join(changed))
        group.update(values)
    if isinstance(engine.lr_scheduler, (LRScheduler, LayerTokenLR)):
        engine.lr_scheduler.apply()


def save(engine: Any, args: argparse.Namespace, progress: Progress) -> str:
    """Save to ``--save``; collective. Returns the folder."""
    tag = tag_of(progress.step)
    engine.save_checkpoint(args.save, tag, client_state={"iteration": progress.step})
    return str(Path(args.save) / tag)


def check_writable(path: str, flag: str) -> None:
    """Create the folder and a file in it, so that an unwritable output is found before training.

    Raises:
        UserError: with the reason.
    """
    folder = Path(path)
    probe = folder / f".write_test.{os.environ.get('RANK', '0')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{flag} {path}: cannot be written ({error.strerror}); choose another folder"
        ) from error
