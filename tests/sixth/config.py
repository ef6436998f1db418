"""Section of the sixth technique."""

from __future__ import annotations

from pydantic import Field

from ds_efficient.config.base import TechniqueSection
from ds_efficient.config.fields import Names


class SixthConfig(TechniqueSection):
    """Scales the output of chosen linear layers by a factor that is learned nowhere."""

    factor: float = Field(default=0.5, gt=0.0)
    """Factor of the outputs."""

    modules: Names = ("fc",)
    """Ends of the names of the modules it acts on."""
