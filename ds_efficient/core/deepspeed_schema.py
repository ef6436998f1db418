"""The keys that the installed DeepSpeed accepts, read from DeepSpeed itself.

Importing DeepSpeed takes seconds, so validation uses the table `ds_efficient.config.deepspeed_keys`, which
this module prints (``python -m ds_efficient.core.deepspeed_schema``) and a test compares with the installed
version. Only an installation of another version than the table's is asked directly, and only about a key in
doubt.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pprint
import typing
from collections.abc import Container, Iterator
from enum import Enum
from typing import Any

from pydantic import BaseModel

# Sections that DeepSpeed parses with a model that refuses unknown keys: path -> "module:class".
_CLOSED = {
    "bf16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "bfloat16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "comet": "deepspeed.monitor.config:CometConfig",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "compile": "deepspeed.compile.config:CompileConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "fp16": "deepspeed.runtime.precision_config:DeepSpeedFP16Config",
    "hybrid_engine": "deepspeed.runtime.config:HybridEngineConfig",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "timers.throughput": "deepspeed.utils.config:DeepSpeedThroughputTimerConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
}


def installed_version() -> str | None:
    """Version of the installed DeepSpeed without importing it; None when there is none."""
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None


def closed_sections() -> dict[str, dict[str, str]]:
    """Return, for each section that refuses unknown keys, its keys with their JSON types.

    A type is ``boolean``, ``integer``, ``number``, ``string``, ``array``, ``object`` or ``any``, with ``?``
    appended where null is allowed.
    """
    found: dict[str, dict[str, str]] = {}
    for path, reference in _CLOSED.items():
        module, _, name = reference.partition(":")
        _collect(path, getattr(importlib.import_module(module), name), found)
    return dict(sorted(found.items()))


def removed_keys() -> tuple[set[str], set[str]]:
    """Return the keys refused by mere presence: at top level, and in ``zero_optimization``."""
    module = importlib.import_module("deepspeed.runtime.config")
    top = getattr(module, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    zero = getattr(module, "_REMOVED_ZERO_CONFIG_KEYS", {})
    return set(top), set(zero)


def top_level_keys() -> set[str]:
    """Return the top-level keys that DeepSpeed looks up while it parses a configuration.

    DeepSpeed keeps no list of them, so it is given a dict that writes down every key it is asked for.
    """
    module = importlib.import_module("deepspeed.runtime.config")
    asked: set[str] = set()
    module.DeepSpeedConfig(_Recorder(asked, {"train_batch_size": 1, "timers": {}}))
    return asked - removed_keys()[0]


class _Recorder(dict[str, Any]):
    """A dict that records the keys looked up, absent ones included."""

    def __init__(self, asked: set[str], content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked = asked

    def __copy__(self) -> _Recorder:
        return _Recorder(self.asked, dict(self))

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return _RecordedKeys(self)


class _RecordedKeys:
    """The view that ``key in config.keys()`` asks."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder: Container[str] = recorder
        self._plain = list(dict.keys(recorder))

    def __contains__(self, key: str) -> bool:
        return key in self._recorder

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)


def _collect(path: str, model: type[BaseModel], found: dict[str, dict[str, str]]) -> None:
    if model.model_config.get("extra") != "forbid":
        return
    keys: dict[str, str] = {}
    for name, field in model.model_fields.items():
        kind, nested = _json_type(field.annotation)
        keys[name] = kind
        if field.alias:
            keys[field.alias] = kind
        if nested is not None:
            _collect(f"{path}.{name}", nested, found)
    found[path] = dict(sorted(keys.items()))


def _json_type(annotation: Any) -> tuple[str, type[BaseModel] | None]:
    """Return the JSON type of a field and, for an object with a model of its own, that model."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if type(None) in arguments:
        rest = [one for one in arguments if one is not type(None)]
        if len(rest) != 1:
            return "any", None
        kind, nested = _json_type(rest[0])
        return kind if kind == "any" else f"{kind}?", nested
    if origin is typing.Literal:
        return ("string" if all(isinstance(one, str) for one in arguments) else "any"), None
    base = origin or annotation
    if not isinstance(base, type):
        return "any", None
    if issubclass(base, BaseModel):
        return "object", base
    for kind, types in _JSON_TYPES:
        if issubclass(base, types):
            return kind, None
    return "any", None


# bool before int, and enumerations of int (the ZeRO stage) count as int. A path is not a JSON type: a string.
_JSON_TYPES: tuple[tuple[str, type | tuple[type, ...]], ...] = (
    ("boolean", bool),
    ("integer", int),
    ("number", float),
    ("string", str),
    ("any", Enum),
    ("array", (list, tuple, set)),
    ("object", dict),
)


def render_table() -> str:
    """Return the source of `ds_efficient.config.deepspeed_keys` for the installed DeepSpeed."""
    parts = [
        '"""Keys of DeepSpeed\'s own configuration; generated, do not edit.\n\n'
        "Written by ``python -m ds_efficient.core.deepspeed_schema``; a test compares it with the installed\n"
        'DeepSpeed. Types: see `ds_efficient.core.deepspeed_schema.closed_sections`.\n"""\n\n'
        "from __future__ import annotations\n",
        f"VERSION = {installed_version()!r}\n",
        f"TOP_LEVEL: tuple[str, ...] = {pprint.pformat(tuple(sorted(top_level_keys())))}\n",
        f"CLOSED: dict[str, dict[str, str]] = {pprint.pformat(closed_sections(), width=100)}\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    print(render_table(), end="")
