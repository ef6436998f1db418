"""Types of keys that several sections share, and the small notations inside strings: ``2:4``, ``12-23``."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from ds_efficient.config.base import Expected

GROUP_SIZES = (2, 4, 8, 16, 32)
MAX_LAYER = 9999  # keeps "0-99999999" from becoming a list of that length

_PATTERN = re.compile(r"([1-9][0-9]*):([1-9][0-9]*)")
_LAYERS = re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*")


def integral(value: Any) -> Any:
    """Turn ``1e4`` into 10000; leave everything else alone."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def parse_pattern(text: str) -> tuple[int, int]:
    """Return (N, M) of ``"N:M"``: N of every M consecutive values are kept.

    Raises:
        ValueError: not of that form, N >= M, or M not in `GROUP_SIZES`.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError('must be "N:M", for example "2:4"')
    kept, group = int(match[1]), int(match[2])
    if group not in GROUP_SIZES:
        raise ValueError(f"M must be one of {', '.join(map(str, GROUP_SIZES))}")
    if kept >= group:
        raise ValueError("N must be smaller than M; with N = M nothing is pruned")
    return kept, group


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layer numbers that ``"12-23"``, ``"0"`` or ``"0-3,20-23"`` names, both ends included.

    Raises:
        ValueError: another form, a range that runs backwards, or a number above `MAX_LAYER`.
    """
    if _LAYERS.fullmatch(text) is None:
        raise ValueError('must be layer numbers or ranges, for example "12-23" or "0,4-7"')
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f'the range "{part}" runs backwards; write "{high}-{low}"')
        if high > MAX_LAYER:
            raise ValueError(f"layer numbers go up to {MAX_LAYER}")
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def _checked_pattern(text: str) -> str:
    parse_pattern(text)
    return text


def _checked_layers(text: str) -> str:
    parse_layers(text)
    return text


def _checked_names(names: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f'"{repeated[0]}" stands twice')
    return names


Count = Annotated[int, Field(ge=1), BeforeValidator(integral)]
"""An integer >= 1."""

Natural = Annotated[int, Field(ge=0), BeforeValidator(integral)]
"""An integer >= 0."""

Fraction = Annotated[float, Field(gt=0, le=1)]
"""A number > 0 and <= 1."""

Number = Annotated[int | float, Field(gt=0), BeforeValidator(integral), Expected("a number > 0")]
"""A positive number; an integer where it has no fraction."""

NumberRange = Annotated[
    tuple[Number, Number],
    Strict(False),
    BeforeValidator(_tuple_of),
    Expected("a list of two positive numbers, [smallest, largest]"),
]
"""Smallest and largest value, both allowed."""

Pattern = Annotated[
    str,
    Field(pattern=f"^{_PATTERN.pattern}$", examples=["2:4", "2:8"]),
    AfterValidator(_checked_pattern),
    Expected(f'"N:M" with N < M and M one of {", ".join(map(str, GROUP_SIZES))}, for example "2:4"'),
]
"""``"N:M"``: at most N non-zeros in every M consecutive values."""

Layers = Annotated[
    str,
    Field(pattern=f"^{_LAYERS.pattern}$", examples=["12-23", "0,4-7"]),
    AfterValidator(_checked_layers),
    Expected('layer numbers or ranges such as "12-23" or "0,4-7"'),
]
"""Transformer layer numbers, from 0, ranges with both ends included."""

Names = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    Strict(False),
    BeforeValidator(_tuple_of),
    AfterValidator(_checked_names),
    Expected("a list of module names, each once"),
]
"""Module names: the last part of the dotted name, or dotted suffixes, or patterns with ``*``."""

LayerIds = Annotated[
    tuple[Natural, ...],
    Strict(False),
    BeforeValidator(_tuple_of),
    Expected("a list of layer numbers, from 0"),
]
"""Layer numbers, from 0."""
