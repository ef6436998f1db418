"""Everything positional that a transformer layer is called with, at the kept tokens.

A layer that sees k of s tokens needs, beside their hidden states, their rotary angles, position ids, ALiBi
slopes times positions, and the rows and columns of its attention mask: of padding, packed documents, sliding
windows. Only a causal mask that is left out stays left out: kept tokens are in ascending order, so causal
attention among them is causal attention again, on the fast path.

The arguments of a layer are known by their names. A tensor that has as many entries as there are tokens and
no known name is refused: leaving it as it is would silently train on wrong positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops.random_ltd import gather_rotary, gather_tokens

MASKS = frozenset(
    "attention_mask attn_mask mask causal_mask src_mask tgt_mask padding_mask key_padding_mask "
    "src_key_padding_mask tgt_key_padding_mask attention_bias attn_bias position_bias relative_pos alibi "
    "rel_pos_bias rel_2d_pos".split()
)
SQUARE_MASKS = frozenset({"src_mask", "tgt_mask", "attn_mask", "causal_mask"})  # of two dimensions: (s, s)
PER_HEAD = frozenset({"src_mask", "tgt_mask", "attn_mask", "alibi"})  # of three: (batch * heads, Q, T)
IDS = frozenset({"position_ids", "positions", "token_type_ids", "segment_ids", "input_ids"})
TABLES = frozenset(
    "position_embeddings position_embedding rotary_pos_emb rotary_emb rotary_embeddings freqs_cis freqs "
    "rope rope_freqs cos sin pos_emb pos_embed pos".split()
)
UNTOUCHED = frozenset(
    "encoder_hidden_states memory memory_key_padding_mask context context_mask head_mask layer_head_mask "
    "rel_embeddings cache_position cross_attn_head_mask cross_attn_layer_head_mask".split()
)
QUERIES = frozenset({"encoder_attention_mask", "memory_mask", "encoder_decoder_position_bias"})
CACHES = frozenset({"past_key_values", "past_key_value", "layer_past", "kv_cache", "cache", "past"})
PACKED = frozenset(
    "cu_seqlens cu_seq_lens cu_seq_lens_q cu_seq_lens_k cu_seqlens_q cu_seqlens_kv packed_seq_params "
    "max_length_q max_length_k max_seqlen".split()
)


@dataclass(frozen=True)
class Places:
    """The kept tokens, for those who gather.

    Attributes:
        index: (batch, kept) int64, ascending.
        length: tokens of the whole sequence.
        batch_first: layout of the hidden states and of tables over positions.
        layer: name, for messages.
        number: of the layer, by which a cache of keys and values knows it.
    """

    index: Tensor
    length: int
    batch_first: bool
    layer: str
    number: int = 0

    @property
    def batch(self) -> int:
        """Samples."""
        return self.index.shape[0]

    @property
    def kept(self) -> int:
        """Tokens kept of each."""
        return self.index.shape[1]

    def refuse(self, name: str, why: str) -> UserError:
        """Return the error about an argument."""
        return UserError(
            f"random_ltd: {self.layer} is called with {name}, {why}; leave the layer out by "
            "data_efficiency.data_routing.random_ltd.random_ltd_layer_id, or call it without"
        )


def gather_mask(mask: Tensor, places: Places, name: str = "attention_mask") -> Tensor:
    """Return a mask or bias of attention among the kept tokens.

    Args:
        mask: (B, H, Q, T), (B, Q, T) or (B, T), where each of B, Q and T is 1 or full size: of batch,
            queries, keys. With a name in ``SQUARE_MASKS`` two dimensions are (Q, T), with one in ``PER_HEAD``
            three are (batch * heads, Q, T).
        places: the kept tokens.
        name: of the argument.

    Returns:
        The same dimensions, with `places.kept` in place of the length. What was one for all samples is one
        for each.

    Raises:
        UserError: a shape that says something else.
    """
    if mask.dim() == 2 and name not in SQUARE_MASKS:
        return _gather_last(mask, places, name)
    if mask.dim() == 2:
        full = mask[None, None]
    elif mask.dim() == 3 and name in PER_HEAD and mask.shape[0] % places.batch == 0:
        full = mask.reshape(places.batch, -1, *mask.shape[1:])
    elif mask.dim() == 3:
        full = mask[:, None]
    else:
        full = mask
    sizes = (1, places.length)
    if (
        full.dim() != 4
        or full.shape[0] not in (1, places.batch)
        or any(n not in sizes for n in full.shape[2:])
    ):
        raise places.refuse(
            name,
            f"of shape {tuple(mask.shape)}, which is no mask over {places.length} tokens of {places.batch} "
            "samples",
        )
    index = places.index
    rows = index[:, None, :, None] if full.shape[2] > 1 else index.new_zeros(1, 1, 1, 1)
    columns = index[:, None, None, :] if full.shape[3] > 1 else index.new_zeros(1, 1, 1, 1)
    samples = torch.arange(places.batch, device=index.device).view(-1, 1, 1, 1)
    samples = samples if full.shape[0] > 1 else torch.zeros_like(samples)
    heads_index = torch.arange(full.shape[1], device=index.device).view(1, -1, 1, 1)
    found = full[samples, heads_index, rows, columns]
    if mask.dim() == 4:
        return found
    if mask.dim() == 3:
        return found.flatten(0, 1)
    return found.expand(-1, 1, -1, -1)


def _gather_last(ids: Tensor, places: Places, name: str) -> Tensor:
    """(..., B, s) at the kept tokens, B being 1 or the batch: (..., batch, kept)."""
    if ids.shape[-1] != places.length or (ids.dim() > 1 and ids.shape[-2] not in (1, places.batch)):
        raise places.refuse(
            name, f"of shape {tuple(ids.shape)}, which does not end with (batch, {places.length})"
        )
    whole = ids.expand(*ids.shape[:-2], places.batch, places.length)
    return torch.gather(whole, -1, places.index.expand(*whole.shape[:-1], places.kept))


def gather_table(table: Tensor, places: Places, name: str) -> Tensor:
    """Return a table over positions, such as rotary angles, at the kept tokens of each sample.

    Args:
        table: (B, s, ...) with batch-first layers, else (s, B, ...); B is 1 or the batch.
        places: the kept tokens.
        name: of the argument.

    Raises:
        UserError: another shape; one without a dimension for samples cannot differ between them.
    """
    sample, token = (0, 1) if places.batch_first else (1, 0)
    if table.dim() < 3 or table.shape[token] != places.length or table.shape[sample] not in (1, places.batch):
        order = f"(batch, {places.length}, ...)" if places.batch_first else f"({places.length}, batch, ...)"
        raise places.refuse(
            name, f"of shape {tuple(table.shape)}; {order} is needed, with a batch of 1 or more"
        )
    if table.shape[sample] == 1:
        return gather_rotary(table.squeeze(sample), places.index, batch_first=places.batch_first)
    return gather_tokens(table, places.index, batch_first=places.batch_first)


def _nested(value: Any, gather: Callable[[Tensor], Tensor]) -> Any:
    """Apply to every tensor of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return gather(value)
    if isinstance(value, Mapping):
        return {key: _nested(inner, gather) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_nested(inner, gather) for inner in value)
    return value


