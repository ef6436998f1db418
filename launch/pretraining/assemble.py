"""The output of prepare_data.py: who may write it, and how finished parts become the dataset.

The final names appear at the very end, the sidecar last: a dataset of ours with a sidecar is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from ds_efficient.errors import UserError
from pretraining.indexed_file import token_dtype, with_suffix, write_index
from pretraining.prepare import part_path, read_part
from pretraining.text_input import Input
from pretraining.tokenizers import Tokenizer

FORMAT = 1
_SHOWN_BAD_LINES = 10


class Output:
    """Names of the output, its lock, and the manifest that ties parts to arguments.

    Args:
        prefix: as given on the command line.
        arguments: JSON values that decide the result: inputs, tokenizer, options.
    """

    def __init__(self, prefix: str, arguments: dict[str, Any]) -> None:
        self.name = f"{prefix}_text_document"
        self.arguments = arguments
        self.parts = with_suffix(self.name, ".parts")
        self.sidecar = with_suffix(self.name, ".json")
        self.rejected = with_suffix(self.name, ".rejected.jsonl")
        self._manifest = self.parts / "manifest.json"
        self._merging = self.parts / "merging"
        self._lock: BinaryIO | None = None

    def open(self, overwrite: bool) -> bool:
        """Take the output for this run.

        Returns:
            False when this very dataset is complete already, so that nothing is left to do.

        Raises:
            UserError: another run has it, or it holds other data and ``overwrite`` is not set.
        """
        if self.sidecar.exists() and not overwrite:
            if self._finished_arguments() != self.arguments:
                raise UserError(
                    f"--output-prefix: {self.sidecar} exists, made with other arguments or inputs "
                    f"({_differences(self._finished_arguments(), self.arguments)}); choose another prefix "
                    "or add "
                    "--overwrite"
                )
            if self.parts.exists():  # killed between the last two steps
                self._take_lock()
                self._remove_parts()
            return False
        existing = [path for path in map(self._final, (".bin", ".idx")) if path.exists()]
        if existing and not overwrite and not self._merging.exists():
            raise UserError(
                f"--output-prefix: {existing[0]} exists; choose another prefix or add --overwrite"
            )
        self.parts.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._check_manifest(overwrite)
        return True

    def publish(self, temporary: dict[str, Path]) -> None:
        """Give the files their final names; ``.json`` last. Interrupted, the next run does it again."""
        self._merging.touch()
        self.sidecar.unlink(missing_ok=True)
        if ".rejected.jsonl" not in temporary:
            self.rejected.unlink(missing_ok=True)
        for suffix in (".bin", ".idx", ".rejected.jsonl", ".json"):
            if suffix in temporary:
                os.replace(temporary[suffix], self._final(suffix))
        self._remove_parts()

    def discard(self) -> None:
        """Remove the parts; the inputs hold everything."""
        self._remove_parts()

    def _final(self, suffix: str) -> Path:
        return with_suffix(self.name, suffix)

    def _finished_arguments(self) -> Any:
        try:
            return json.loads(self.sidecar.read_text())["arguments"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _take_lock(self) -> None:
        self._lock = open(self.parts / "lock", "wb")
        try:
            # A record lock: it ends with this process and is not inherited by the workers.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--output-prefix: another prepare_data.py is writing to {self.parts}") from None

    def _check_manifest(self, overwrite: bool) -> None:
        try:
            previous = json.loads(self._manifest.read_text())
        except FileNotFoundError:
            previous = None
        except ValueError:
            previous = {}
        if previous is not None and previous != self.arguments:
            if not overwrite:
                raise UserError(
                    f"--output-prefix: {self.parts} holds parts of an unfinished run with other arguments "
                    "or inputs "
                    f"({_differences(previous, self.arguments)}); repeat that run, choose another prefix, "
                    "or add "
                    "--overwrite to drop them"
                )
            for path in self.parts.iterdir():
                if path.name != "lock":
                    path.unlink()
        for path in self.parts.glob("*.tmp"):
            path.unlink()
        temporary = self.parts / "manifest.tmp"
        temporary.write_text(json.dumps(self.arguments))
        os.replace(temporary, self._manifest)

    def _remove_parts(self) -> None:
        shutil.rmtree(self.parts, ignore_errors=True)


def _differences(before: Any, now: dict[str, Any]) -> str:
    if not isinstance(before, dict):
        return "they cannot be read"
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return "different: " + ", ".join(keys)


def run_arguments(
    tokenizer: Tokenizer,
    inputs: list[Input],
    *,
    append_eod: bool,
    json_key: str,
    text_document: str,
    block_bytes: int,
) -> dict[str, Any]:
    """Return everything that decides the result, as JSON values."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.identity(),
        "append_eod": append_eod,
        "json_key": json_key,
        "text_document": text_document,
        "block_bytes": block_bytes,
        "inputs": [{"path": item.path, "bytes": item.size, "mtime_ns": item.mtime_ns} for item in inputs],
    }


