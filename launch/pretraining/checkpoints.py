"""What a run must remember besides the engine: samples seen, random streams, the data it asked for."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel

from ds_efficient.core.state import latest_tag
from ds_efficient.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where the run stands.

    Attributes:
        step: optimizer steps done.
        consumed_samples: training samples seen by all ranks.
        requested_samples: training samples asked of the dataset; it decides about the order.
        seconds: training time so far, over all starts.
    """

    step: int = 0
    consumed_samples: int = 0
    requested_samples: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return vars(self).copy()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; warns where another number of samples changes the order of the data."""
        if self.requested_samples and state["requested_samples"] != self.requested_samples:
            logger.warning(
                "this run asks for %d training samples, the checkpoint's asked for %d: the order of the data "
                "changes from here on (keep --train-iters and --global-batch-size to resume exactly)",
                self.requested_samples,
                state["requested_samples"],
            )
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


def register_states(engine: Any, progress: Progress) -> None:
    """Save `progress` and the random streams with every checkpoint of the engine."""
    store = engine.ds_efficient.store
    store.register("training", progress.state_dict, progress.load_state_dict)
    store.register("random", random_state, restore_random_state, each_rank=True)


def tag_of(step: int) -> str:
    """Return the folder name of a checkpoint."""
    return f"global_step{step}"


def load(engine: Any, args: argparse.Namespace, progress: Progress) -> bool:
    """Resume from ``--load`` if it holds a checkpoint.

    Returns:
        Whether something was loaded.

    Raises:
        CheckpointError: none there with ``--exit-on-missing-checkpoint``, damaged, or of another layout.
    """
    if args.load is None:
        return False
    folder = Path(args.load)
    tag = tag_of(args.ckpt_step) if args.ckpt_step is not None else latest_tag(folder)
    if tag is None:
        if args.exit_on_missing_checkpoint or args.finetune:
            raise CheckpointError(f"--load {folder}: holds no checkpoint (no file {folder / 'latest'})")
        return False
    restore_streams = not (args.no_load_rng or args.finetune)
    before = random_state()
    path, _ = engine.load_checkpoint(
        str(folder),
        tag,
        load_optimizer_states=not (args.no_load_optim or args.finetune),
        load_lr_scheduler_states=not (args.no_load_optim or args.finetune),
        load_module_only=args.finetune,
    )
    if path is None:
        raise CheckpointError(f"--load {folder}: DeepSpeed found no checkpoint {tag}")
    if not restore_streams:
        restore_random_state(before)
    if args.finetune:
        engine.global_steps = 0
        engine.global_samples = 0
    elif progress.step != engine.global_steps:
        progress.step = int(engine.global_steps)
    return True


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
    probe = folder / ".write_test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{flag} {path}: cannot be written ({error.strerror}); choose another folder"
        ) from error
