"""Core attention through torch's scaled_dot_product_attention: flash on a GPU, fused on a CPU."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ds_efficient.errors import UserError

# Legend: S query length, T key length, B batch, D head size; H heads and G query groups of this rank.


class SdpaCoreAttention(MegatronModule):  # type: ignore[misc]
    """softmax(Q K^T / sqrt(D)) V with the memory of flash attention; grouped queries are not repeated.

    Takes megatron-core's layout (sequence first) and returns (S, B, H*D). ``attention_mask`` follows
    megatron-core: boolean, True means hidden, broadcastable to (B, 1, S, T); None means causal (or nothing
    hidden where the layer's mask type says so).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        _refuse_unsupported(config)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # Query-key layer scaling divides here and multiplies in the softmax again: without a separate fp16
        # softmax the two cancel, so the scale is the plain one.
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the context of the queries.

        Args:
            query: (S, B, H, D).
            key: (T, B, G, D).
            value: (T, B, G, D).
            attention_mask: boolean, True is hidden; None for causal.

        Raises:
            UserError: packed sequences, which need Transformer Engine.
        """
        if packed_seq_params is not None:
            raise UserError(
                "packed sequences (packed_seq_params) need --transformer-impl transformer_engine; "
                "use --reset-attention-mask for document boundaries here"
            )
        q_BHSD, k_BGTD, v_BGTD = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # noqa: N806
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        causal = attention_mask is None and mask_type == AttnMaskType.causal and query.size(0) > 1
        visible = None if attention_mask is None else attention_mask.logical_not()
        if attention_bias is not None:
            hidden = (
                0.0 if visible is None else torch.zeros_like(attention_bias).masked_fill(~visible, -math.inf)
            )
            visible = attention_bias + hidden
        dropout = self.attention_dropout if self.training else 0.0
        with self._dropout_stream(dropout):
            context_BHSD = scaled_dot_product_attention(  # noqa: N806
                q_BHSD,
                k_BGTD,
                v_BGTD,
                attn_mask=visible,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=q_BHSD.size(1) != k_BGTD.size(1),
            )
        return context_BHSD.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _dropout_stream(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        """Heads are cut over tensor-parallel ranks, so each rank draws from its own stream."""
        if dropout == 0.0 or self.config.sequence_parallel:  # with SP the whole block is forked already
            return contextlib.nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()


def _refuse_unsupported(config: Any) -> None:
    """Name what only Transformer Engine's attention has."""
    if config.context_parallel_size != 1:
        raise UserError(
            f"--context-parallel-size {config.context_parallel_size}: the local attention has no context "
            "parallelism; use 1, or --transformer-impl transformer_engine"
        )
    if getattr(config, "window_size", None) is not None:
        raise UserError(
            f"window_size {config.window_size}: the local attention has no sliding window; leave it out, "
            "or use --transformer-impl transformer_engine"
        )
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        raise UserError(f"softmax_type {config.softmax_type!r}: only 'vanilla' is supported here")
