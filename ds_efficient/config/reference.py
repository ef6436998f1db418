"""The configuration reference of the documentation, made of the models themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic.fields import FieldInfo

from ds_efficient.config.base import Section
from ds_efficient.config.efficiency import GENERAL, GeneralConfig
from ds_efficient.config.problems import join
from ds_efficient.config.sections import expected, section_of
from ds_efficient.registry import TECHNIQUES, TechniqueRow, resolve

_INTRODUCTION = """\
# Configuration reference

Every technique is a section of the DeepSpeed JSON. A section that is absent, or whose `enabled` is false, is
off. Unknown keys, values out of range and contradictions are reported all at once by `ds_efficient validate`
and before any training starts. All other sections are DeepSpeed's own.
"""


def render_reference(rows: Sequence[TechniqueRow] = TECHNIQUES) -> str:
    """Return Markdown with every section: its keys, their values, defaults and meaning."""
    parts = [_INTRODUCTION]
    parts += _section(GeneralConfig, (GENERAL,), 2, "the run as a whole")
    for row in rows:
        parts += _section(resolve(row.config), row.path, 2, row.title)
    return "\n".join(parts)


def _section(model: type[Section], path: Sequence[str | int], level: int, title: str = "") -> Iterator[str]:
    heading = f"{'#' * level} `{join(path)}`"
    yield f"{heading}: {title}\n" if title else f"{heading}\n"
    yield f"{_one_line(model.__doc__ or '')}\n"
    yield "| key | values | default | meaning |\n| --- | --- | --- | --- |"
    inner: list[tuple[type[Section], tuple[str | int, ...]]] = []
    for key, field in model.model_fields.items():
        yield _row(model, key, field)
        nested = section_of(field.annotation)
        if nested is not None:
            listed = not isinstance(field.default, Section)
            inner.append((nested, (*path, key, 0) if listed else (*path, key)))
    yield ""
    for rule in model.rules:
        yield f"- {_one_line(rule.check.__doc__ or '')}{' (A warning.)' if rule.warning else ''}"
    if model.rules:
        yield ""
    for nested, where in inner:
        yield from _section(nested, where, level + 1)


def _row(model: type[Section], key: str, field: FieldInfo) -> str:
    cells = (f"`{key}`", expected(model, key), _default(field), field.description or "")
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        return "see below"
    value: Any = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
