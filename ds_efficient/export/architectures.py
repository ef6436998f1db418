"""Hugging Face architectures that compute what megatron-core's GPTModel does, and how its tensors map to it.

- Rotary positions, RMSNorm and SwiGLU: Llama; with a bias on queries, keys and values alone: Qwen2; with
  norms on queries and keys: Qwen3.
- Learned positions, LayerNorm, GELU and biases: GPT-2, whose linear layers (``Conv1D``) keep weights as
  (in, out).

megatron-core stacks the rows of queries, keys and values group by group (queries of the group, its key, its
value), and those of a gated layer as gate, then up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.export.arguments import ModelArguments
from ds_efficient.export.checkpoint_reader import CheckpointReader, Linear

Entry = tuple[str, "Tensor | Linear"]
_FALLBACK_POSITIONS = 2048


def qkv_rows(arguments: ModelArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of megatron-core's QKV layer that are queries, keys and values, in the heads' order."""
    groups, width = arguments.num_query_groups, arguments.kv_channels
    queries = arguments.num_attention_heads // groups
    rows = torch.arange(groups * (queries + 2) * width).view(groups, queries + 2, width)
    return rows[:, :queries].flatten(), rows[:, queries].flatten(), rows[:, queries + 1].flatten()


class Gpt2:
    """GPT-2's names and configuration."""

    title = "GPT-2"
    transposed = True

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader

    def config(self) -> dict[str, Any]:
        """Return config.json's content, without precision and special tokens."""
        arguments = self.reader.arguments
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": arguments.vocab_size,
            "n_positions": arguments.max_position_embeddings,
            "n_embd": arguments.hidden_size,
            "n_layer": arguments.num_layers,
            "n_head": arguments.num_attention_heads,
            "n_inner": arguments.ffn_hidden_size,
            "activation_function": "gelu_new" if arguments.tanh_gelu else "gelu",
            "layer_norm_epsilon": arguments.norm_epsilon,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": not arguments.untie_embeddings_and_output_weights,
        }

    def entries(self) -> Iterator[Entry]:
        """Yield Hugging Face name and content, layer by layer; a linear layer's name has no ``.weight``."""
        reader = self.reader
        yield "transformer.wte.weight", reader.tensor("embedding.word_embeddings.weight")
        yield "transformer.wpe.weight", reader.tensor("embedding.position_embeddings.weight")
        rows = torch.cat(qkv_rows(reader.arguments))
        for number in range(reader.arguments.num_layers):
            ours, theirs = f"decoder.layers.{number}.", f"transformer.h.{number}."
            yield from _norm(reader, f"{ours}input_layernorm", f"{theirs}ln_1")
            yield f"{theirs}attn.c_attn", reader.linear(f"{ours}self_attention.linear_qkv").rows(rows)
            yield f"{theirs}attn.c_proj", reader.linear(f"{ours}self_attention.linear_proj")
            yield from _norm(reader, f"{ours}pre_mlp_layernorm", f"{theirs}ln_2")
            yield f"{theirs}mlp.c_fc", reader.linear(f"{ours}mlp.linear_fc1")
            yield f"{theirs}mlp.c_proj", reader.linear(f"{ours}mlp.linear_fc2")
        yield from _norm(reader, "decoder.final_layernorm", "transformer.ln_f")
        if reader.arguments.untie_embeddings_and_output_weights:
            yield "lm_head.weight", reader.tensor("output_layer.weight")