def gather_argument(name: str, value: Any, places: Places, mask_name: str | None = None) -> Any:
    """Return what a layer gets in place of one of its arguments.

    Args:
        name: of the argument.
        value: of the argument, for all tokens.
        places: the kept tokens.
        mask_name: another name for the attention mask.

    Raises:
        UserError: an argument that cannot be had for some of the tokens.
    """
    if value is None or name in UNTOUCHED:
        return value
    if name in PACKED:
        raise places.refuse(name, "boundaries of packed sequences, which would move with the tokens dropped")
    if name in CACHES:
        return _without_cache(name, value, places)
    if name == "use_cache":
        return False
    if name in QUERIES:
        return _nested(value, lambda mask: _gather_queries(mask, places, name))
    if name in MASKS or name == mask_name:
        if not isinstance(value, (Tensor, tuple, list, Mapping)):
            raise places.refuse(name, f"a {type(value).__name__}, which cannot be gathered")
        # ALiBi comes as (batch * heads, 1, s), a mask of three dimensions
        return _nested(value, lambda mask: gather_mask(mask, places, name))
    if name in IDS:
        return _nested(value, lambda ids: _gather_last(ids, places, name))
    if name in TABLES:
        return _nested(value, lambda table: gather_table(table, places, name))
    return _unknown(name, value, places)


def _gather_queries(mask: Tensor, places: Places, name: str) -> Tensor:
    """A mask of attention to another sequence: its rows, where it has some."""
    if mask.dim() < 4 or mask.shape[2] == 1:
        if mask.dim() == 3 or (name == "memory_mask" and mask.dim() == 2):
            raise places.refuse(
                name, f"of shape {tuple(mask.shape)}; (batch, heads, queries, keys) is needed"
            )
        return mask
    rows = places.index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    return torch.gather(mask.expand(places.batch, -1, -1, -1), 2, rows)


def _without_cache(name: str, cache: Any, places: Places) -> None:
    """Leave out an empty cache of keys and values, which training has no use for."""
    length = cache.get_seq_length(places.number) if hasattr(cache, "get_seq_length") else 1
    if int(length):  # of this layer: those before have added the tokens of this pass already
        raise places.refuse(name, "keys and values of earlier tokens: generation does so in evaluation mode")


def _unknown(name: str, value: Any, places: Places) -> Any:
    """Return a value that has nothing to do with positions.

    Raises:
        UserError: it has an entry for each token.
    """

    def check(tensor: Tensor) -> Tensor:
        if places.length > 1 and places.length in tensor.shape:
            raise places.refuse(
                name,
                f"a tensor of shape {tuple(tensor.shape)} that random-LTD does not know. It gathers masks "
                "(attention_mask, or what model_mask_name says), position_ids, position_embeddings and "
                "others of these names",
            )
        return tensor

    return _nested(value, check) if isinstance(value, (Tensor, tuple, list, Mapping)) else value
