"""L-GreCo: layer-wise adaptive gradient compression (arXiv 2210.17357)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_efficient.lgreco.accordion import Accordion
    from ds_efficient.lgreco.adaptive import AdaptiveReducer
    from ds_efficient.lgreco.calibration import measure_synchronisation
    from ds_efficient.lgreco.choosing import CompressionPlan, Planner
    from ds_efficient.lgreco.compressors import QSGD, Raw, TopK, sent_raw
    from ds_efficient.lgreco.feedback import ErrorFeedback, compression_error
    from ds_efficient.lgreco.mpi import MpiTransport
    from ds_efficient.lgreco.options import Option, default_option, layer_options, make_compressor, wire_bytes
    from ds_efficient.lgreco.planner import error_budget, mix_options, plan_compression
    from ds_efficient.lgreco.powersgd import Factors, PowerSGD
    from ds_efficient.lgreco.reducer import Reducer
    from ds_efficient.lgreco.simulated import SimulatedGroup, reduce_together
    from ds_efficient.lgreco.timing import SynchronisationModel, fit_synchronisation
    from ds_efficient.lgreco.transport import TorchTransport
    from ds_efficient.lgreco.window import GradientWindow

_HOMES = {
    "Accordion": "ds_efficient.lgreco.accordion",
    "AdaptiveReducer": "ds_efficient.lgreco.adaptive",
    "CompressionPlan": "ds_efficient.lgreco.choosing",
    "ErrorFeedback": "ds_efficient.lgreco.feedback",
    "Factors": "ds_efficient.lgreco.powersgd",
    "GradientWindow": "ds_efficient.lgreco.window",
    "MpiTransport": "ds_efficient.lgreco.mpi",
    "Option": "ds_efficient.lgreco.options",
    "Planner": "ds_efficient.lgreco.choosing",
    "PowerSGD": "ds_efficient.lgreco.powersgd",
    "QSGD": "ds_efficient.lgreco.compressors",
    "Raw": "ds_efficient.lgreco.compressors",
    "Reducer": "ds_efficient.lgreco.reducer",
    "SimulatedGroup": "ds_efficient.lgreco.simulated",
    "SynchronisationModel": "ds_efficient.lgreco.timing",
    "TopK": "ds_efficient.lgreco.compressors",
    "TorchTransport": "ds_efficient.lgreco.transport",
    "compression_error": "ds_efficient.lgreco.feedback",
    "default_option": "ds_efficient.lgreco.options",
    "error_budget": "ds_efficient.lgreco.planner",
    "fit_synchronisation": "ds_efficient.lgreco.timing",
    "layer_options": "ds_efficient.lgreco.options",
    "make_compressor": "ds_efficient.lgreco.options",
    "measure_synchronisation": "ds_efficient.lgreco.calibration",
    "mix_options": "ds_efficient.lgreco.planner",
    "plan_compression": "ds_efficient.lgreco.planner",
    "reduce_together": "ds_efficient.lgreco.simulated",
    "sent_raw": "ds_efficient.lgreco.compressors",
    "wire_bytes": "ds_efficient.lgreco.options",
}

__all__ = [
    "QSGD",
    "Accordion",
    "AdaptiveReducer",
    "CompressionPlan",
    "ErrorFeedback",
    "Factors",
    "GradientWindow",
    "MpiTransport",
    "Option",
    "Planner",
    "PowerSGD",
    "Raw",
    "Reducer",
    "SimulatedGroup",
    "SynchronisationModel",
    "TopK",
    "TorchTransport",
    "compression_error",
    "default_option",
    "error_budget",
    "fit_synchronisation",
    "layer_options",
    "make_compressor",
    "measure_synchronisation",
    "mix_options",
    "plan_compression",
    "reduce_together",
    "sent_raw",
    "wire_bytes",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading a configuration needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
