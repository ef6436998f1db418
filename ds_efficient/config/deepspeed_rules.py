"""Check DeepSpeed's own keys, where DeepSpeed would fail later, say little, or say nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ds_efficient.config import deepspeed_facts as facts
from ds_efficient.config import deepspeed_keys
from ds_efficient.config.problems import (
    AUTO,
    Problem,
    closest,
    describe,
    join,
    no_automatic_value,
    not_allowed,
    unknown_key,
)

MICRO, ACCUMULATION, GLOBAL = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "train_batch_size",
)


def check_deepspeed(raw: Mapping[str, Any], world_size: int | None = None) -> Iterator[Problem]:
    """Yield the problems of DeepSpeed's keys in a configuration.

    Args:
        raw: the configuration without this package's sections.
        world_size: data-parallel ranks, where known.
    """
    yield from removed_keys(raw)
    yield from automatic_values(raw)
    yield from top_level_values(raw)
    yield from closed_sections(raw)
    yield from batch_sizes(raw, world_size)
    yield from precision(raw)
    yield from zero_form(raw)
    yield from optimizer(raw)
    yield from scheduler(raw)


def removed_keys(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Sections that DeepSpeed refuses by mere presence."""
    for key, reason in facts.REMOVED.items():
        if key in raw:
            yield Problem(key, reason)
    for key, reason in facts.REMOVED_ZERO.items():
        if key in section(raw, "zero_optimization"):
            yield Problem(f"zero_optimization.{key}", reason)


