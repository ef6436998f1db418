"""L-GreCo: layer-wise adaptive gradient compression (arXiv 2210.17357)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_efficient.lgreco.accordion import Accordion
    from ds_efficient.lgreco.compressors import QSGD, Raw, TopK, sent_raw
    from ds_efficient.lgreco.feedback import ErrorFeedback, compression_error
    from ds_efficient.lgreco.planner import error_budget, mix_options, plan_compression
    from ds_efficient.lgreco.powersgd import Factors, PowerSGD
    from ds_efficient.lgreco.timing import SynchronisationModel, fit_synchronisation

_HOMES = {
    "Accordion": "ds_efficient.lgreco.accordion",
    "ErrorFeedback": "ds_efficient.lgreco.feedback",
    "Factors": "ds_efficient.lgreco.powersgd",
    "PowerSGD": "ds_efficient.lgreco.powersgd",
    "QSGD": "ds_efficient.lgreco.compressors",
    "Raw": "ds_efficient.lgreco.compressors",
    "SynchronisationModel": "ds_efficient.lgreco.timing",
    "TopK": "ds_efficient.lgreco.compressors",
    "compression_error": "ds_efficient.lgreco.feedback",
    "error_budget": "ds_efficient.lgreco.planner",
    "fit_synchronisation": "ds_efficient.lgreco.timing",
    "mix_options": "ds_efficient.lgreco.planner",
    "plan_compression": "ds_efficient.lgreco.planner",
    "sent_raw": "ds_efficient.lgreco.compressors",
}

__all__ = [
    "QSGD",
    "Accordion",
    "ErrorFeedback",
    "Factors",
    "PowerSGD",
    "Raw",
    "SynchronisationModel",
    "TopK",
    "compression_error",
    "error_budget",
    "fit_synchronisation",
    "mix_options",
    "plan_compression",
    "sent_raw",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading a configuration needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
