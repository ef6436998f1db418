"""State beside DeepSpeed's in a checkpoint: tensors and plain values, versioned, loadable with weights_only.

A checkpoint folder ``<save>/<tag>`` gets, before DeepSpeed's own files are declared the latest:

- ``ds_efficient_mp_XX.pt``: replicated state of one model-parallel rank, written by data-parallel rank 0;
- ``ds_efficient_rank_XXXXX.pt``: state that differs on each rank (random streams);
- ``ds_efficient_shard_XXXXX.pt``: parts of a technique's state of which each is on one rank, by their names;
- ``ds_efficient_manifest.json``: layout and sizes of all files, so that a truncated one is recognised.

Until all that is on disk the folder is called ``<tag>.saving``: a folder under its own name is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_efficient.errors import CheckpointError

FORMAT = 1
MANIFEST = "ds_efficient_manifest.json"
LATEST = "latest"
SAVING = ".saving"
REPLACED = ".replaced"


def check_plain(value: Any, where: str = "state") -> None:
    """Raise TypeError unless `value` is made of tensors and plain values only.

    Args:
        value: nested dicts, lists, tuples of tensors, numbers, strings, booleans, None.
        where: path for the message.
    """
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"{where}: key {key!r} is neither a string nor an integer")
            check_plain(item, f"{where}.{key}")
        return
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
        return
    raise TypeError(f"{where}: {type(value).__name__} is neither a tensor nor a plain value")


def write_atomic(path: Path, write: Any) -> None:
    """Call ``write(temporary path)`` and rename; a killed process leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def save_tensors(path: Path, payload: Mapping[str, Any]) -> None:
    """Save tensors and plain values so that ``torch.load(weights_only=True)`` reads them.

    Raises:
        CheckpointError: the file cannot be written.
    """
    check_plain(payload)
    try:
        write_atomic(path, lambda target: torch.save({"format": FORMAT, **payload}, target))
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
        raise CheckpointError(f"{path}: cannot be written ({_first_line(error)})") from error


def load_tensors(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Read what `save_tensors` wrote.

    Args:
        path: of the file.
        lazily: leave tensors in the file until they are used.

    Raises:
        CheckpointError: missing, truncated or of another format.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing; the checkpoint is not complete or was made on another layout"
        )
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily or None)
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read ({_first_line(error)}); use an earlier checkpoint"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path}: unknown format; this version reads format {FORMAT}")
    return payload


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is cut."""

    world_size: int
    data_parallel_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    zero_stage: int

    def problems(
        self, saved: Mapping[str, Any], *, universal: bool = False, weights_only: bool = False
    ) -> list[str]:
        """Say why a checkpoint with layout `saved` cannot be loaded here; empty when it can.

        Args:
            saved: layout of the checkpoint.
            universal: the checkpoint is DeepSpeed's universal one, which fits every layout.
            weights_only: no optimizer state is wanted. ZeRO's stages 0 to 2 keep the weights whole, so that
                only stage 3 must be the same then.
        """
        problems = []
        partitioned = 3 if weights_only else 1
        for name, flag in (
            ("tensor_parallel_size", "--tensor-model-parallel-size"),
            ("pipeline_parallel_size", "--pipeline-model-parallel-size"),
        ):
            if saved.get(name) != getattr(self, name) and not universal:
                problems.append(f"saved with {flag} {saved.get(name)}, this run has {getattr(self, name)}")
        stages = {saved.get("zero_stage"), self.zero_stage}
        if len(stages) > 1 and not universal and (3 in stages or not weights_only):
            problems.append(
                f"saved with zero_optimization.stage {saved.get('zero_stage')}, "
                f"this run has {self.zero_stage}"
            )
        if (
            self.zero_stage >= partitioned
            and saved.get("data_parallel_size") != self.data_parallel_size
            and not universal
        ):
            problems.append(
                f"saved on {saved.get('data_parallel_size')} data-parallel ranks, this run has "
                f"{self.data_parallel_size}: ZeRO's partitions do not fit"
            )
        return problems


def write_manifest(folder: Path, layout: Layout, extra: Mapping[str, Any]) -> None:
    """Record the layout and the size of every file in the checkpoint folder."""
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST}
    content = {"format": FORMAT, "layout": vars(layout), "files": files, **extra}
    write_atomic(folder / MANIFEST, lambda target: target.write_text(json.dumps(content, indent=1)))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest, or None for a checkpoint made without this package."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); use an earlier checkpoint") from error
    return content if isinstance(content, dict) else None


def check_files(folder: Path, manifest: Mapping[str, Any], *, flag: str = "--ckpt-step") -> None:
    """Raise CheckpointError naming every file that is missing or has another size than when saved.

    Args:
        folder: of the checkpoint.
        manifest: its content.
        flag: argument that names another checkpoint, for the message.
    """
    problems = []
    for name, size in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size} bytes, was {size} when saved")
    if problems:
        raise CheckpointError(
            f"{folder}: the checkpoint is damaged; nothing was loaded. Name an earlier one by {flag}, "
            "or restore the files:\n  " + "\n  ".join(problems) + f"\n  {others(folder.parent)[2:]}"
        )


def latest_tag(save_dir: Path, *, flag: str = "--ckpt-step") -> str | None:
    """Return the tag in the file ``latest``, None where there is no checkpoint.

    Args:
        save_dir: folder of the checkpoints.
        flag: argument that names another checkpoint, for messages.
    """
    path = save_dir / LATEST
    if not path.is_file():
        return None
    tag = path.read_text(errors="replace").strip()
    if not tag:
        raise CheckpointError(f"{path}: empty; name a checkpoint by {flag}{others(save_dir)}")
    if not (save_dir / tag).is_dir():
        raise CheckpointError(
            f"{path}: names {tag!r}, but {save_dir / tag} does not exist; name one by {flag}"
            f"{others(save_dir)}"
        )
    return tag


def whole_tags(save_dir: Path) -> list[str]:
    """Return the tags of the checkpoints in a folder that were saved to their end, by their number."""
    found = [
        path.parent.name
        for path in save_dir.glob(f"*/{MANIFEST}")
        if not path.parent.name.endswith((SAVING, REPLACED))
    ]
    return sorted(found, key=lambda tag: ([int(number) for number in re.findall(r"\d+", tag)], tag))


def others(save_dir: Path) -> str:
    """Return a list of the whole checkpoints in a folder for the end of a message."""
    found = whole_tags(save_dir)
    return f". There: {', '.join(found)}" if found else ". The folder holds no whole checkpoint"


def begin_saving(folder: Path) -> Path:
    """Return the empty folder that a checkpoint is written to before it gets its name `folder`."""
    staging = folder.with_name(folder.name + SAVING)
    if staging.exists():  # an earlier save was interrupted
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, folder: Path) -> None:
    """Give the finished checkpoint its name, in place of an older one of the same name."""
    replaced = folder.with_name(folder.name + REPLACED)
    if replaced.exists():
        shutil.rmtree(replaced)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(staging, folder)
    if replaced.exists():
        shutil.rmtree(replaced)
