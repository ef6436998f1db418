"""Base class of every configuration section of this package."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of the DeepSpeed JSON: typed, frozen, unknown keys refused.

    The docstring under each field is its description in the schema and in the documentation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=False)


class TechniqueSection(Section):
    """Section of a technique; absent or ``"enabled": false`` means off."""

    enabled: bool = False
    """Switch the technique on."""
