"""A model's arguments, as the manifest of its checkpoint tells them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_efficient.errors import CheckpointError

_VOCABULARY = "padded vocabulary size"
_SOMETIMES = ("rotary_base", "rotary_percent", "max_position_embeddings")


@dataclass(frozen=True)
class ModelArguments:
    """What `launch/pretrain_gpt.py` built the model from, by the names of its arguments.

    Attributes:
        vocab_size: rows of the embedding, padding included.
        rotary_base, rotary_percent: None without rotary positions.
        max_position_embeddings: rows of the learned positions; with other positions the longest sequence that
            was trained on, None where the checkpoint does not tell.
        precision: fp32, bf16 or fp16.
        tanh_gelu: whether GELU was computed by its tanh approximation, as megatron-core's fused kernel does.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    kv_channels: int
    num_query_groups: int
    position_embedding_type: str
    normalization: str
    norm_epsilon: float
    qk_layernorm: bool
    swiglu: bool
    squared_relu: bool
    disable_bias_linear: bool
    add_qkv_bias: bool
    untie_embeddings_and_output_weights: bool
    vocab_size: int
    precision: str
    rotary_base: int | None = None
    rotary_percent: float | None = None
    max_position_embeddings: int | None = None
    tanh_gelu: bool = False

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], folder: Path) -> ModelArguments:
        """Read them.

        Raises:
            CheckpointError: the manifest lacks some: the checkpoint is of another model or program.
        """
        facts, about = manifest.get("facts", {}), manifest.get("about", {})
        values: dict[str, Any] = {"tanh_gelu": bool(about.get("tanh_gelu", False))}
        missing = []
        for field in dataclasses.fields(cls):
            name = {"vocab_size": _VOCABULARY, "precision": "precision"}.get(
                field.name, f"--{field.name.replace('_', '-')}"
            )
            if name in facts:
                values[field.name] = facts[name]
            elif field.name in _SOMETIMES:
                values[field.name] = about.get(field.name)
            elif field.name != "tanh_gelu":
                missing.append(name)
        if missing:
            raise CheckpointError(
                f"{folder}: its manifest does not tell {', '.join(missing)}; only checkpoints of "
                "pretrain_gpt.py can be read"
            )
        return cls(**values)
