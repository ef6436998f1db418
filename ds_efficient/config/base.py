"""Base class of every configuration section of this package, and the rules that join several keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

SKIP_RULES = "skip_rules"  # validation context that leaves the rules to the caller


@dataclass(frozen=True)
class Expected:
    """Metadata of a field: what a value must be, in words, where the JSON schema does not say it well."""

    text: str


@dataclass(frozen=True)
class Rule:
    """A condition on several keys of one section.

    Attributes:
        check: takes the section; returns what is wrong and what to write instead, or None.
        keys: the keys it reads; the problem is reported at the first one. The rule is left out while any
            of them has a problem of its own.
        warning: True where the combination works but cannot be what was meant.
    """

    check: Callable[[Any], str | None]
    keys: tuple[str, ...]
    warning: bool = False

    @property
    def __name__(self) -> str:
        return self.check.__name__


def rule(*keys: str, warning: bool = False) -> Callable[[Callable[[Any], str | None]], Rule]:
    """Make a `Rule` of a function of a section; list it in the section's ``rules``."""

    def decorate(check: Callable[[Any], str | None]) -> Rule:
        return Rule(check, keys, warning)

    return decorate


class Section(BaseModel):
    """One section of the DeepSpeed JSON: typed, frozen, unknown keys refused.

    The docstring under each field is its description in the schema and in the documentation. Types are
    strict: ``"64"`` and ``true`` are no integers, as in the JSON schema; ``1e4`` is one.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        strict=True,
        allow_inf_nan=False,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()

    def broken_rules(self) -> Iterator[tuple[Rule, str]]:
        """Yield each rule of this section that does not hold, with its message."""
        for one in self.rules:
            message = one.check(self)
            if message is not None:
                yield one, message

    @model_validator(mode="after")
    def _check_rules(self, info: ValidationInfo) -> Section:
        if isinstance(info.context, dict) and info.context.get(SKIP_RULES):
            return self
        broken = [f"{one.keys[0]}: {text}" for one, text in self.broken_rules() if not one.warning]
        if broken:
            # Braces would be read as placeholders by pydantic's message template.
            raise PydanticCustomError("rules", "{problems}", {"problems": "; ".join(broken)})
        return self


class TechniqueSection(Section):
    """Section of a technique; absent or ``"enabled": false`` means off."""

    enabled: bool = False
    """Switch the technique on."""
