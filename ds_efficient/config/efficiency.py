"""The validated configuration of a run, and how it is loaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ds_efficient.config import deepspeed_facts as facts
from ds_efficient.config.base import Expected, Section, TechniqueSection
from ds_efficient.config.deepspeed_rules import check_deepspeed, near_misses_of_types, section
from ds_efficient.config.fields import Count, integral
from ds_efficient.config.problems import AUTO, Problem, closest, in_order, join, not_allowed, unknown_key
from ds_efficient.config.sections import check_section
from ds_efficient.config.source import read_source
from ds_efficient.errors import ConfigError
from ds_efficient.registry import TECHNIQUES, TechniqueRow, resolve

GENERAL = "ds_efficient"
SCHEMA = "$schema"


class GeneralConfig(Section):
    """What holds for all techniques of the run."""

    seed: Annotated[
        int,
        Field(ge=0, lt=2**63),
        BeforeValidator(integral),
        Expected("an integer from 0 to 2^63 - 1"),
    ] = 1234
    """Seed of every random draw of the techniques."""

    run_dir: str | None = None
    """Folder of run.jsonl, the log of the run; null: no log, unless the training script names a folder."""

    evidence_steps: Count = 3
    """Optimizer steps after which an enabled technique must have acted; else the run stops."""

    allow_untested_megatron: bool = False
    """Go on with a megatron-core version that this release does not know, if its interfaces fit."""


class EfficiencyConfig:
    """The configuration of a run: validated sections, frozen, and DeepSpeed's part as it was given.

    Made by `load_config`. Each technique's section is an attribute: ``config.slope``, ``config.random_ltd``.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        general: GeneralConfig,
        sections: Mapping[str, TechniqueSection],
        *,
        rows: Sequence[TechniqueRow] = TECHNIQUES,
        source: str = "config",
        warnings: Sequence[str] = (),
    ) -> None:
        self._values: dict[str, Any] = {
            "raw": copy.deepcopy(dict(raw)),
            "general": general,
            "sections": dict(sections),
            "rows": tuple(rows),
            "source": source,
            "warnings": tuple(warnings),
        }

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_values" or "_values" in self.__dict__:
            raise AttributeError(f"the configuration is frozen: {name} cannot be set")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        sections = self.__dict__.get("_values", {}).get("sections", {})
        if name in sections:
            return sections[name]
        raise AttributeError(f"{name!r} is no technique; there are {', '.join(sections) or 'none'}")

    def __repr__(self) -> str:
        return f"EfficiencyConfig({self.source!r}, enabled={[row.name for row in self.enabled()]})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EfficiencyConfig):
            return NotImplemented
        return (self.deepspeed, self.general, self.sections) == (
            other.deepspeed,
            other.general,
            other.sections,
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def general(self) -> GeneralConfig:
        """The section ``ds_efficient``."""
        return self._values["general"]

    @property
    def sections(self) -> Mapping[str, TechniqueSection]:
        """Section of every technique by its name, disabled ones included; read only."""
        return MappingProxyType(self._values["sections"])

    @property
    def rows(self) -> tuple[TechniqueRow, ...]:
        """The techniques this configuration was read for."""
        return self._values["rows"]

    @property
    def deepspeed(self) -> dict[str, Any]:
        """The whole configuration as it was given, a new copy at each call."""
        return copy.deepcopy(self._values["raw"])

    @property
    def source(self) -> str:
        """Path of the file, or ``"config"``."""
        return self._values["source"]

    @property
    def warnings(self) -> list[str]:
        """What is allowed but hardly meant; one line each."""
        return list(self._values["warnings"])

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ``zero_optimization.stage``; 0 where it is not given."""
        return int(section(self._values["raw"], "zero_optimization").get("stage", 0))

    @property
    def precision(self) -> str:
        """``"bf16"``, ``"fp16"`` or ``"fp32"``: the type DeepSpeed trains in."""
        for key, name in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
            if section(self._values["raw"], key).get("enabled"):
                return name
        return "fp32"

    def enabled(self) -> list[TechniqueRow]:
        """Rows of the techniques that are switched on, in the order of the registry."""
        return [row for row in self.rows if self.sections[row.name].enabled]

    def resolved(self) -> dict[str, Any]:
        """Return this package's sections with every default filled in, nested as in the JSON."""
        result: dict[str, Any] = {GENERAL: self.general.model_dump(mode="json")}
        for row in self.rows:
            inner = result
            for key in row.path[:-1]:
                inner = inner.setdefault(key, {"enabled": self.sections[row.name].enabled})
            inner[row.path[-1]] = self.sections[row.name].model_dump(mode="json")
        return result

    def for_deepspeed(self) -> dict[str, Any]:
        """Return what DeepSpeed gets: everything but this package's sections.

        A section that stands inside one of DeepSpeed's (random_ltd) stays there switched off, with whatever
        it nests, since this package runs it and DeepSpeed must not.
        """
        result = self.deepspeed
        for key in (SCHEMA, GENERAL):
            result.pop(key, None)
        for row in self.rows:
            if len(row.path) == 1:
                result.pop(row.path[0], None)
            elif row.path[-1] in section(result, ".".join(row.path[:-1])):
                _switch_off(section(result, ".".join(row.path)))
        return result


def load_config(
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any] | EfficiencyConfig,
    *,
    check_available: bool = True,
    world_size: int | None = None,
    rows: Sequence[TechniqueRow] = TECHNIQUES,
) -> EfficiencyConfig:
    """Read and check a DeepSpeed configuration with this package's sections.

    Args:
        path_or_dict: path of a JSON or HJSON file, a dict, the file's text in urlsafe base64, or a
            configuration that is loaded already, which is returned as it is.
        check_available: refuse enabled sections whose technique this version does not have.
        world_size: data-parallel ranks, to check the batch sizes against; None leaves that out.
        rows: the techniques.

    Returns:
        The frozen configuration; its ``warnings`` are for the caller to show.

    Raises:
        ConfigError: with every problem at once.
    """
    if isinstance(path_or_dict, EfficiencyConfig):
        return path_or_dict
    config, problems, _, source = check_config(
        path_or_dict, check_available=check_available, world_size=world_size, rows=rows
    )
    if config is None:
        raise ConfigError(source, problems)
    return config


