"""A transformer layer that processes some of the tokens: the others pass it unchanged.

`install` changes the class of a layer object to one that inherits from its own, so that the layer keeps its
attributes, its parameters' names, its hooks and what it is an instance of; no name of a wrapper gets into a
state dict.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_efficient.core.layer_seam import Kept, LayerSeam
from ds_efficient.core.passes import recomputing
from ds_efficient.errors import UserError
from ds_efficient.ops.random_ltd import apply_to_kept
from ds_efficient.random_ltd.positions import Places, gather_argument
from ds_efficient.random_ltd.sampler import TokenSampler

_ATTENTION_KERNELS = frozenset({None, "sdpa", "eager"})
_MAKES_POSITIONS = ("rotary", "alibi", "relativeposition")  # in the names of classes


class LayerDrop:
    """Which tokens one layer keeps, and how many it left out (`ds_efficient.core.layer_seam.TokenDrop`).

    Args:
        name: of the layer, for messages.
        layer: its number, counted over the whole model.
        sampler: of this rank.
        drops: False for a layer that only counts tokens.
        on_pass: called once for each training pass with (samples, tokens of each, kept of each).

    Attributes:
        passes: training passes, recomputations not counted.
        tokens, dropped: of these passes, over samples and positions.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        sampler: TokenSampler,
        *,
        drops: bool = True,
        on_pass: Callable[[int, int, int], None] | None = None,
    ) -> None:
        self.name = name
        self.layer = layer
        self.sampler = sampler
        self.drops = drops
        self.on_pass = on_pass
        self.passes = 0
        self.tokens = 0
        self.dropped = 0
        self._last: tuple[int, int] | None = None

    @torch.compiler.disable
    def choose(
        self, *, length: int, batch: int, device: torch.device, shards: int = 1, shard: int = 0
    ) -> Kept | None:
        """Return the tokens that the layer keeps in this pass; None: all."""
        passes = self.sampler.passes
        micro_batch = passes.current(self.layer)
        if micro_batch is None:
            return None
        kept = self.sampler.kept(length, shards)
        self._count(micro_batch, batch, length, kept)
        if not self.drops or kept >= length or not batch:
            return None
        index = self.sampler.index(self.layer, micro_batch, length, kept, batch, device, shards)
        if shards == 1:
            return Kept(index, index)
        part = kept // shards
        local = index[:, shard * part : (shard + 1) * part] - shard * (length // shards)
        return Kept(index, local)

    def _count(self, micro_batch: int, batch: int, length: int, kept: int) -> None:
        place = (self.sampler.passes.step, micro_batch)
        if place == self._last or recomputing():
            return
        self._last = place
        self.passes += 1
        self.tokens += batch * length
        self.dropped += batch * (length - kept) if self.drops else 0
        if self.on_pass is not None:
            self.on_pass(batch, length, kept)


class _Dropping(nn.Module):
    """What `install` puts in front of a layer's class."""

    _token_drop: _PlainLayer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on the kept tokens, in training; on all tokens otherwise."""
        run = super().forward
        if not self.training:
            return run(*args, **kwargs)
        return self._token_drop.run(self, run, args, kwargs)


@functools.cache
def _dropping_class(cls: Any) -> type[nn.Module]:
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Dropping, cls), body)


class _PlainLayer:
    """Calls a layer of any model with the kept tokens.

    Args:
        layer: the module.
        drop: chooses the tokens.
        batch_first: (batch, s, hidden), else (s, batch, hidden).
        mask_name: another name of the attention mask.
    """

    def __init__(
        self, layer: nn.Module, drop: LayerDrop, *, batch_first: bool, mask_name: str | None
    ) -> None:
        self.drop = drop
        self.batch_first = batch_first
        self.mask_name = mask_name
        parameters = list(inspect.signature(type(layer).forward).parameters.values())[1:]
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._names = [parameter.name for parameter in parameters if parameter.kind in kinds]
        self._makes_positions = sorted(
            {
                type(module).__name__
                for module in layer.modules()
                if any(part in type(module).__name__.lower() for part in _MAKES_POSITIONS)
            }
        )

    def run(self, layer: nn.Module, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``run`` on the kept tokens of the hidden states among the arguments."""
        key, hidden = self._hidden(args, kwargs)
        length, batch = hidden.shape[1 if self.batch_first else 0], hidden.shape[0 if self.batch_first else 1]
        kept = self.drop.choose(length=length, batch=batch, device=hidden.device)
        if kept is None:
            return run(*args, **kwargs)
        self._check_layer(layer, args, kwargs)
        places = Places(kept.index, length, self.batch_first, self.drop.name, self.drop.layer)
        known: dict[int, Any] = {}  # arguments by the identity of what the layer gets instead

        def gather(name: str, value: Any) -> Any:
            if name in ("src_mask", "tgt_mask") and (kwargs.get("is_causal") or kwargs.get("tgt_is_causal")):
                return value[..., : places.kept, : places.kept]  # causal: the same for any ascending tokens
            if name in ("src_mask", "tgt_mask") and isinstance(value, Tensor) and value.dim() == 2:
                value = value[None].expand(places.batch * _heads(layer), -1, -1)
            gathered = gather_argument(name, value, places, self.mask_name)
            if isinstance(gathered, Tensor):
                known[id(gathered)] = value
            return gathered

        names = [self._name(position) for position in range(len(args))]
        others = [
            value if position == key else gather(names[position], value)
            for position, value in enumerate(args)
        ]
        named = {name: value if name == key else gather(name, value) for name, value in kwargs.items()}

        def on_part(part: Tensor) -> Any:
            if isinstance(key, int):
                return run(*others[:key], part, *others[key + 1 :], **named)
            return run(*others, **{**named, key: part})

        made = apply_to_kept(on_part, hidden, kept.index, batch_first=self.batch_first)
        if not isinstance(made, (tuple, list)) or hasattr(made, "_replace"):
            return made
        # What a layer hands on as it got it, such as T5's position bias, the next layer needs for all tokens.
        return type(made)(known.get(id(item), item) for item in made)

    def _name(self, position: int) -> str:
        return self._names[position] if position < len(self._names) else f"argument {position + 1}"

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor]:
        """Return where the hidden states are among the arguments, and they themselves."""
        key: int | str = 0
        if args:
            hidden = args[0]
        else:
            key = self._names[0] if self._names and self._names[0] in kwargs else "hidden_states"
            hidden = kwargs.get(key)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.is_nested:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise UserError(
                f"random_ltd: {self.drop.name} is called with {shape}; hidden states (batch, tokens, "
                "width) or (tokens, batch, width) are needed as its first argument"
            )
        return key, hidden

    def _check_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse layers that would take the place among the kept tokens for a position in the sequence."""
        name = self.drop.name
        for module in layer.modules():
            kernel = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if kernel not in _ATTENTION_KERNELS:
                raise UserError(
                    f"random_ltd: {name}: attn_implementation {kernel!r} finds documents and windows by "
                    'position; use "sdpa", whose causal attention without a mask runs on the flash kernel too'
                )
        given = {self._name(position) for position, value in enumerate(args) if value is not None}
        given |= {key for key, value in kwargs.items() if value is not None}
        positional = {"position_ids", "position_embeddings", "rotary_pos_emb", "alibi", "freqs_cis", "cos"}
        positional |= {"position_bias", "relative_pos", "rotary_emb", "positions"}
        if self._makes_positions and not given & positional:
            raise UserError(
                f"random_ltd: {name}: its {', '.join(self._makes_positions)} makes positions from the number "
                "of tokens, and would count the kept ones; pass positions to the layer, or leave it out by "
                "data_efficiency.data_routing.random_ltd.random_ltd_layer_id"
            )


def _heads(layer: nn.Module) -> int:
    """Heads of a torch.nn.TransformerEncoderLayer."""
    attention: Any = getattr(layer, "self_attn", None)
    return int(getattr(attention, "num_heads", 1))


def install(
    layer: nn.Module, drop: LayerDrop, *, batch_first: bool | None = None, mask_name: str | None = None
) -> None:
    """Let a layer process only the tokens that `drop` chooses, in place.

    Args:
        layer: a `LayerSeam`, or any module whose first argument is the hidden states and whose result is the
            hidden states, or a tuple or list that begins with them.
        drop: chooses.
        batch_first: layout of the hidden states; None: of torch's own layers as they say, else batch first.
        mask_name: name of the argument that is the attention mask, where it is no usual one.

    Raises:
        UserError: a layer that cannot take part.
    """
    if isinstance(layer, LayerSeam):
        layer.install_token_drop(drop)
        return
    if isinstance(layer, _Dropping):
        raise UserError(f"random_ltd: {drop.name} drops tokens already: its layer stands in two places")
    if "forward" in layer.__dict__:
        raise UserError(
            f"random_ltd: {drop.name}: another tool has replaced its forward function; call "
            "ds_efficient.initialize before it"
        )
    if batch_first is None:
        batch_first = bool(getattr(getattr(layer, "self_attn", None), "batch_first", True))
    plain = _PlainLayer(layer, drop, batch_first=batch_first, mask_name=mask_name)
    cls: Any = type(layer)
    layer.__class__ = _dropping_class(cls)
    object.__setattr__(layer, "_token_drop", plain)
