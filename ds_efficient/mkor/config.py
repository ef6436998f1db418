"""Section ``mkor``: second-order preconditioning with rank-1 updates (arXiv 2306.01685)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ds_efficient.config.base import Section, TechniqueSection, rule
from ds_efficient.config.fields import Count, Fraction, Names, Natural, integral

Dtype = Literal["fp32", "bf16", "fp16"]
MAX_VECTORS = 64  # of an update and side
StatisticsRank = Annotated[int, Field(ge=1, le=MAX_VECTORS), BeforeValidator(integral)]


class StabilizerConfig(Section):
    """Draws an inverse factor towards the identity when its entries grow too large."""

    threshold: Annotated[float, Field(gt=0)] = 10.0
    """Largest absolute entry of an inverse factor that is left alone."""

    zeta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Weight of the factor in the blend; the identity has 1 - zeta."""


@rule("min_steps", "ema", warning=True)
def average_is_filled_before_the_switch(hybrid: HybridConfig) -> str | None:
    """min_steps is not smaller than ema: the average covers steps that have passed."""
    if hybrid.enabled and hybrid.min_steps < hybrid.ema:
        return (
            f"{hybrid.min_steps} is shorter than the average over ema = {hybrid.ema} steps that decides "
            f"the switch; use at least {hybrid.ema}"
        )
    return None


class HybridConfig(Section):
    """MKOR-H: go on with the first-order optimizer alone once the second order no longer pays."""

    rules = (average_is_filled_before_the_switch,)

    enabled: bool = False
    """Switch the hybrid form on."""

    beta: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Switch, once and for good, when the loss falls slower than beta times its average rate so far."""

    ema: Count = 100
    """Steps that the moving average of the loss decrease covers."""

    min_steps: Natural = 200
    """Fewest steps before the switch."""


@rule("gamma", warning=True)
def factors_change(mkor: MkorConfig) -> str | None:
    """gamma is smaller than 1: else new statistics have no weight."""
    if mkor.enabled and mkor.gamma == 1:
        return "1 gives new statistics no weight, so the factors stay the identity; use for example 0.95"
    return None


@rule("stabilizer", "gamma")
def blends_outweigh_growth(mkor: MkorConfig) -> str | None:
    """zeta is smaller than gamma: a blend outweighs the growth by 1 / gamma at each update."""
    if mkor.stabilizer.zeta >= mkor.gamma:
        return (
            f"zeta = {mkor.stabilizer.zeta:g} is not below gamma = {mkor.gamma:g}, so that the factors would "
            f"grow without bound; use for example {round(mkor.gamma * 0.95, 3):g}"
        )
    return None


@rule("state_dtype", "form")
def factored_form_is_precise(mkor: MkorConfig) -> str | None:
    """state_dtype is "fp32" with form "factored"."""
    if mkor.form == "factored" and mkor.state_dtype != "fp32":
        return (
            f'"{mkor.state_dtype}" with form "factored", whose basis would not stay orthonormal; use "fp32" '
            '(the form is small already), or form "dense"'
        )
    return None


@rule("max_rank", "form", warning=True)
def rank_is_used(mkor: MkorConfig) -> str | None:
    """max_rank goes with form "factored"."""
    if mkor.enabled and "max_rank" in mkor.model_fields_set and mkor.form != "factored":
        return f'has no effect with form "{mkor.form}"; it goes with form "factored"'
    return None


@rule("statistics_rank", "max_rank", warning=True)
def an_update_fits_the_rank(mkor: MkorConfig) -> str | None:
    """statistics_rank is smaller than max_rank: one update does not fill a factor."""
    if mkor.enabled and mkor.form == "factored" and mkor.statistics_rank >= mkor.max_rank:
        return (
            f"{mkor.statistics_rank} vectors an update leave a factor of max_rank = {mkor.max_rank} nothing "
            f"of older ones; use at most {max(1, mkor.max_rank // 4)}"
        )
    return None


class MkorConfig(TechniqueSection):
    """MKOR: gradients of linear layers are multiplied by inverse Kronecker factors under rank-1 updates."""

    rules = (
        factors_change,
        blends_outweigh_growth,
        factored_form_is_precise,
        rank_is_used,
        an_update_fits_the_rank,
    )

    gamma: Fraction = 0.95
    """Weight of the old statistics at each update of the factors."""

    inversion_interval: Count = 10
    """Steps between two updates of the inverse factors."""

    warmup_steps: Natural = 0
    """First steps of the run, in which every step updates the factors."""

    statistics_rank: StatisticsRank = 1
    """Vectors an update takes a side: 1, the means of the rows; more, sums of rows with random signs."""

    stabilizer: StabilizerConfig = StabilizerConfig()
    """Bound on the growth of the inverse factors."""

    sides: Literal["both", "left", "right"] = "both"
    """Factors to use: of the output gradients (left), of the inputs (right), or both."""

    form: Literal["dense", "factored"] = "dense"
    """How an inverse factor is stored: as a matrix, or as identity plus low rank, which takes less memory."""

    max_rank: Count = 128
    """Largest rank of the factored form."""

    state_dtype: Dtype = "fp32"
    """Type in which the inverse factors are stored; half types can lose positive definiteness."""

    comm_dtype: Dtype = "fp32"
    """Type in which the rank-1 vectors are exchanged between ranks."""

    tensor_parallel: Literal["exact", "block"] = "exact"
    """Factors of a layer that tensor parallelism cuts: of the whole layer, or one pair for each shard."""

    exclude: Names = ("output_layer", "embedding")
    """Layers to leave to the first-order optimizer: ends of their dotted module names."""

    hybrid: HybridConfig = HybridConfig()
    """Fall back to the first-order optimizer when progress slows."""