def check_config(
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    check_available: bool = True,
    world_size: int | None = None,
    rows: Sequence[TechniqueRow] = TECHNIQUES,
) -> tuple[EfficiencyConfig | None, list[str], list[str], str]:
    """Check a configuration as `load_config` does, with problems and warnings as results.

    Returns:
        The configuration, or None where there are problems; the problems; the warnings; the source's name.

    Raises:
        ConfigError: the source cannot be read at all.
    """
    raw, source = read_source(path_or_dict)
    warnings = [*_misspelt_top_level(raw, rows), *near_misses_of_types(raw)]
    general, problems, noted = check_section(GeneralConfig, raw.get(GENERAL, {}), (GENERAL,))
    warnings += noted
    sections: dict[str, TechniqueSection] = {}
    for row in rows:
        checked, found, noted = _check_row(raw, row, check_available)
        problems += found
        warnings += noted
        if checked is not None:
            sections[row.name] = checked
    problems += check_deepspeed(_without_sections(raw, rows), world_size)
    switched_on = [name for name, one in sections.items() if one.enabled]
    if switched_on and section(raw, "compile").get("deepcompile") is True:
        text = f"DeepCompile goes round the hooks that {', '.join(switched_on)} needs; set it to false"
        problems.append(Problem("compile.deepcompile", text))
    warnings = list(dict.fromkeys(warnings))
    if problems or general is None:
        return None, in_order(problems), warnings, source
    config = EfficiencyConfig(raw, general, sections, rows=rows, source=source, warnings=warnings)
    return config, [], warnings, source


