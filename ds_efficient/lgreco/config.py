"""Section ``lgreco``: layer-wise adaptive gradient compression (arXiv 2210.17357)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ds_efficient.config.base import Section, TechniqueSection, rule
from ds_efficient.config.fields import Count, Natural, Number, NumberRange, integral

MIN_BITS, MAX_BITS = 2, 8
_UNITS = {"powersgd": "rank", "mixed": "rank", "qsgd": "number of bits", "topk": "density"}
_DEFAULTS: dict[str, float] = {"powersgd": 32, "mixed": 32, "qsgd": 4, "topk": 0.01}


class AccordionConfig(Section):
    """Accordion: compress less in the critical phases, in which the gradient norm changes quickly."""

    enabled: bool = False
    """Switch Accordion on; it then chooses each layer's default."""

    eta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Relative change of the gradient norm from which a phase counts as critical."""

    low: Number = 64
    """Setting in critical phases (low compression)."""

    high: Number = 16
    """Setting otherwise (high compression)."""


@rule("range")
def range_is_ascending(lgreco: LgrecoConfig) -> str | None:
    """range is [smallest, largest]."""
    low, high = lgreco.range
    if low > high:
        return f"{low} is larger than {high}; write [{high}, {low}]"
    return None


@rule("default", "range")
def default_is_in_range(lgreco: LgrecoConfig) -> str | None:
    """default lies in range: it is one of the choices, and its error is the budget."""
    low, high = lgreco.range
    if low <= high and not low <= lgreco.default <= high:
        return f"{lgreco.default} is outside range [{low}, {high}]"
    return None


@rule("default", "range", "compressor")
def values_suit_the_compressor(lgreco: LgrecoConfig) -> str | None:
    """default and range suit the compressor: ranks and bits are integers, bits 2 to 8, densities <= 1."""
    for value in (lgreco.default, *lgreco.range):
        if lgreco.compressor == "topk":
            if value > 1:
                return f'{value} is not a density: with compressor "topk" default and range are > 0 and <= 1'
        elif not isinstance(value, int):
            return (
                f'{value} is not a {_UNITS[lgreco.compressor]}: with compressor "{lgreco.compressor}" '
                "default and range are integers"
            )
        elif lgreco.compressor == "qsgd" and not MIN_BITS <= value <= MAX_BITS:
            return (
                f'{value} bits do not exist: with compressor "qsgd" default and range are from {MIN_BITS} to '
                f"{MAX_BITS}"
            )
    return None


@rule("accordion", "range")
def accordion_is_in_range(lgreco: LgrecoConfig) -> str | None:
    """accordion.low is larger than accordion.high, since low compression keeps more; both lie in range."""
    accordion, (low, high) = lgreco.accordion, lgreco.range
    if not accordion.enabled:
        return None
    if accordion.low <= accordion.high:
        return (
            f"low = {accordion.low} must be larger than high = {accordion.high}: "
            "low compression keeps more of the gradient"
        )
    for key, value in (("low", accordion.low), ("high", accordion.high)):
        if low <= high and not low <= value <= high:
            return f"{key} = {value} is outside range [{low}, {high}]"
    return None


class LgrecoConfig(TechniqueSection):
    """L-GreCo: each layer's gradient is compressed as far as a common error budget allows."""

    rules = (range_is_ascending, default_is_in_range, values_suit_the_compressor, accordion_is_in_range)

    compressor: Literal["powersgd", "qsgd", "topk", "mixed"] = "powersgd"
    """Low rank (powersgd), quantisation (qsgd), largest entries (topk), or each layer's best (mixed)."""

    default: Number = 32
    """Uniform setting whose error is the budget: a rank (powersgd, mixed), bits (qsgd) or a density (topk).
    Where it is left out: 32 for ranks, 4 bits, density 0.01."""

    range: NumberRange = (8, 64)
    """Smallest and largest setting a layer may get. Where it is left out: a quarter of default to twice
    default; a tenth to ten times default for topk."""

    interval: Count = 1000
    """Steps between two choices of the settings."""

    start_step: Natural = 0
    """Step at which compression starts, usually the end of the learning-rate warm-up."""

    buckets: Annotated[int, Field(ge=10), BeforeValidator(integral)] = 10_000
    """Steps into which the error budget is divided; more find a better choice and take longer."""

    error: Literal["l2", "l2_squared"] = "l2"
    """What is summed over the layers: norms of the compression error, or their squares (exactly additive)."""

    objective: Literal["size", "time"] = "size"
    """What is made small: bytes sent, or the measured time."""

    backend: Literal["auto", "nccl", "gloo", "mpi"] = "auto"
    """Communication library; auto takes that of the data-parallel group."""

    accordion: AccordionConfig = AccordionConfig()
    """Choose each layer's default by the phase of training."""

    @model_validator(mode="before")
    @classmethod
    def _fill_by_compressor(cls, data: Any) -> Any:
        """Fill default and range, where they are left out, to suit the compressor and each other."""
        compressor = data.get("compressor", "powersgd") if isinstance(data, dict) else None
        if not isinstance(compressor, str) or compressor not in _DEFAULTS:
            return data
        default = data.get("default", _DEFAULTS[compressor])
        filled = {"default": default, **data}
        if "range" not in data and isinstance(default, int | float) and not isinstance(default, bool):
            filled["range"] = _range_around(compressor, default)
        return filled


def _range_around(compressor: str, default: float) -> list[float]:
    if compressor == "topk":
        return [default / 10, max(default, min(1.0, 10 * default))]
    high = min(2 * default, MAX_BITS) if compressor == "qsgd" else 2 * default
    least = MIN_BITS if compressor == "qsgd" else 1
    # Never narrower than the default itself, so that only the default can be at fault.
    return [min(default, max(least, integral(default // 4))), max(default, integral(high))]
