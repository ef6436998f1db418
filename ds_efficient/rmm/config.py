"""Section ``rmm``: weight gradients from a random sketch of the layer's input (arXiv 2201.13195)."""

from __future__ import annotations

from typing import Annotated, Literal

from ds_efficient.config.base import Expected, TechniqueSection, rule
from ds_efficient.config.fields import Count, Fraction, Names, Natural, Number

AUTO = "auto"
FIRST_RATIO = 0.125  # of "auto", until the variance was measured


@rule("ratio", "block_size")
def blocks_keep_a_row(rmm: RmmConfig) -> str | None:
    """ratio * block_size is at least 1: each block keeps a row."""
    if rmm.block_size and rmm.first_ratio * rmm.block_size < 1:
        return (
            f"{rmm.first_ratio} of block_size {rmm.block_size} is less than one row; "
            f"use at least {1 / rmm.block_size:g}, or a larger block_size"
        )
    return None


@rule("block_size", "sketch")
def hadamard_blocks_are_powers_of_two(rmm: RmmConfig) -> str | None:
    """block_size is a power of two, or 0, with sketch "srht"."""
    size = rmm.block_size
    if rmm.sketch == "srht" and size & (size - 1):
        return (
            f'{size} is no power of two, which sketch "srht" needs; '
            f"use {1 << (size.bit_length() - 1)} or {1 << size.bit_length()}"
        )
    return None


@rule("exclude", "modules")
def something_is_left(rmm: RmmConfig) -> str | None:
    """modules names more than exclude takes away."""
    if rmm.enabled and set(rmm.modules) <= set(rmm.exclude):
        return "every name of modules is excluded, so no layer would be projected"
    return None


@rule("variance_interval", "ratio")
def automatic_ratio_is_measured(rmm: RmmConfig) -> str | None:
    """variance_interval is at least 1 with ratio "auto"."""
    if rmm.enabled and rmm.ratio == AUTO and not rmm.variance_interval:
        return '0 never measures the variance, by which ratio "auto" is chosen; use for example 100'
    return None


@rule("target_variance_ratio", "ratio", warning=True)
def target_is_used(rmm: RmmConfig) -> str | None:
    """target_variance_ratio goes with ratio "auto"."""
    if rmm.enabled and "target_variance_ratio" in rmm.model_fields_set and rmm.ratio != AUTO:
        return f'has no effect with ratio {rmm.ratio:g}; it goes with ratio "auto"'
    return None


@rule("ratio", warning=True)
def something_is_saved(rmm: RmmConfig) -> str | None:
    """ratio is smaller than 1: else gradients are exact and nothing is saved."""
    if rmm.enabled and rmm.ratio == 1:
        return "1 keeps every row: gradients are exact and nothing is saved; use for example 0.125"
    return None


class RmmConfig(TechniqueSection):
    """RMM: linear layers save a random projection of their input instead of the input."""

    rules = (
        blocks_keep_a_row,
        hadamard_blocks_are_powers_of_two,
        something_is_left,
        automatic_ratio_is_measured,
        target_is_used,
        something_is_saved,
    )

    ratio: Annotated[Fraction | Literal["auto"], Expected('a number > 0 and <= 1, or "auto"')] = 0.125
    """Rows of the projection as a share of the rows of the input (tokens in the micro-batch). auto: 0.125 at
    first, then for each layer what target_variance_ratio takes, chosen anew every variance_interval steps."""

    target_variance_ratio: Number = 8
    """With ratio auto: largest variance of the sketched gradient, in units of the variance that sampling the
    micro-batch's tokens has anyway; 8 is about an eighth of the rows where all have similar norms."""

    sketch: Literal["gaussian", "rademacher", "srht", "count", "rows"] = "gaussian"
    """Distribution of the projection: Gaussian, random signs, subsampled randomized Hadamard transform,
    count sketch, or uniformly sampled rows."""

    block_size: Natural = 512
    """Rows of the input that are projected together; 0 projects all rows at once, which costs more."""

    min_rows: Count = 64
    """Fewest rows of the projection; a layer whose input has no more rows takes the exact gradient."""

    modules: Names = ("linear_qkv", "linear_fc1", "linear_fc2")
    """Linear layers to treat: ends of their dotted module names. linear_proj saves nothing where the
    attention kernel keeps its own output, which is that layer's input."""

    exclude: Names = ("output_layer",)
    """Linear layers to leave alone, though modules names them."""

    variance_interval: Natural = 0
    """Steps between two measurements of the gradient's variance; 0: never."""

    @property
    def first_ratio(self) -> float:
        """The ratio at the start."""
        return FIRST_RATIO if isinstance(self.ratio, str) else self.ratio