def automatic_values(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """``"auto"``, which only other programs resolve; DeepSpeed silently takes some for the default."""
    for path in _autos({key: value for key, value in raw.items() if key in facts.TOP_LEVEL}, ()):
        dotted = join(path)
        if not any(f"{dotted}.".startswith(f"{allowed}.") for allowed in facts.AUTO_ALLOWED):
            yield no_automatic_value(path, _wanted(dotted))


def top_level_values(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Types and ranges of top-level keys."""
    for key, entry in facts.TOP_LEVEL.items():
        if (
            key in raw
            and raw[key] != AUTO
            and key != "zero_optimization"
            and not fits(raw[key], entry.schema)
        ):
            yield not_allowed((key,), raw[key], describe(entry.schema))


def closed_sections(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys and types in the sections whose keys DeepSpeed checks itself, without suggesting the right one."""
    for path, keys in deepspeed_keys.CLOSED.items():
        removed = facts.REMOVED_ZERO if path == "zero_optimization" else {}
        for key, value in section(raw, path).items():
            here = f"{path}.{key}"
            if key in removed or value == AUTO:
                continue
            if key not in keys:
                if key not in _installed_keys(path):
                    yield unknown_key((*path.split("."), key), keys)
            elif here in facts.CHOICES:
                if not fits(value, {"enum": facts.CHOICES[here]}):
                    yield not_allowed((path, key), value, describe({"enum": facts.CHOICES[here]}))
            elif not _fits_kind(value, keys[key]):
                yield not_allowed((path, key), value, _describe_kind(keys[key]))
    here = "data_types.grad_accum_dtype"
    value = section(raw, "data_types").get("grad_accum_dtype")
    if value != AUTO and not fits(value, {"enum": facts.CHOICES[here]}):
        yield not_allowed((here,), value, describe({"enum": facts.CHOICES[here]}))


def batch_sizes(raw: Mapping[str, Any], world_size: int | None = None) -> Iterator[Problem]:
    """``train_batch_size`` = micro-batch x accumulation x ranks, as far as they are given."""
    given = {key: raw.get(key) for key in (GLOBAL, MICRO, ACCUMULATION)}
    if any(
        value is not None and not fits(value, facts.TOP_LEVEL[key].schema) for key, value in given.items()
    ):
        return  # reported by `top_level_values`
    total, micro, steps = (None if value is None else int(value) for value in given.values())
    if total is None:
        return
    factors = {MICRO: micro, ACCUMULATION: steps, "ranks": world_size}
    known = {name: value for name, value in factors.items() if value is not None}
    product = math.prod(known.values())
    text = " x ".join(f"{name} {value}" for name, value in known.items())
    if len(known) == len(factors) and total != product:
        yield Problem(GLOBAL, f"{total} is not {text} = {product}; change one of them or leave {GLOBAL} out")
    elif total % product:
        yield Problem(GLOBAL, f"{total} is no multiple of {text}{f' = {product}' if len(known) > 1 else ''}")


def precision(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """One type of training at a time."""
    if section(raw, "fp16").get("enabled") is True:
        for other in ("bf16", "bfloat16"):
            if section(raw, other).get("enabled") is True:
                yield Problem("fp16.enabled", f"fp16 and {other} are both enabled; keep one of them")
    if "bf16" in raw and "bfloat16" in raw:
        yield Problem("bfloat16", "DeepSpeed ignores it beside bf16; keep bf16 only")


def zero_form(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """``zero_optimization`` as an object, and what stage 3 excludes."""
    value = raw.get("zero_optimization", {})
    if value == AUTO:
        return
    if not isinstance(value, Mapping):
        yield not_allowed(("zero_optimization",), value, 'an object such as {"stage": 1}')
    elif raw.get("gradient_allreduce_op") == "sum" and value.get("stage") == 3:
        yield Problem(
            "gradient_allreduce_op", '"sum" does not work with zero_optimization.stage 3; use "mean"'
        )


def optimizer(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """``optimizer``: without a type DeepSpeed ignores it; some types are gone."""
    value = section(raw, "optimizer")
    if "optimizer" not in raw or not value:
        return
    yield from _typed_section(value, "optimizer", ("type", "params", "legacy_fusion"))
    kind = value.get("type")
    if isinstance(kind, str) and kind.lower() in facts.REMOVED_OPTIMIZERS:
        yield Problem(
            "optimizer.type",
            f'DeepSpeed 0.19.8 removed "{kind}"; use for example "AdamW" with section lgreco',
        )
    params = value.get("params", {})
    if isinstance(params, Mapping) and "max_grad_norm" in params:
        yield Problem(
            "optimizer.params.max_grad_norm",
            'DeepSpeed takes it at top level: write "gradient_clipping" instead',
        )


def scheduler(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """``scheduler``: without a type DeepSpeed ignores it."""
    value = section(raw, "scheduler")
    if value:
        yield from _typed_section(value, "scheduler", ("type", "params"))


def near_misses_of_types(raw: Mapping[str, Any]) -> Iterator[str]:
    """Warn about optimizer and scheduler types that look like a misspelt name."""
    for name, known in (("optimizer", facts.OPTIMIZERS), ("scheduler", facts.SCHEDULERS)):
        kind = section(raw, name).get("type")
        if not isinstance(kind, str) or kind.lower() in {one.lower() for one in known}:
            continue
        meant = closest(kind, known)
        if meant:
            yield f'{name}.type: "{kind}" is not one of DeepSpeed\'s; did you mean "{meant}"?'


def section(raw: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return the object at a dotted path, empty where there is none."""
    value: Any = raw
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value has the type of a simple JSON schema and lies in its bounds."""
    if "enum" in schema:
        return any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in schema["enum"]
        )
    kinds = schema.get("type", "any")
    if not any(_fits_kind(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if not _is_number(value):
        return True
    above = value > schema.get("exclusiveMinimum", -math.inf)
    return above and -math.inf < value < math.inf and value >= schema.get("minimum", -math.inf)


def _fits_kind(value: Any, kind: str) -> bool:
    if kind.endswith("?"):
        return value is None or _fits_kind(value, kind[:-1])
    check = _KINDS.get(kind)
    return check is None or check(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Lists are left to DeepSpeed, which takes a single name for one here and there.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "object": lambda value: isinstance(value, Mapping),
    "null": lambda value: value is None,
}


def _describe_kind(kind: str) -> str:
    return describe({"type": [kind[:-1], "null"] if kind.endswith("?") else kind})


def _wanted(dotted: str) -> str:
    """Say what to write instead of ``"auto"`` at a key of DeepSpeed."""
    if dotted in facts.TOP_LEVEL:
        return describe(facts.TOP_LEVEL[dotted].schema)
    if dotted in facts.CHOICES:
        return describe({"enum": facts.CHOICES[dotted]})
    path, _, key = dotted.rpartition(".")
    kind = deepspeed_keys.CLOSED.get(path, {}).get(key)
    return _describe_kind(kind) if kind and kind != "any" else "the value itself"


def _autos(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _autos(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _autos(inner, (*path, index))
    elif value == AUTO:
        yield path


def _typed_section(value: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> Iterator[Problem]:
    for key in value:
        if key not in keys:
            yield unknown_key((name, key), keys)
    kind, params = value.get("type"), value.get("params", {})
    if kind is None:
        yield Problem(f"{name}.type", f"missing; DeepSpeed ignores {name} without it")
    elif not isinstance(kind, str):
        yield not_allowed((name, "type"), kind, "a name")
    if not isinstance(params, Mapping) and params != AUTO:
        yield not_allowed((name, "params"), params, "an object {...}")


def _installed_keys(path: str) -> Mapping[str, str]:
    """Keys of a section in the installed DeepSpeed, where that is another version than the table's."""
    from ds_efficient.core import deepspeed_schema

    if deepspeed_schema.installed_version() in (None, deepspeed_keys.VERSION):
        return {}
    return deepspeed_schema.closed_sections().get(path, {})
