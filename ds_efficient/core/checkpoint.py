"""Named states in DeepSpeed's checkpoints, and checkpoints that are whole or refused."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.core import state as files
from ds_efficient.core.technique import RunContext
from ds_efficient.errors import CheckpointError
from ds_efficient.version import __version__

logger = logging.getLogger(__name__)

_LOAD_ERRORS = (
    RuntimeError,
    KeyError,
    ValueError,
    AssertionError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class _Entry:
    get: Callable[[], Mapping[str, Any]]
    set: Callable[[Mapping[str, Any]], None]
    version: int
    each_rank: bool
    optional: bool


class ShardedState(Protocol):
    """State of which each part is on one rank (`ds_efficient.core.technique.Technique`)."""

    def shard_names(self) -> Collection[str]:
        """Name the parts that this rank has."""

    def shard_state_dict(self) -> Mapping[str, Any]:
        """Return them."""

    def wants_shard(self, name: str) -> bool:
        """Whether this rank needs a saved part."""

    def load_shard_state_dict(self, shards: Mapping[str, Any]) -> None:
        """Take them over."""


class CheckpointStore:
    """Saves and restores registered states with the engine's checkpoints.

    Wraps ``engine.save_checkpoint`` and ``engine.load_checkpoint``; both stay collective and keep their
    arguments and results. A checkpoint is written under another name and gets its own when it is whole;
    ``latest`` is written last, atomically. A run killed at any moment leaves the previous checkpoint.
    """

    def __init__(self, engine: Any, context: RunContext) -> None:
        self._engine = engine
        self._context = context
        self._entries: dict[str, _Entry] = {}
        self._sharded: dict[str, ShardedState] = {}
        self._facts: dict[str, Any] = {}
        self._weights_facts: dict[str, Any] = {}
        self._about: dict[str, Any] = {}
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.layout = files.Layout(
            world_size=world,
            data_parallel_size=context.data_parallel_size,
            tensor_parallel_size=context.tensor_parallel_size,
            pipeline_parallel_size=context.pipeline_parallel_size,
            zero_stage=compat.zero_stage(engine),
        )
        compat.override(engine, "save_checkpoint", self._saving)
        compat.override(engine, "load_checkpoint", self._loading)

    def register(
        self,
        name: str,
        get: Callable[[], Mapping[str, Any]],
        set: Callable[[Mapping[str, Any]], None],
        version: int = 1,
        *,
        each_rank: bool = False,
        optional: bool = False,
    ) -> None:
        """Save `get()` with every checkpoint under `name`, and hand it to `set` on load.

        Args:
            name: unique.
            get: returns tensors and plain values.
            set: restores them.
            version: of the state's form; a newer one in a checkpoint is refused.
            each_rank: the state differs on each rank, and is restored only on the same layout.
            optional: a checkpoint without it is loaded, and what is registered goes on as it is.
        """
        if name in self._entries:
            raise ValueError(f"state {name!r} is registered twice")
        self._entries[name] = _Entry(get, set, version, each_rank, optional)

    def register_shards(self, name: str, state: ShardedState) -> None:
        """Save the parts of a registered state that each rank has alone, and find them again on any layout.

        Args:
            name: that the state is registered under.
            state: asked for its parts with every checkpoint.
        """
        self._sharded[name] = state

    def require_equal(self, facts: Mapping[str, Any], *, weights_only: bool = True) -> None:
        """Record `facts` in every checkpoint; refuse to load one that was saved with others.

        Args:
            facts: plain values by the name that a user knows (an argument or a key).
            weights_only: they matter too where only the weights are loaded.
        """
        files.check_plain(facts, "facts")
        (self._weights_facts if weights_only else self._facts).update(facts)

    def describe(self, about: Mapping[str, Any]) -> None:
        """Record plain values in every checkpoint that other programs want to know; nothing compares them."""
        files.check_plain(about, "about")
        self._about.update(about)

    def _shared_file(self) -> str:
        context = self._context
        rank = context.pipeline_parallel_rank * context.tensor_parallel_size + context.tensor_parallel_rank
        return f"ds_efficient_mp_{rank:02d}.pt"

    @staticmethod
    def _rank_file() -> str:
        return f"ds_efficient_rank_{dist.get_rank() if dist.is_initialized() else 0:05d}.pt"

    @staticmethod
    def _shard_file() -> str:
        return f"ds_efficient_shard_{dist.get_rank() if dist.is_initialized() else 0:05d}.pt"

    def _payload(self, *, each_rank: bool) -> dict[str, Any]:
        return {
            "package": __version__,
            "states": {
                name: {"version": entry.version, "state": dict(entry.get())}
                for name, entry in self._entries.items()
                if entry.each_rank == each_rank
            },
        }

    def _saving(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def save_checkpoint(
            save_dir: str,
            tag: str | None = None,
            client_state: Mapping[str, Any] | None = None,
            save_latest: bool = True,
            exclude_frozen_parameters: bool = False,
        ) -> Any:
            tag = str(tag) if tag is not None else f"global_step{self._engine.global_steps}"
            folder = Path(save_dir) / tag
            _on_first_rank(lambda: files.begin_saving(folder))
            staging = folder.with_name(folder.name + files.SAVING)
            _on_every_rank(lambda: self._write_states(staging))
            try:
                result = original(
                    save_dir,
                    staging.name,
                    client_state=dict(client_state or {}),
                    save_latest=False,
                    exclude_frozen_parameters=exclude_frozen_parameters,
                )
            except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
                raise CheckpointError(
                    f"{folder}: cannot be written: {_shortened(error)}; earlier checkpoints are untouched"
                ) from error
            _barrier()
            _on_first_rank(lambda: self._finish(staging, folder, save_latest))
            return result

        return save_checkpoint

    def _write_states(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self._context.data_parallel_rank == 0:
            files.save_tensors(folder / self._shared_file(), self._payload(each_rank=False))
        if any(entry.each_rank for entry in self._entries.values()):
            files.save_tensors(folder / self._rank_file(), self._payload(each_rank=True))
        shards = {name: dict(state.shard_state_dict()) for name, state in self._sharded.items()}
        if any(shards.values()):
            files.save_tensors(folder / self._shard_file(), {"package": __version__, "shards": shards})

    def _finish(self, staging: Path, folder: Path, save_latest: bool) -> None:
        facts = {**self._weights_facts, **self._facts}
        files.write_manifest(
            staging, self.layout, {"package": __version__, "facts": facts, "about": self._about}
        )
        files.publish(staging, folder)
        if save_latest:
            latest = folder.parent / files.LATEST
            files.write_atomic(latest, lambda target: target.write_text(folder.name))

    def _loading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load_checkpoint(load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
            manifest: dict[str, Any] | None = None
            module_only = kwargs.get("load_module_only", False)
            whole = kwargs.get("load_optimizer_states", True) and not module_only
            universal = bool(self._engine.load_universal_checkpoint())
            if not universal:
                chosen = str(tag) if tag is not None else files.latest_tag(Path(load_dir))
                if chosen is None:
                    return original(load_dir, tag, *args, **kwargs)
                tag = chosen
                manifest = self._check(Path(load_dir) / chosen, weights_only=not whole)
            partial = self.layout.zero_stage == 3 and not whole
            if partial:  # with load_module_only alone DeepSpeed would load no weights
                kwargs["load_optimizer_states"] = False
            view = (
                compat.weights_view(self._engine, Path(load_dir), str(tag)) if partial else _as_is(load_dir)
            )
            try:
                with view as source:
                    result = original(source, tag, *args, **kwargs)
            except _LOAD_ERRORS as error:
                raise CheckpointError(
                    f"{load_dir}/{tag}: DeepSpeed cannot load it into this model: {_shortened(error)}"
                ) from error
            if not whole:
                compat.refresh_master_weights(self._engine)
            if partial and result[0] is not None:
                result = (str(Path(load_dir) / str(tag)), *result[1:])
            if manifest is not None and not module_only:
                self._restore(Path(load_dir) / str(tag), manifest)
            return result

        return load_checkpoint

    def _check(self, folder: Path, *, weights_only: bool) -> dict[str, Any] | None:
        """Compare layout and files before anything is read into the model."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint{files.others(folder.parent)}")
        manifest = files.read_manifest(folder)
        if manifest is None:
            if any(folder.glob("ds_efficient_*")):
                raise CheckpointError(
                    f"{folder}: has no {files.MANIFEST}: its save was interrupted; name another by "
                    f"--ckpt-step{files.others(folder.parent)}"
                )
            logger.warning("%s: has no %s: it was made without ds_efficient", folder, files.MANIFEST)
            return None
        _on_first_rank(lambda: files.check_files(folder, manifest))
        problems = self.layout.problems(manifest.get("layout", {}), weights_only=weights_only)
        facts = self._weights_facts if weights_only else {**self._weights_facts, **self._facts}
        saved = manifest.get("facts", {})
        problems += [
            f"saved with {name} {saved[name]}, this run has {value}"
            for name, value in facts.items()
            if name in saved and saved[name] != value
        ]
        if problems:
            raise CheckpointError(
                f"{folder}: the checkpoint does not fit this run:\n  " + "\n  ".join(problems) + "\n  "
                "Start with the values it was saved with, or without --load."
            )
        return manifest

    def _restore(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        shared = files.load_tensors(folder / self._shared_file())
        self._hand_over(shared["states"], each_rank=False, where=folder / self._shared_file())
        for name, state in self._sharded.items():
            if name in shared["states"]:
                state.load_shard_state_dict(self._shards(folder, name, state))
        if not any(entry.each_rank for entry in self._entries.values()):
            return
        same = manifest["layout"].get("world_size") == self.layout.world_size
        if same:
            own = files.load_tensors(folder / self._rank_file())
            self._hand_over(own["states"], each_rank=True, where=folder / self._rank_file())
        else:
            logger.warning(
                "%s: saved on %s ranks, this run has %s; states that differ on each rank start anew",
                folder,
                manifest["layout"].get("world_size"),
                self.layout.world_size,
            )

    def _shards(self, folder: Path, name: str, state: ShardedState) -> dict[str, Any]:
        """Return the saved parts that this rank needs: its own, or those of whichever rank had them."""
        own = folder / self._shard_file()
        found: dict[str, Any] = {}
        if own.is_file():
            found = files.load_tensors(own, lazily=True)["shards"].get(name, {})
            if set(state.shard_names()) <= found.keys():
                return {key: value for key, value in found.items() if state.wants_shard(key)}
        found = {}
        for path in sorted(folder.glob("ds_efficient_shard_*.pt")):
            saved = files.load_tensors(path, lazily=True)["shards"].get(name, {})
            found |= {key: value for key, value in saved.items() if state.wants_shard(key)}
        return found

    def _hand_over(self, states: Mapping[str, Any], *, each_rank: bool, where: Path) -> None:
        expected = {name for name, entry in self._entries.items() if entry.each_rank == each_rank}
        absent, unused = sorted(expected - set(states)), sorted(set(states) - expected)
        missing = [name for name in absent if not self._entries[name].optional]
        if missing:
            raise CheckpointError(
                f"{where}: has no state of {', '.join(missing)}; the run that saved it had it disabled. "
                "Disable the section, or start from the weights only (--finetune)"
            )
        if unused:
            logger.warning("%s: holds the state of %s, which this run does not use", where, ", ".join(unused))
        for name in sorted(expected - set(states)):
            logger.info("%s: has no state of %s, which starts here", where, name)
        for name in sorted(expected & set(states)):
            entry, saved = self._entries[name], states[name]
            if saved["version"] > entry.version:
                raise CheckpointError(
                    f"{where}: the state of {name} has version {saved['version']}, this package reads up to "
                    f"{entry.version}; install a newer ds_efficient"
                )
            entry.set(saved["state"])


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _shortened(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join(lines[:3])[:400]


def _as_is(folder: str) -> contextlib.AbstractContextManager[str]:
    return contextlib.nullcontext(folder)


def _on_first_rank(action: Callable[[], Any]) -> None:
    _on_every_rank(action if not dist.is_initialized() or dist.get_rank() == 0 else (lambda: None))


def _on_every_rank(action: Callable[[], Any]) -> None:
    """Run `action`; where it fails on some rank, raise its message on all, so that nobody waits for ever."""
    message = ""
    try:
        action()
    except (CheckpointError, OSError) as error:
        message = str(error) or type(error).__name__
    if dist.is_initialized() and dist.get_world_size() > 1:
        failed = torch.tensor([int(bool(message))], dtype=torch.int32)
        if dist.get_backend() == "nccl":
            failed = failed.cuda()
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if int(failed):
            messages = [""] * dist.get_world_size()
            dist.all_gather_object(messages, message)
            message = "\n  ".join(dict.fromkeys(filter(None, messages)))
    if message:
        raise CheckpointError(message)
