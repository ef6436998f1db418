"""The one table of techniques. A new technique is one folder and one row here.

The rows hold import paths, not objects, so that this module imports nothing and every layer may read it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TechniqueRow:
    """One technique.

    Attributes:
        name: short name, used in plans, logs, metrics and checkpoints.
        path: where its section stands in the DeepSpeed JSON.
        config: ``"module:Class"`` of its section (a `ds_efficient.config.base.Section`).
        technique: ``"module:Class"`` of its `ds_efficient.core.technique.Technique`, or None while this
            version does not have it: an enabled section is then refused by name.
        title: one line for plans and documentation.
    """

    name: str
    path: tuple[str, ...]
    config: str
    technique: str | None
    title: str


TECHNIQUES: tuple[TechniqueRow, ...] = (
    TechniqueRow(
        "slope",
        ("slope",),
        "ds_efficient.slope.config:SlopeConfig",
        "ds_efficient.slope.technique:SlopeTechnique",
        "double-pruned N:M sparse weights",
    ),
    TechniqueRow(
        "rmm",
        ("rmm",),
        "ds_efficient.rmm.config:RmmConfig",
        "ds_efficient.rmm.technique:RmmTechnique",
        "weight gradients from a random sketch",
    ),
    TechniqueRow(
        "mkor",
        ("mkor",),
        "ds_efficient.mkor.config:MkorConfig",
        "ds_efficient.mkor.technique:MkorTechnique",
        "second-order rank-1 preconditioning",
    ),
    TechniqueRow(
        "random_ltd",
        ("data_efficiency", "data_routing", "random_ltd"),
        "ds_efficient.random_ltd.config:RandomLtdConfig",
        "ds_efficient.random_ltd.technique:RandomLtdTechnique",
        "random token dropping with LayerToken LR",
    ),
    TechniqueRow(
        "lgreco",
        ("lgreco",),
        "ds_efficient.lgreco.config:LgrecoConfig",
        "ds_efficient.lgreco.technique:LgrecoTechnique",
        "layer-wise adaptive gradient compression",
    ),
)


def resolve(reference: str) -> Any:
    """Import ``"module:attribute"`` and return the attribute."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
