"""What was measured about cuSPARSELt on this machine, kept from run to run in one JSON file.

The file is ``cusparselt_tuning.json`` beside the compiled kernels (in ``ds_efficient`` below
``$TORCH_EXTENSIONS_DIR``, else below ``torch_extensions`` in the user's cache folder). The environment
variable ``DS_EFFICIENT_TUNING_CACHE`` names another file. Entries are keyed by GPU name, library version,
shape and dtype, so that machines can share a file. Deleting it costs a new measurement, nothing else.

Writers merge with what is on disk and replace the file in one step, so readers never see half a file. A file
that cannot be read or written is left alone: one warning, and the run goes on without it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_efficient.op_builder import toolchain
from ds_efficient.ops import cusparselt_library as lt
from ds_efficient.ops.cusparselt_plans import Algorithm, PlanShape

logger = logging.getLogger(__name__)

VARIABLE = "DS_EFFICIENT_TUNING_CACHE"
FORMAT = 1
_LOCK_SECONDS = 5.0

Entry = dict[str, Any]


def cache_path() -> Path:
    """The file."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    return toolchain.extensions_root() / "ds_efficient" / "cusparselt_tuning.json"


class TuningCache:
    """Entries in memory, read from the file on first use and written to it when something is added.

    Args:
        path: the file, or None for `cache_path` at the time of first use.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._entries: dict[str, Entry] = {}
        self._state = "unread"  # then "usable", or "ignored" after the first problem
        self._lock = threading.RLock()

    def get(self, key: str) -> Entry | None:
        """The entry of a key, or None."""
        with self._lock:
            self._read_once()
            return self._entries.get(key)

    def put(self, entries: Mapping[str, Entry]) -> None:
        """Add or replace entries, in memory and in the file."""
        with self._lock:
            self._read_once()
            self._entries.update(entries)
            if self._state != "usable":
                return
            try:
                self._write()
            except (OSError, ValueError) as error:
                self._ignore(error)

    def forget(self, key: str) -> None:
        """Drop an entry from memory; the next `put` of the key replaces it in the file."""
        with self._lock:
            self._read_once()
            self._entries.pop(key, None)

    def _read_once(self) -> None:
        if self._state != "unread":
            return
        self._state = "usable"
        try:
            self._path = self._path or cache_path()
            self._entries = {**self._on_disk(), **self._entries}
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: "~" and no home folder
            self._ignore(error)

    def _ignore(self, error: Exception) -> None:
        self._state = "ignored"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        logger.warning(
            "the file of measured cuSPARSELt plans, %s, is not used (%s); shapes are measured again in each "
            "run until it is deleted or made readable and writable, or %s names another file",
            self._path,
            reason,
            VARIABLE,
        )

    def _on_disk(self) -> dict[str, Entry]:
        """Entries of the file; none where there is no file. Raises ValueError where it is not ours."""
        assert self._path is not None
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"it has not the format {FORMAT} of this version")
        entries = content.get("entries")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError('its "entries" are no objects')
        return entries

    def _write(self) -> None:
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._other_writers_wait():
            merged = {**self._on_disk(), **self._entries}
            handle, name = tempfile.mkstemp(prefix=self._path.name, suffix=".tmp", dir=self._path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({"format": FORMAT, "entries": merged}, file, indent=1, sort_keys=True)
                os.chmod(name, 0o644)
                os.replace(name, self._path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _other_writers_wait(self) -> Iterator[None]:
        """Hold a lock between reading and replacing, so that no writer's entries get lost.

        A lock that cannot be had in a few seconds (or at all, on some network file systems) is done without:
        what may get lost is a measurement.
        """
        assert self._path is not None
        with open(self._path.with_name(self._path.name + ".lock"), "a", encoding="utf-8") as file:
            end = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        break
                    time.sleep(0.01)
                except OSError:
                    break
            yield


cache = TuningCache()


class Tuned(NamedTuple):
    """What is known of a layer's shape: how to run it sparse, and how that compares with the dense product.

    Attributes:
        tiles, token_splits: of the fastest sparse way.
        milliseconds, dense_milliseconds: measured times.
    """

    tiles: int
    token_splits: int
    milliseconds: float
    dense_milliseconds: float


def algorithm_key(shape: PlanShape) -> str:
    """Key of a plan's algorithm in the cache."""
    return f"{_machine(shape.device)} | algorithm | {shape.text}"


def choice_key(rows: int, k: int, tokens: int, dtype: torch.dtype, device: int) -> str:
    """Key of a `Tuned` in the cache."""
    name = str(dtype).removeprefix("torch.")
    return f"{_machine(device)} | choice | {rows}x{k} tokens {tokens} {name}"


@functools.cache
def _machine(device: int) -> str:
    return f"{gpu_name(device)} | cuSPARSELt {lt.load().version_text}"


def gpu_name(device: int) -> str:
    """Name of a CUDA device."""
    return torch.cuda.get_device_name(device)


def kept_algorithm(shape: PlanShape) -> Algorithm | None:
    """The algorithm that an earlier search, perhaps of another run, found for a plan."""
    entry = cache.get(algorithm_key(shape))
    if entry is None:
        return None
    numbers = [entry.get(name) for name in Algorithm._fields]
    if not all(isinstance(number, int) for number in numbers):
        return None
    return Algorithm(*numbers)  # type: ignore[arg-type]


def kept_choice(key: str) -> Tuned | None:
    """The entry of a `choice_key`."""
    entry = cache.get(key)
    if entry is None:
        return None
    try:
        return Tuned(
            int(entry["tiles"]),
            int(entry["token_splits"]),
            float(entry["milliseconds"]),
            float(entry["dense_milliseconds"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
