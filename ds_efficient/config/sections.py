"""Check one section of the configuration against its model and report everything that is wrong with it."""

from __future__ import annotations

import copy
import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ds_efficient.config.base import SKIP_RULES, Expected, Section
from ds_efficient.config.problems import (
    AUTO,
    Problem,
    describe,
    join,
    no_automatic_value,
    not_allowed,
    show,
    unknown_key,
)

SectionT = TypeVar("SectionT", bound=Section)
Path = tuple[str | int, ...]


def check_section(
    model: type[SectionT], data: Any, path: Sequence[str]
) -> tuple[SectionT | None, list[Problem], list[str]]:
    """Validate a section of the JSON.

    Args:
        model: class of the section.
        data: what stands in the JSON at `path`.
        path: keys that lead to it.

    Returns:
        The section, or None where there are problems; the problems; the warnings. Rules that join keys are
        checked too wherever the keys they read are right.
    """
    base: Path = tuple(path)
    if not isinstance(data, Mapping):
        return None, [not_allowed(base, data, "an object {...}")], []
    rest = copy.deepcopy(dict(data))
    problems: list[Problem] = []
    bad: set[Path] = set()
    for where, field, owner in list(_autos(model, rest, ())):
        plain = (
            field.default is not None and not field.is_required() and not isinstance(field.default, Section)
        )
        default = show(field.default) if plain else None
        problems.append(no_automatic_value(base + where, expected(owner, str(where[-1])), default))
        bad.add(_drop(rest, where))
    section: SectionT | None = None
    while section is None:
        try:
            section = model.model_validate(rest, context={SKIP_RULES: True})
        except ValidationError as error:
            found: dict[tuple[Path, type[Section]], Any] = {}
            for item in error.errors(include_url=False):
                found.setdefault(_locate(model, item["loc"]), item)
            problems += [_worded(base, where, owner, item, rest) for (where, owner), item in found.items()]
            gone = {_drop(rest, where) for where, _ in found}
            if gone <= bad:  # a required key is missing: there is no section to check rules on
                return None, problems, []
            bad |= gone
    warnings: list[str] = []
    for where, one, message in _broken(section, ()):
        keys = [(*where, *key.split(".")) for key in one.keys]
        if any(_touches(key, other) for key in keys for other in bad):
            continue
        problem = Problem(join((*base, *where, one.keys[0])), message)
        if one.warning:
            warnings.append(str(problem))
        else:
            problems.append(problem)
    return (None if problems else section), problems, warnings


def expected(model: type[Section], key: str) -> str:
    """Say in words which values a key of a section takes."""
    field = model.model_fields[key]
    for note in (*field.metadata, *_inner_metadata(field.annotation)):
        if isinstance(note, Expected):
            nullable = type(None) in typing.get_args(field.annotation)
            return f"{note.text} or null" if nullable else note.text
    return describe(_properties(model)[key])


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section class of a field that holds a section, or a list of them; else None."""
    for one in (annotation, *typing.get_args(annotation)):
        if isinstance(one, type) and issubclass(one, Section):
            return one
    return None


@functools.cache
def _properties(model: type[Section]) -> dict[str, Any]:
    return model.model_json_schema()["properties"]


def _inner_metadata(annotation: Any) -> Iterator[Any]:
    for argument in typing.get_args(annotation):
        yield from getattr(argument, "__metadata__", ())


def _autos(model: type[Section], data: Any, where: Path) -> Iterator[tuple[Path, FieldInfo, type[Section]]]:
    """Find each ``"auto"`` at a key that does not list it among its values."""
    if not isinstance(data, Mapping):
        return
    for key, value in data.items():
        field = model.model_fields.get(key)
        if field is None:
            continue
        inner = section_of(field.annotation)
        if value == AUTO or (inner is None and isinstance(value, list) and AUTO in value):
            if not _lists(_properties(model)[key], AUTO):
                yield (*where, key), field, model
        elif inner is not None and isinstance(value, list):
            for index, item in enumerate(value):
                yield from _autos(inner, item, (*where, key, index))
        elif inner is not None:
            yield from _autos(inner, value, (*where, key))


def _lists(schema: Mapping[str, Any], value: str) -> bool:
    """Whether a key's schema names `value` itself."""
    if value in schema.get("enum", ()) or schema.get("const") == value:
        return True
    return any(_lists(one, value) for one in schema.get("anyOf", ()))


def _locate(model: type[Section], location: Sequence[int | str]) -> tuple[Path, type[Section]]:
    """Return the path of the key that a pydantic error is about, and the section it stands in.

    Pydantic's location goes on inside the value (list index, member of a union); that part is cut off.
    """
    where: Path = ()
    owner = model
    parts = list(location)
    while parts:
        key = str(parts.pop(0))
        where = (*where, key)
        field = owner.model_fields.get(key)
        inner = section_of(field.annotation) if field is not None else None
        if inner is None or not parts:
            break
        if isinstance(parts[0], int):
            index = parts.pop(0)
            where = (*where, index)
            if not parts:
                break
        owner = inner
    return where, owner


def _worded(base: Path, where: Path, owner: type[Section], item: Any, data: Any) -> Problem:
    path = base + where
    if item["type"] == "extra_forbidden":
        return unknown_key(path, owner.model_fields)
    if isinstance(where[-1], int):
        return not_allowed(path, _value(data, where), "an object {...}")
    wanted = expected(owner, where[-1])
    if item["type"] == "missing" and len(item["loc"]) == len(where):
        return Problem(join(path), f"missing; expected {wanted}")
    if item["type"] == "value_error":
        return Problem(join(path), f"{show(_value(data, where))} is not allowed: {item['ctx']['error']}")
    return not_allowed(path, _value(data, where), wanted)


def _value(data: Any, where: Path) -> Any:
    for part in where:
        if isinstance(data, Mapping) and part not in data:
            return None
        data = data[part]
    return data


def _drop(data: Any, where: Path) -> Path:
    """Take the key at `where` out of `data`; of a list of sections, the whole list. Return what went."""
    index = next((number for number, part in enumerate(where) if isinstance(part, int)), len(where))
    gone = where[:index]
    for part in gone[:-1]:
        data = data.get(part, {})
    data.pop(gone[-1], None)
    return gone


def _broken(section: Section, where: Path) -> Iterator[tuple[Path, Any, str]]:
    for one, message in section.broken_rules():
        yield where, one, message
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from _broken(value, (*where, key))
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from _broken(item, (*where, key, index))


def _touches(first: Path, second: Path) -> bool:
    """Whether one path leads to the other."""
    shared = min(len(first), len(second))
    return first[:shared] == second[:shared]
