"""megatron-core's transformer layer with the seam for dropped tokens.

A subclass that stands in the layer's spec: parameters, their names and sharded checkpoints are those of
megatron-core's layer. Without a `TokenDrop` it is that layer. What is positional in the arguments follows the
kept tokens: rotary angles and masks by their positions in the whole sequence; a causal mask that is left out
stays left out. With sequence parallelism a rank holds a part of the sequence and keeps as many tokens of it
as every other rank, so that nothing needs to be sent.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from ds_efficient.core.layer_seam import Kept, LayerSeam, TokenDrop
from ds_efficient.errors import UserError
from ds_efficient.ops.random_ltd import apply_to_kept
from ds_efficient.random_ltd.positions import Places, gather_argument, gather_mask, gather_table
from megatron_patches.fusions import at_kept, rotary_is_fused

# Positional order of TransformerLayer.forward; TransformerBlock passes keywords only.
_ORDER = ("hidden_states", "attention_mask", "context", "context_mask", "rotary_pos_emb")
_UNSUPPORTED = {
    "context": "cross attention",
    "packed_seq_params": "packed sequences; use --reset-attention-mask for document boundaries",
    "rotary_pos_cos": "separate rotary cosines",
    "rotary_pos_sin": "separate rotary sines",
    "rotary_pos_cos_sin": "separate rotary cosines and sines",
    "sequence_len_offset": "a sequence offset",
}


class TokenDropTransformerLayer(TransformerLayer, LayerSeam):  # type: ignore[misc]
    """TransformerLayer that may leave out tokens in training.

    Attributes:
        token_drop: chooses the tokens; None: all are processed.
    """

    token_drop: TokenDrop | None = None

    def install_token_drop(self, drop: TokenDrop) -> None:
        """Ask `drop` for the tokens to keep, in each training pass from now on.

        Raises:
            UserError: the layer is set up in a way that cannot do without some of the tokens.
        """
        _refuse_unsupported(self.config)
        self.token_drop = drop

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on the kept tokens; the others pass unchanged."""
        named = {**dict(zip(_ORDER, args, strict=False)), **kwargs}
        inference = named.get("inference_context") is not None or named.get("inference_params") is not None
        if self.token_drop is None or not self.training or inference or len(args) > len(_ORDER):
            return super().forward(*args, **kwargs)
        hidden: Tensor = named.pop("hidden_states")  # (S / shards, B, H)
        shards = parallel_state.get_tensor_model_parallel_world_size() if self.config.sequence_parallel else 1
        length = hidden.shape[0] * shards
        kept = self.token_drop.choose(
            length=length,
            batch=hidden.shape[1],
            device=hidden.device,
            shards=shards,
            shard=parallel_state.get_tensor_model_parallel_rank() if shards > 1 else 0,
        )
        if kept is None:
            return super().forward(*args, **kwargs)
        return self._forward_kept(hidden, named, kept, length)

    def _forward_kept(self, hidden: Tensor, named: dict[str, Any], kept: Kept, length: int) -> Any:
        number = self.layer_number - 1
        whole = Places(kept.index, length, False, f"layer {number}")
        for name, meaning in _UNSUPPORTED.items():
            if named.get(name) is not None:
                raise UserError(
                    f"random_ltd: layer {number} is called with {name}: {meaning} cannot be had for some of "
                    "the tokens; set data_efficiency.data_routing.random_ltd.enabled to false"
                )
        for name in ("attention_mask", "attention_bias"):
            if named.get(name) is not None:
                named[name] = gather_mask(named[name], whole, name)
        angles = named.get("rotary_pos_emb")
        if isinstance(angles, tuple):
            named["rotary_pos_emb"] = tuple(_rotary_angles(part, whole) for part in angles)
        elif angles is not None:
            named["rotary_pos_emb"] = _rotary_angles(angles, whole)
        if named.get("padding_mask") is not None:  # (B, S / shards)
            local = Places(kept.local, hidden.shape[0], False, whole.layer)
            named["padding_mask"] = gather_argument("padding_mask", named["padding_mask"], local)
        run = super().forward

        def on_part(part: Tensor) -> Any:
            return run(hidden_states=part, **named)

        return apply_to_kept(on_part, hidden, kept.local, batch_first=False)


def _rotary_angles(angles: Tensor, places: Places) -> Tensor:
    """Those of the kept tokens: noted for the fused rotary embedding, else gathered."""
    noted = None
    if angles.shape[0] == places.length and rotary_is_fused():
        noted = at_kept(angles, places.index)
    return gather_table(angles, places, "rotary_pos_emb") if noted is None else noted


def _refuse_unsupported(config: Any) -> None:
    """Name what needs all tokens of a sequence, or one list of positions for all samples."""

    def refuse(what: str, remedy: str) -> None:
        raise UserError(
            f"random_ltd: {what}: tokens cannot be dropped with it; {remedy}, or set "
            "data_efficiency.data_routing.random_ltd.enabled to false"
        )

    if config.context_parallel_size > 1:
        refuse(f"--context-parallel-size {config.context_parallel_size}", "use 1")
    if config.apply_rope_fusion:
        refuse("apply_rope_fusion", "use --no-rope-fusion")
    if getattr(config, "fused_single_qkv_rope", False):
        refuse("fused_single_qkv_rope", "switch it off")
    if getattr(config, "multi_latent_attention", False):
        refuse("multi_latent_attention, which makes positions inside of the layer", "use another attention")
    if getattr(config, "window_size", None) is not None:
        refuse(f"window_size {config.window_size}, a window in kept tokens", "leave the window out")
    graphs = getattr(config, "cuda_graph_impl", "none")
    if getattr(config, "enable_cuda_graph", False) or graphs not in (None, "none"):
        refuse("CUDA graphs, whose shapes are fixed", "switch them off")
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        refuse("overlap_moe_expert_parallel_comm, which goes round the layer", "switch it off")


def layer_class(current: Any) -> Any:
    """Return the class that stands in a layer's spec in place of `current`.

    Raises:
        UserError: another kind of layer.
    """
    if current is not TransformerLayer:
        raise UserError(
            f"random_ltd: layers of class {getattr(current, '__name__', current)} cannot drop tokens; only "
            "TransformerLayer can"
        )
    return TokenDropTransformerLayer


__all__ = ["TokenDropTransformerLayer", "layer_class"]
