"""Layer specs of a GPT model that need neither CUDA, Transformer Engine nor apex.

`layer_spec` edits megatron-core's own local spec: our norms, attention through torch's
scaled_dot_product_attention, and linear layers that techniques can act on. Transformer Engine's spec is used
when asked for, and refused with the reason where it is not installed or leaves a technique no place.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from ds_efficient.errors import UserError
from megatron_patches.attention import SdpaCoreAttention
from megatron_patches.linears import SeamColumnParallelLinear, SeamRowParallelLinear
from megatron_patches.norms import TorchHeadNorm, TorchNorm

_SEAMS = {
    "linear_qkv": SeamColumnParallelLinear,
    "linear_proj": SeamRowParallelLinear,
    "linear_fc1": SeamColumnParallelLinear,
    "linear_fc2": SeamRowParallelLinear,
}
LINEARS = tuple(_SEAMS)
# Techniques that act on linear layers through `ds_efficient.core.linear_seam`, or read their input, which
# Transformer Engine's layers with a norm inside do not show.
SEAM_TECHNIQUES = ("slope", "rmm", "mkor")
TRANSFORMER_IMPLS = ("local", "transformer_engine")


def submodules(spec: Any) -> Any:
    """Return the submodules of a spec, also where newer megatron-core wraps it into functools.partial."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def layer_spec(
    config: Any = None,
    *,
    transformer_config: Any,
    linears: Mapping[str, Any] | None = None,
    transformer_impl: str = "local",
) -> Any:
    """Return the ModuleSpec of one GPT layer.

    Args:
        config: EfficiencyConfig of the run, or None.
        transformer_config: megatron-core's TransformerConfig.
        linears: replacements by name (one of ``LINEARS``): a class or ModuleSpec with the signature of
            megatron-core's ColumnParallelLinear (qkv, fc1) or RowParallelLinear (proj, fc2). Techniques
            cannot act on a replacement that is no `ds_efficient.core.linear_seam.LinearSeam`.
        transformer_impl: ``"local"`` or ``"transformer_engine"``.

    Raises:
        UserError: Transformer Engine asked for but not installed, or combined with `linears` or with a
            technique that acts on linear layers.
    """
    replacements = dict(linears or {})
    unknown = sorted(set(replacements) - set(LINEARS))
    if unknown:
        raise UserError(f"linears: {', '.join(unknown)} unknown; allowed: {', '.join(LINEARS)}")
    if transformer_impl == "transformer_engine":
        if replacements:
            raise UserError(
                "--transformer-impl transformer_engine: its fused layers leave no place for "
                f"{', '.join(replacements)}; use --transformer-impl local"
            )
        _refuse_techniques_without_seam(config)
        return _with_token_drop(config, _transformer_engine_spec(transformer_config))
    if transformer_impl != "local":
        raise UserError(
            f"--transformer-impl {transformer_impl!r} unknown; allowed: {', '.join(TRANSFORMER_IMPLS)}"
        )
    return _with_token_drop(config, _local_spec(transformer_config, replacements))


def _with_token_drop(config: Any, spec: Any) -> Any:
    """Put the layer that may leave out tokens into a spec, where random-LTD is enabled."""
    if config is not None and config.random_ltd.enabled:
        from megatron_patches.random_ltd import layer_class

        spec.module = layer_class(spec.module)
    return spec


def _local_spec(transformer_config: Any, replacements: Mapping[str, Any]) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        normalization=transformer_config.normalization, qk_layernorm=transformer_config.qk_layernorm
    )
    layer = spec.submodules
    attention, mlp = submodules(layer.self_attention), submodules(layer.mlp)
    layer.input_layernorm = TorchNorm
    layer.pre_mlp_layernorm = TorchNorm
    attention.core_attention = SdpaCoreAttention
    if transformer_config.qk_layernorm:
        attention.q_layernorm = TorchHeadNorm
        attention.k_layernorm = TorchHeadNorm
    for name, linear in {**_SEAMS, **replacements}.items():
        setattr(attention if hasattr(attention, name) else mlp, name, linear)
    return spec


def _refuse_techniques_without_seam(config: Any) -> None:
    """Raise UserError where an enabled technique needs the seam, which Transformer Engine's layers lack."""
    needing = [row.name for row in config.enabled() if row.name in SEAM_TECHNIQUES] if config else []
    if needing:
        raise UserError(
            "--transformer-impl transformer_engine: its linear layers leave no place for "
            f"{', '.join(needing)}; use --transformer-impl local, or set {needing[0]}.enabled to false"
        )


def require_transformer_engine() -> None:
    """Raise UserError unless Transformer Engine can be imported."""
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "--transformer-impl transformer_engine: the package transformer_engine is not installed; "
            "install it (pip install 'transformer_engine[pytorch]'), or use --transformer-impl local"
        )


def _transformer_engine_spec(transformer_config: Any) -> Any:
    require_transformer_engine()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=transformer_config.qk_layernorm)


def block_spec(
    transformer_config: Any,
    make_layer: Callable[[int], Any],
    *,
    transformer_impl: str = "local",
) -> Any:
    """Return the specs of this pipeline stage's layers and of the final norm.

    Args:
        transformer_config: megatron-core's TransformerConfig.
        make_layer: returns the spec of the layer with the given global index (0-based).
        transformer_impl: decides about the final norm.
    """
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    offset = get_transformer_layer_offset(transformer_config)
    count = get_num_layers_to_build(transformer_config)
    if transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
    else:
        norm = TorchNorm
    specs = [make_layer(offset + index) for index in range(count)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
