"""Section ``rmm``: weight gradients from a random sketch of the layer's input (arXiv 2201.13195)."""

from __future__ import annotations

from typing import Literal

from ds_efficient.config.base import TechniqueSection, rule
from ds_efficient.config.fields import Count, Fraction, Names, Natural


@rule("ratio", "block_size")
def blocks_keep_a_row(rmm: RmmConfig) -> str | None:
    """ratio * block_size is at least 1: each block keeps a row."""
    if rmm.block_size and rmm.ratio * rmm.block_size < 1:
        return (
            f"{rmm.ratio} of block_size {rmm.block_size} is less than one row; "
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
        something_is_saved,
    )

    ratio: Fraction = 0.125
    """Rows of the projection as a share of the rows of the input (tokens in the micro-batch)."""

    sketch: Literal["gaussian", "rademacher", "srht", "count", "rows"] = "gaussian"
    """Distribution of the projection: Gaussian, random signs, subsampled randomized Hadamard transform,
    count sketch, or uniformly sampled rows."""

    block_size: Natural = 512
    """Rows of the input that are projected together; 0 projects all rows at once, which costs more."""

    min_rows: Count = 64
    """Fewest rows of the projection; a layer whose input has no more rows takes the exact gradient."""

    modules: Names = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Linear layers to treat: ends of their dotted module names."""

    exclude: Names = ("output_layer",)
    """Linear layers to leave alone, though modules names them."""

    variance_interval: Natural = 0
    """Steps between two measurements of the gradient's variance, which take an exact gradient; 0: never."""
