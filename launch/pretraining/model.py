"""megatron-core's GPTModel from the command line."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch.nn.functional import silu

from ds_efficient.errors import UserError
from pretraining.settings import Settings

logger = logging.getLogger(__name__)


def transformer_config(args: argparse.Namespace, settings: Settings) -> Any:
    """Return megatron-core's TransformerConfig.

    Raises:
        UserError: what megatron-core refuses, in its own words.
    """
    from megatron.core.transformer import TransformerConfig

    fused = torch.cuda.is_available()
    no_fusion = (
        args.no_bias_swiglu_fusion
        if args.swiglu
        else args.no_bias_gelu_fusion or args.squared_relu or args.disable_bias_linear
    )
    activation: dict[str, Any] = {}
    if args.swiglu:
        activation = {"activation_func": silu, "gated_linear_unit": True}
    elif args.squared_relu:
        activation = {"activation_func": _squared_relu}
    try:
        return TransformerConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups,
            kv_channels=args.kv_channels,
            normalization=args.normalization,
            layernorm_epsilon=args.norm_epsilon,
            qk_layernorm=args.qk_layernorm,
            add_bias_linear=not args.disable_bias_linear,
            add_qkv_bias=args.add_qkv_bias,
            attention_dropout=args.attention_dropout,
            hidden_dropout=args.hidden_dropout,
            apply_query_key_layer_scaling=args.apply_query_key_layer_scaling,
            init_method=_leave_as_is,
            output_layer_init_method=_leave_as_is,
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            sequence_parallel=args.sequence_parallel,
            params_dtype=settings.dtype,
            pipeline_dtype=settings.dtype,
            bf16=settings.precision == "bf16",
            fp16=settings.precision == "fp16",
            bias_activation_fusion=fused and not no_fusion,
            bias_dropout_fusion=fused and not args.no_bias_dropout_fusion,
            cross_entropy_loss_fusion=fused and not args.no_cross_entropy_fusion,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
            recompute_granularity=args.recompute_granularity,
            recompute_method=args.recompute_method,
            recompute_num_layers=args.recompute_num_layers,
            recompute_modules=args.recompute_modules,
            distribute_saved_activations=False,
            **activation,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"megatron-core refuses this model: {error}") from error


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.square(torch.relu(x))


def _leave_as_is(tensor: torch.Tensor) -> torch.Tensor:
    """Weights are drawn by key afterwards (`megatron_patches.initialization`), equal on any layout."""
    return tensor


def build_model(args: argparse.Namespace, settings: Settings, vocab_size: int, efficiency: Any) -> Any:
    """Return this rank's part of the GPT model, with its weights.

    Args:
        args: command line.
        settings: reconciled settings.
        vocab_size: padded vocabulary size.
        efficiency: EfficiencyConfig of the run.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from megatron_patches.cross_entropy import fuse_cross_entropy
    from megatron_patches.fusions import fuse_rotary_embedding
    from megatron_patches.initialization import initialize_weights
    from megatron_patches.layer_spec import block_spec, layer_spec
    from megatron_patches.partial_gradients import sum_partial_gradients

    config = transformer_config(args, settings)
    if torch.cuda.is_available() and not args.no_rope_fusion and args.position_embedding_type == "rope":
        fuse_rotary_embedding()
    if config.cross_entropy_loss_fusion:
        fuse_cross_entropy()

    def make_layer(index: int) -> Any:
        return layer_spec(efficiency, transformer_config=config, transformer_impl=args.transformer_impl)

    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, make_layer, transformer_impl=args.transformer_impl),
        vocab_size=vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    )
    initialize_weights(model, seed=args.seed, std=args.init_method_std, num_layers=args.num_layers)
    for parameter in model.parameters():
        # The last stage's copy of tied embeddings must not count twice in the gradient norm.
        if getattr(parameter, "shared", False) and args.pipeline_model_parallel_size > 1:
            parameter.ds_pipe_replicated = not parallel_state.is_pipeline_first_stage()
    sum_partial_gradients(model, parallel_state.get_tensor_model_parallel_group())
    return model


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups, as Megatron-LM does: matrices with decay; biases and norms without."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # ZeRO-3 empties the tensors; the shape is then in ds_shape.
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            (decayed if dimensions > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decay"},
        {"params": plain, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]
