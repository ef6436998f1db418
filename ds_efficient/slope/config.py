"""Section ``slope``: double-pruned N:M sparse weights with lazy low-rank adapters (arXiv 2405.16325)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Strict, model_validator

from ds_efficient.config.base import Expected, Section, TechniqueSection, rule
from ds_efficient.config.fields import (
    Count,
    Fraction,
    Layers,
    Names,
    Natural,
    Pattern,
    parse_layers,
    parse_pattern,
)


class LayerPattern(Section):
    """Another N:M pattern for some of the transformer layers."""

    layers: Layers
    """The layers, numbered from 0; ranges include both ends."""

    pattern: Pattern
    """Their pattern."""


@rule("start_step", "last_fraction")
def adapter_start_is_given_once(adapter: AdapterConfig) -> str | None:
    """start_step and last_fraction exclude each other."""
    if adapter.start_step is not None and adapter.last_fraction is not None:
        return "start_step and last_fraction exclude each other; keep one of them"
    return None


@rule("rank", "start_step", "last_fraction")
def adapter_starts(adapter: AdapterConfig) -> str | None:
    """start_step or last_fraction is given, unless rank is 0."""
    if adapter.rank and adapter.start_step is None and adapter.last_fraction is None:
        return (
            f"adapters of rank {adapter.rank} would never start; give start_step or last_fraction, or rank 0"
        )
    return None


class AdapterConfig(Section):
    """Low-rank adapters that join the sparse weights near the end of the run."""

    rules = (adapter_start_is_given_once, adapter_starts)

    rank: Natural = 64
    """Rank of each adapter; 0 leaves the adapters out."""

    last_fraction: Fraction | None = 0.01
    """Share of the run's steps, at its end, in which the adapters are trained; null with start_step."""

    start_step: Natural | None = None
    """Optimizer step at which the adapters start, instead of last_fraction."""

    @model_validator(mode="before")
    @classmethod
    def _start_step_replaces_the_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("start_step") is not None and "last_fraction" not in data:
            return {**data, "last_fraction": None}
        return data


@rule("patterns")
def layers_have_one_pattern(slope: SlopeConfig) -> str | None:
    """patterns names each layer at most once."""
    seen: dict[int, str] = {}
    for entry in slope.patterns:
        for layer in parse_layers(entry.layers):
            if layer in seen:
                return f'layer {layer} stands both in "{seen[layer]}" and in "{entry.layers}"; name it once'
            seen[layer] = entry.layers
    return None


@rule("backend", "pattern", "patterns")
def backend_runs_the_patterns(slope: SlopeConfig) -> str | None:
    """backend "cusparselt" takes patterns with at most two values in every four, as the hardware does."""
    if slope.backend != "cusparselt":
        return None
    for text in (slope.pattern, *(entry.pattern for entry in slope.patterns)):
        kept, group = parse_pattern(text)
        if (kept, group) != (1, 2) and (group % 4 or kept > 2):
            return (
                f'"cusparselt" runs at most 2 non-zeros in every 4, which pattern "{text}" does not keep to; '
                'use "auto" or "dense", or a pattern such as "2:4" or "2:8"'
            )
    return None


@rule("exclude", "modules")
def something_is_left(slope: SlopeConfig) -> str | None:
    """modules names more than exclude takes away."""
    if slope.enabled and set(slope.modules) <= set(slope.exclude):
        return "every name of modules is excluded, so nothing would be sparse"
    return None


class SlopeConfig(TechniqueSection):
    """SLoPe: linear layers keep N of every M weights, in the forward and in the backward pass."""

    rules = (layers_have_one_pattern, backend_runs_the_patterns, something_is_left)

    pattern: Pattern = "2:4"
    """N:M pattern of the sparse layers: N of every M consecutive weights are kept."""

    patterns: Annotated[
        tuple[LayerPattern, ...],
        Strict(False),
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
        Expected('a list of objects {"layers": "12-23", "pattern": "2:8"}'),
    ] = ()
    """Other patterns for some layers; layers not named here have pattern."""

    modules: Names = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Linear layers to make sparse: ends of their dotted module names."""

    exclude: Names = ("output_layer",)
    """Linear layers to keep dense, though modules names them."""

    mask: Literal["random", "magnitude"] = "random"
    """How the kept positions are chosen at the start: at random (training from scratch) or by magnitude
    (a pretrained model)."""

    double_prune: bool = True
    """Prune the transposed weight of the backward pass too, so that both products are sparse."""

    column_mask_interval: Count = 100
    """Steps between two choices of the backward pass's mask."""

    adapter: AdapterConfig = AdapterConfig()
    """Low-rank adapters for the end of the run."""

    operands: Literal["auto", "kept", "rewritten"] = "kept"
    """Whether the compressed operands of cusparselt stay in memory (kept) or are written anew for each
    product (rewritten), which takes 2 bytes a dense weight less; auto: rewritten where a step has one
    micro-batch, so that they would be written as often anyway."""

    backend: Literal["auto", "cusparselt", "dense"] = "auto"
    """How sparse products are computed; auto: cusparselt where it runs, else dense, and says which."""
