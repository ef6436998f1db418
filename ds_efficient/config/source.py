"""Read the configuration from where DeepSpeed takes it: a path, a dict, or urlsafe base64 text."""

from __future__ import annotations

import base64
import binascii
import copy
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_efficient.config.problems import join, show
from ds_efficient.errors import ConfigError

_BASE64 = re.compile(r"[A-Za-z0-9_-]+={0,2}")


class _Object(dict[str, Any]):
    """A parsed object that remembers keys which stood in it more than once."""

    repeated: tuple[str, ...] = ()


def read_source(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the configuration as a dict of its own, and the name to call it in messages.

    Args:
        source: path of a JSON or HJSON file; or a dict; or the file's text in urlsafe base64, as DeepSpeed's
            launcher passes it on.

    Raises:
        ConfigError: it cannot be read, is empty, no JSON, no object, or has a key twice in one object.
    """
    if isinstance(source, Mapping):
        not_text = [key for key in source if not isinstance(key, str)]
        if not_text:
            raise ConfigError("config", [f"keys must be strings, not {not_text[0]!r}"])
        return copy.deepcopy(dict(source)), "config"
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise ConfigError("config", [f"must be a path, a dict or base64 text, not {kind}"])
    name = os.fspath(source)
    text = _decoded(name) if isinstance(source, str) and not os.path.exists(name) else None
    if text is not None:
        return _parse(text, "config (base64)"), "config (base64)"
    return _parse(_file_text(name), name), name


def _file_text(name: str) -> str:
    path = Path(name)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        shown = name if len(name) <= 200 else f"{name[:200]}..."
        raise ConfigError(shown, ["no such file; give the path of a DeepSpeed JSON file"]) from None
    except IsADirectoryError:
        raise ConfigError(name, ["is a directory; give the path of a JSON file in it"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(name, [f"is not UTF-8 text (byte {error.start})"]) from None
    except (OSError, ValueError) as error:  # no permission, name too long, null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(name[:200], [f"cannot be read: {reason}"]) from None


def _decoded(text: str) -> str | None:
    """Return the text behind urlsafe base64, or None where it is something else."""
    if _BASE64.fullmatch(text) is None:
        return None
    try:
        decoded = base64.urlsafe_b64decode(text).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _parse(text: str, name: str) -> dict[str, Any]:
    import hjson

    if not text.strip():
        raise ConfigError(name, ['is empty; the smallest configuration is {"train_batch_size": 1}'])
    try:
        parsed = hjson.loads(text, object_pairs_hook=_object)
    except hjson.HjsonDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(name, [f"is not valid JSON: {error.msg} ({where})"]) from None
    except RecursionError:
        raise ConfigError(name, ["is nested too deeply"]) from None
    if not isinstance(parsed, dict):
        raise ConfigError(name, [f"must hold one JSON object {{...}}, not {show(parsed)}"])
    repeated = [
        f"{join(path)}: stands more than once in the same object; keep one{_lines(text, path[-1])}"
        for path in _repeated(parsed, ())
    ]
    if repeated:
        raise ConfigError(name, repeated)
    return _plain(parsed)


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object(pairs)
    if len(result) < len(pairs):
        names = [key for key, _ in pairs]
        result.repeated = tuple(key for key in result if names.count(key) > 1)
    return result


def _repeated(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _repeated(item, (*path, index))
    elif isinstance(value, dict):
        for key in getattr(value, "repeated", ()):
            yield (*path, key)
        for key, item in value.items():
            yield from _repeated(item, (*path, key))


def _lines(text: str, key: str | int) -> str:
    """Say on which lines a key is set; keys of the same name elsewhere in the file are listed too."""
    pattern = re.compile(rf"(?<![\w-])[\"']?{re.escape(str(key))}[\"']?\s*:")
    numbers = [str(number) for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    return f" (lines {', '.join(numbers)})" if len(numbers) > 1 else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
