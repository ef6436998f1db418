"""Files of an exported model: safetensors in parts, an index of them, and ``slope.json``.

A sparse layer ``<name>`` has ``<name>.weight.values``, the compact weight (out, in * N / M) with the kept
values of each output in ascending input order, and ``<name>.weight.mask``, packed to bits: uint8
(out, 4 * ceil(in / 32)), bit j of byte b is input 8 b + j, bits beyond the inputs are 0. An active adapter
adds ``<name>.adapter_down`` R (rank, in) and ``<name>.adapter_up`` L (out, rank):
y = x W^T + (x R^T) L^T + bias.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_efficient.errors import UserError

FORMAT_VERSION = 1
DESCRIPTION = "slope.json"
VALUES, MASK = ".weight.values", ".weight.mask"
DOWN, UP = ".adapter_down", ".adapter_up"
# transformers looks for "model": what it can load alone has that name, and nothing else.
DENSE_FILES, SPARSE_FILES, ADAPTER_FILES = "model", "sparse", "adapters"
MAX_FILE_BYTES = 5 * 10**9


def require_safetensors() -> Any:
    """Return the package's torch interface.

    Raises:
        UserError: not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(
            f"safetensors cannot be imported ({error}); pip install 'ds_efficient[hf]'"
        ) from error
    return safetensors.torch


class PartWriter:
    """Writes tensors to ``<stem>.safetensors``, or in parts with an index, in the naming of transformers.

    Only the tensors of one part are in memory.

    Args:
        folder: written to.
        stem: of the file names.
        header: metadata of every file.
        max_bytes: a part begins anew before it grows beyond.
    """

    def __init__(
        self, folder: Path, stem: str, header: dict[str, str], max_bytes: int = MAX_FILE_BYTES
    ) -> None:
        self._folder, self._stem, self._header, self._max = folder, stem, header, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._patterns: dict[str, str] = {}
        self._bytes = 0
        self._parts: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor, pattern: str | None = None) -> None:
        """Add one tensor; `pattern` stands in the metadata of the file that it gets into."""
        if self._pending and self._bytes + tensor.nbytes > self._max:
            self._flush()
        # safetensors takes no two tensors that share memory
        self._pending[name] = tensor.detach().contiguous().clone()
        if pattern is not None:
            self._patterns[name] = pattern
        self._bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _flush(self) -> None:
        path = self._folder / f"{self._stem}-{len(self._parts) + 1:05d}"
        metadata = {"format": "pt", **self._header}
        if self._patterns:
            metadata["patterns"] = json.dumps(self._patterns)
        require_safetensors().save_file(self._pending, path, metadata=metadata)
        self._parts.append(list(self._pending))
        self._pending, self._patterns, self._bytes = {}, {}, 0

    def finish(self) -> list[str]:
        """Write what is left, name the parts, write the index; return the files' names."""
        if self._pending:
            self._flush()
        count = len(self._parts)
        index: dict[str, str] = {}
        names = []
        for number, tensors in enumerate(self._parts, start=1):
            part = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
            name = f"{self._stem}{part}.safetensors"
            (self._folder / f"{self._stem}-{number:05d}").rename(self._folder / name)
            names.append(name)
            index.update(dict.fromkeys(tensors, name))
        if count > 1:
            content = {"metadata": {"total_size": self.total_bytes}, "weight_map": index}
            write_json(self._folder / f"{self._stem}.safetensors.index.json", content)
        return names


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write with indentation and a final line end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of ``slope.json``.

    Raises:
        UserError: not there, not readable, or of a newer format.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(
            f"{folder}: has no {DESCRIPTION}: it is no sparse export; a dense one is loaded by "
            "transformers' from_pretrained"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, layers = int(content["format_version"]), content["layers"]
        if not isinstance(layers, dict) or not all(isinstance(name, str) for name in content["files"]):
            raise TypeError("layers or files are of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); export again") from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version}; this package reads up to {FORMAT_VERSION}; "
            "install a newer ds_efficient"
        )
    return content
