"""How a problem with a configuration is worded: path, value, what is allowed, did-you-mean."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SHOWN = 60
MAX_LISTED = 16
AUTO = "auto"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: dotted path of the key (``slope.adapter.rank``), empty for the file as a whole.
        text: what is wrong and what to write instead.
        unknown: whether the key itself is not known; such problems come first, since a misspelt key also
            explains others.
    """

    path: str
    text: str
    unknown: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.path else self.text


def in_order(problems: Iterable[Problem]) -> list[str]:
    """Return the problems as lines without repetition, unknown keys first."""
    ordered = sorted(problems, key=lambda problem: not problem.unknown)
    return list(dict.fromkeys(map(str, ordered)))


def show(value: Any) -> str:
    """Return a value as it stands in JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    if not text.isprintable():
        text = ascii(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def join(path: Sequence[str | int]) -> str:
    """Return ``a.b[0].c`` for ``("a", "b", 0, "c")``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part.isprintable() else show(part)
            text += f".{name}" if text else name
    return text


def closest(key: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed key that `key` most likely means, or None."""
    names = {name.lower(): name for name in allowed}
    cutoff = 0.65 if len(key) <= 4 else 0.75
    found = difflib.get_close_matches(key.lower(), names, n=1, cutoff=cutoff)
    return names[found[0]] if found else None


def unknown_key(path: Sequence[str | int], allowed: Iterable[str]) -> Problem:
    """Return the problem of a key that a section does not have."""
    names = sorted(allowed)
    meant = closest(str(path[-1]), names)
    question = f' did you mean "{meant}"?' if meant else ""
    listed = ", ".join(names)
    if meant and len(names) > MAX_LISTED:
        near = difflib.get_close_matches(str(path[-1]), names, n=MAX_LISTED, cutoff=0.4)
        listed = f"{', '.join(near or [meant])} and {len(names) - len(near or [meant])} more"
    return Problem(join(path), f"unknown key;{question} allowed here: {listed}", unknown=True)


def not_allowed(path: Sequence[str | int], value: Any, expected: str) -> Problem:
    """Return the problem of a value that a key does not take."""
    return Problem(join(path), f"{show(value)} is not allowed; expected {expected}")


def no_automatic_value(path: Sequence[str | int], expected: str, default: str | None = None) -> Problem:
    """Return the problem of ``"auto"`` where nothing can work the value out."""
    known = f" (default {default})" if default is not None else ""
    return Problem(join(path), f'"auto" has no meaning here; write {expected}{known}, or leave the key out')


def describe(schema: Mapping[str, Any]) -> str:
    """Say in words which values a JSON schema allows."""
    if "enum" in schema or "const" in schema:
        return _alternatives([show(one) for one in schema.get("enum", [schema.get("const")])])
    if "anyOf" in schema:
        return _alternatives([describe(one) for one in schema["anyOf"]])
    kind = schema.get("type")
    if isinstance(kind, list):
        return _alternatives([describe({**schema, "type": one}) for one in kind])
    if kind == "string":
        return "a non-empty string" if schema.get("minLength") else "a string"
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _bounds(schema)
    return _PLAIN.get(str(kind), "an object {...}")


_PLAIN = {"boolean": "true or false", "null": "null", "array": "a list [...]"}


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
    limits = [f"{sign} {schema[name]:g}" for name, sign in signs if name in schema]
    return f" {' and '.join(limits)}" if limits else ""


def _alternatives(texts: Sequence[str]) -> str:
    unique = list(dict.fromkeys(texts))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"
