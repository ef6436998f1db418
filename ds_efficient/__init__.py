"""Five techniques that make GPT pretraining cheaper, each a section of the DeepSpeed JSON config."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_efficient.errors import CheckpointError, ConfigError, InactiveTechnique, OpBuildError, UserError
from ds_efficient.version import __version__

if TYPE_CHECKING:
    from ds_efficient.config import EfficiencyConfig, load_config
    from ds_efficient.core.engine import initialize
    from ds_efficient.core.plan import Plan, build_plan

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EfficiencyConfig",
    "InactiveTechnique",
    "OpBuildError",
    "Plan",
    "UserError",
    "__version__",
    "build_plan",
    "initialize",
    "load_config",
]

_HOMES = {
    "EfficiencyConfig": "ds_efficient.config",
    "load_config": "ds_efficient.config",
    "initialize": "ds_efficient.core.engine",
    "Plan": "ds_efficient.core.plan",
    "build_plan": "ds_efficient.core.plan",
}
_TECHNIQUES = ("slope", "rmm", "mkor", "random_ltd", "lgreco")


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts without torch and DeepSpeed."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _TECHNIQUES:
        return importlib.import_module(f"ds_efficient.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