class Llama:
    """Names and configuration of Llama, Qwen2 and Qwen3.

    Args:
        reader: of the checkpoint.
        kind: ``"llama"``, ``"qwen2"`` or ``"qwen3"``.
    """

    transposed = False

    def __init__(self, reader: CheckpointReader, kind: str) -> None:
        self.reader = reader
        self.kind = kind
        self.title = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]

    def config(self) -> dict[str, Any]:
        """Return config.json's content, without precision and special tokens."""
        arguments = self.reader.arguments
        theta = float(arguments.rotary_base or 10000)
        biases = not arguments.disable_bias_linear
        own: dict[str, Any] = {
            "llama": {"attention_bias": biases, "mlp_bias": biases},
            "qwen2": {"use_sliding_window": False},
            "qwen3": {"attention_bias": False, "use_sliding_window": False},
        }[self.kind]
        return {
            "architectures": [f"{self.title}ForCausalLM"],
            "model_type": self.kind,
            "vocab_size": arguments.vocab_size,
            "hidden_size": arguments.hidden_size,
            "intermediate_size": arguments.ffn_hidden_size,
            "num_hidden_layers": arguments.num_layers,
            "num_attention_heads": arguments.num_attention_heads,
            "num_key_value_heads": arguments.num_query_groups,
            "head_dim": arguments.kv_channels,
            "hidden_act": "silu",
            "max_position_embeddings": arguments.max_position_embeddings or _FALLBACK_POSITIONS,
            "rms_norm_eps": arguments.norm_epsilon,
            # transformers before 5 reads the first, from 5 on the second
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "attention_dropout": 0.0,
            "tie_word_embeddings": not arguments.untie_embeddings_and_output_weights,
            **own,
        }

    def entries(self) -> Iterator[Entry]:
        """Yield Hugging Face name and content, layer by layer; a linear layer's name has no ``.weight``."""
        reader, arguments = self.reader, self.reader.arguments
        yield "model.embed_tokens.weight", reader.tensor("embedding.word_embeddings.weight")
        qkv = qkv_rows(arguments)
        gate = torch.arange(arguments.ffn_hidden_size)
        for number in range(arguments.num_layers):
            ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
            yield from _norm(reader, f"{ours}input_layernorm", f"{theirs}input_layernorm")
            whole = reader.linear(f"{ours}self_attention.linear_qkv")
            for name, rows in zip("qkv", qkv, strict=True):
                yield f"{theirs}self_attn.{name}_proj", whole.rows(rows)
            if arguments.qk_layernorm:
                for name in "qk":
                    yield from _norm(
                        reader, f"{ours}self_attention.{name}_layernorm", f"{theirs}self_attn.{name}_norm"
                    )
            yield f"{theirs}self_attn.o_proj", reader.linear(f"{ours}self_attention.linear_proj")
            yield from _norm(reader, f"{ours}pre_mlp_layernorm", f"{theirs}post_attention_layernorm")
            whole = reader.linear(f"{ours}mlp.linear_fc1")
            yield f"{theirs}mlp.gate_proj", whole.rows(gate)
            yield f"{theirs}mlp.up_proj", whole.rows(gate + arguments.ffn_hidden_size)
            yield f"{theirs}mlp.down_proj", reader.linear(f"{ours}mlp.linear_fc2")
        yield from _norm(reader, "decoder.final_layernorm", "model.norm")
        if arguments.untie_embeddings_and_output_weights:
            yield "lm_head.weight", reader.tensor("output_layer.weight")


def _norm(reader: CheckpointReader, ours: str, theirs: str) -> Iterator[Entry]:
    yield f"{theirs}.weight", reader.tensor(f"{ours}.weight")
    if reader.arguments.normalization == "LayerNorm":
        yield f"{theirs}.bias", reader.tensor(f"{ours}.bias")


def choose(reader: CheckpointReader) -> Gpt2 | Llama:
    """Return the architecture that computes the same as the checkpoint's model.

    Raises:
        UserError: none does; says what has no counterpart.
    """
    arguments = reader.arguments
    if arguments.position_embedding_type == "rope":
        problems, kind = _against_llama(arguments)
        title = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    else:
        problems, title = _against_gpt2(arguments), "GPT-2"
    if problems:
        raise UserError(
            f"{reader.folder}: no Hugging Face architecture computes the same as this model; the nearest is "
            f"{title}, which has no counterpart of: {'; '.join(problems)}"
        )
    return Gpt2(reader) if title == "GPT-2" else Llama(reader, kind)


def _against_llama(arguments: ModelArguments) -> tuple[list[str], str]:
    """Return what Llama's family lacks, and which member is the nearest."""
    problems = []
    if arguments.normalization != "RMSNorm":
        problems.append(f"--normalization {arguments.normalization}")
    if not arguments.swiglu:
        problems.append("--squared-relu" if arguments.squared_relu else "GELU (no --swiglu)")
    if arguments.rotary_percent not in (None, 1.0):
        problems.append(f"--rotary-percent {arguments.rotary_percent}")
    kind = "llama"
    if arguments.qk_layernorm:
        kind = "qwen3"
        if not arguments.disable_bias_linear:
            problems.append("biases together with --qk-layernorm (no --disable-bias-linear)")
        elif arguments.add_qkv_bias:
            problems.append("--add-qkv-bias together with --qk-layernorm")
    elif arguments.disable_bias_linear and arguments.add_qkv_bias:
        kind = "qwen2"
    return problems, kind


def _against_gpt2(arguments: ModelArguments) -> list[str]:
    """Return what GPT-2 lacks."""
    rules = (
        (
            arguments.position_embedding_type != "learned_absolute",
            f"--position-embedding-type {arguments.position_embedding_type}",
        ),
        (arguments.normalization != "LayerNorm", f"--normalization {arguments.normalization}"),
        (arguments.swiglu, "--swiglu"),
        (arguments.squared_relu, "--squared-relu"),
        (arguments.disable_bias_linear, "--disable-bias-linear"),
        (arguments.qk_layernorm, "--qk-layernorm"),
        (
            arguments.num_query_groups != arguments.num_attention_heads,
            f"--num-query-groups {arguments.num_query_groups}",
        ),
        (
            arguments.kv_channels * arguments.num_attention_heads != arguments.hidden_size,
            f"--kv-channels {arguments.kv_channels}",
        ),
    )
    return [text for broken, text in rules if broken]