def _check_row(
    raw: Mapping[str, Any], row: TechniqueRow, check_available: bool
) -> tuple[TechniqueSection | None, list[Problem], list[str]]:
    """Check the section of one technique and the sections around it."""
    problems = list(_parents(raw, row))
    if any(problem.path in {join(row.path[:end]) for end in range(1, len(row.path))} for problem in problems):
        return None, problems, []
    outer = section(raw, ".".join(row.path[:-1])) if len(row.path) > 1 else raw
    data = outer.get(row.path[-1], {})
    checked, found, warnings = check_section(resolve(row.config), data, row.path)
    problems += found
    if isinstance(data, Mapping) and data.get("enabled") is True:
        problems += _parents_switched_off(raw, row)
        if check_available and row.technique is None:
            name = join(row.path)
            text = "this version does not have the technique yet; "
            problems.append(Problem(name, f"{text}set {name}.enabled to false or remove the section"))
    return checked, problems, warnings


def _parents(raw: Mapping[str, Any], row: TechniqueRow) -> Iterator[Problem]:
    """Check the sections of DeepSpeed in which a technique's section stands."""
    value: Any = raw
    for end in range(1, len(row.path)):
        path = row.path[:end]
        value = value.get(path[-1], {})
        if not isinstance(value, Mapping):
            yield not_allowed(path, value, "an object {...}")
            return
        allowed = facts.PARENT_KEYS.get(join(path))
        for key in value if allowed is not None else ():
            if key not in (allowed or ()):
                yield unknown_key((*path, key), allowed or ())
        if value.get("enabled", False) not in (True, False, AUTO):  # "auto": reported with DeepSpeed's keys
            yield not_allowed((*path, "enabled"), value["enabled"], "true or false")


def _parents_switched_off(raw: Mapping[str, Any], row: TechniqueRow) -> Iterator[Problem]:
    """DeepSpeed ignores ``enabled`` of the outer sections; so false there and true here is no clear order."""
    for end in range(1, len(row.path)):
        name = join(row.path[:end])
        if section(raw, name).get("enabled") is False:
            inner = join(row.path)
            yield Problem(
                f"{name}.enabled", f"false contradicts {inner}.enabled true; set both to the same value"
            )


def _misspelt_top_level(raw: Mapping[str, Any], rows: Sequence[TechniqueRow]) -> Iterator[str]:
    """Warn about unknown top-level keys that look like a known one; others may belong to other tools."""
    own = {GENERAL, SCHEMA, *(row.path[0] for row in rows)}
    known = own | set(facts.TOP_LEVEL)
    inner = {row.name: row.path for row in rows if len(row.path) > 1}
    for key in raw:
        if key in known or key in facts.REMOVED:
            continue
        if key in inner:
            yield f'{key}: not read at top level; it belongs at "{join(inner[key])}"'
            continue
        meant = closest(key, known)
        if meant:
            reader = "ds_efficient" if meant in own else "DeepSpeed"
            yield f'{key}: unknown top-level key, not read by {reader}; did you mean "{meant}"?'


def _without_sections(raw: Mapping[str, Any], rows: Sequence[TechniqueRow]) -> dict[str, Any]:
    """Return DeepSpeed's part of the configuration, without whatever `check_section` has seen."""
    rest = copy.deepcopy(dict(raw))
    for path in ((GENERAL,), *(row.path for row in rows)):
        outer: Any = rest
        for key in path[:-1]:
            outer = outer.get(key) if isinstance(outer, Mapping) else None
        if isinstance(outer, dict):
            outer.pop(path[-1], None)
    for row in rows:  # reported by `_parents`
        if len(row.path) > 1 and not isinstance(rest.get(row.path[0], {}), Mapping):
            rest.pop(row.path[0])
    return rest


def _switch_off(value: Any) -> None:
    """Set ``enabled`` to false in an object of the configuration and in the objects it nests, in place."""
    value["enabled"] = False
    for inner in value.values():
        if isinstance(inner, dict) and "enabled" in inner:
            _switch_off(inner)