@dataclass
class Summary:
    """Totals of a dataset; ``first_bad`` are lines for the screen."""

    facts: dict[str, Any]
    first_bad: list[str]


def assemble(output: Output, tokenizer: Tokenizer, num_inputs: int) -> Summary:
    """Concatenate all parts and publish the dataset.

    Raises:
        UserError: no document was left.
    """
    parts = list(_parts(output.parts, num_inputs))
    facts = {
        "documents": sum(part["documents"] for _, _, part in parts),
        "tokens": sum(part["tokens"] for _, _, part in parts),
        "text_bytes": sum(part["text_bytes"] for _, _, part in parts),
        "empty_documents": sum(part["empty"] for _, _, part in parts),
        "bad_lines": sum(part["rejected"] for _, _, part in parts),
        "max_token": max(part["max_token"] for _, _, part in parts),
    }
    if facts["documents"] == 0:
        reasons = [reason for _, _, part in parts for reason in part["reasons"]][:_SHOWN_BAD_LINES]
        output.discard()
        raise UserError(
            f"no document was left: {facts['bad_lines']} bad lines, {facts['empty_documents']} empty "
            "documents; "
            "nothing was written" + "".join(f"\n  {reason}" for reason in reasons)
        )
    temporary: dict[str, Path] = {}

    def write(suffix: str, fill: Callable[[BinaryIO], Any]) -> Any:
        temporary[suffix] = with_suffix(output.parts / "final", suffix + ".tmp")
        with open(temporary[suffix], "wb") as stream:
            result = fill(stream)
            stream.flush()
            os.fsync(stream.fileno())
        return result

    dtype = token_dtype(tokenizer.vocab_size)
    facts["bin_sha256"] = write(".bin", lambda stream: _concatenate(stream, output.parts, parts))
    write(".idx", lambda stream: write_index(stream, dtype, _Lengths(output.parts, parts)))
    shown: list[str] = []
    if facts["bad_lines"]:
        write(".rejected.jsonl", lambda stream: shown.extend(_rejected(stream, output.parts, parts)))
    sidecar = {"tokenizer": tokenizer.identity(), "dtype": dtype.name, **facts, "arguments": output.arguments}
    write(".json", lambda stream: stream.write(json.dumps(sidecar, indent=1).encode("utf-8") + b"\n"))
    output.publish(temporary)
    return Summary(facts, shown)


def _parts(folder: Path, num_inputs: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for source in range(num_inputs):
        number, last = 0, False
        while not last:
            facts = read_part(folder, source, number)
            if facts is None:
                raise UserError(f"{folder}: part {number} of input {source} vanished; run again")
            yield source, number, facts
            number, last = number + 1, facts["last"]


class _Lengths:
    """The lengths of all documents, read part by part as often as they are iterated."""

    def __init__(self, folder: Path, parts: list[tuple[int, int, dict[str, Any]]]) -> None:
        self._paths = [part_path(folder, source, number, ".lengths") for source, number, _ in parts]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.fromfile(path, np.int32) for path in self._paths)


def _concatenate(stream: BinaryIO, folder: Path, parts: list[tuple[int, int, dict[str, Any]]]) -> str:
    digest = hashlib.sha256()
    total = sum(part["bin_bytes"] for _, _, part in parts)
    with tqdm(total=total, unit="B", unit_scale=True, desc="concatenate", mininterval=0.5) as progress:
        for source, number, _ in parts:
            with open(part_path(folder, source, number, ".bin"), "rb") as part:
                while block := part.read(1 << 22):
                    digest.update(block)
                    stream.write(block)
                    progress.update(len(block))
    return digest.hexdigest()


def _rejected(stream: BinaryIO, folder: Path, parts: list[tuple[int, int, dict[str, Any]]]) -> list[str]:
    """Write the list of bad lines with their number in the file; return the first ones for the screen."""
    shown: list[str] = []
    lines_before = 0
    for source, number, facts in parts:
        lines_before = 0 if number == 0 else lines_before
        if facts["rejected"]:
            with open(part_path(folder, source, number, ".rejected"), encoding="utf-8") as part:
                for line in part:
                    entry = json.loads(line)
                    entry["line"] += lines_before
                    stream.write(json.dumps(entry).encode("utf-8") + b"\n")
                    if len(shown) < _SHOWN_BAD_LINES:
                        shown.append(f"{entry['file']}:{entry['line']}: {entry['reason']}")
        lines_before += facts["newlines"]
    return shown
