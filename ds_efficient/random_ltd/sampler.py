"""Which tokens each layer keeps in each micro-batch: one keyed draw for all layers of a rank.

The key of a layer's draw is (run seed, step, micro-batch, layer counted over the whole model, data-parallel
rank [, part of the sequence]); the last under sequence parallelism only. Nothing of it is a tensor-parallel
rank, so these ranks agree; nothing is stored, so a recomputation, a resumed run and a pipeline stage find
the same tokens again (`ds_efficient.core.passes`).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.core.passes import Passes
from ds_efficient.errors import UserError
from ds_efficient.ops.random_ltd import sample_layers
from ds_efficient.random_ltd.config import TokenScheduleConfig
from ds_efficient.random_ltd.schedule import TokenSchedule

_DRAWS_KEPT = 2  # a pipeline alternates between a forward pass and the recomputation of an older one


def schedule_of(
    config: TokenScheduleConfig, length: int, *, shards: int = 1, layers: tuple[int, int] | None = None
) -> TokenSchedule:
    """Return the schedule of the configuration for sequences of `length` tokens.

    Args:
        config: of the run.
        length: tokens of a sequence: where the schedule ends unless it names another end.
        shards: sequence-parallel parts; each keeps as many tokens.
        layers: (layers of the model, layers that drop), for layer tokens.

    Raises:
        UserError: the schedule does not fit.
    """
    longest = length if config.max_value is None else config.max_value
    return TokenSchedule(
        min(config.min_value, longest),
        longest,
        config.schedule_config.require_steps,
        config.schedule_config.seq_per_step,
        config.schedule_type,
        seq_length=length,
        multiple_of=shards,
        total_layer_num=None if layers is None else layers[0],
        random_ltd_layer_num=None if layers is None else layers[1],
    )


class TokenSampler:
    """Draws the kept tokens of all dropping layers of this rank.

    Args:
        key: of the run's token drops.
        config: how many tokens are kept.
        passes: says step and micro-batch.
        rank: data-parallel rank.

    Attributes:
        layers: numbers of the dropping layers, counted over the whole model.
    """

    def __init__(self, key: Key, config: TokenScheduleConfig, passes: Passes, *, rank: int = 0) -> None:
        self.key = key
        self.config = config
        self.passes = passes
        self.rank = rank
        self.layers: list[int] = []
        self._draws: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._schedule: Callable[[int, int], TokenSchedule] = functools.lru_cache(256)(self._make_schedule)

    def _make_schedule(self, length: int, shards: int) -> TokenSchedule:
        return schedule_of(self.config, length, shards=shards)

    def kept(self, length: int, shards: int = 1) -> int:
        """Return how many of `length` tokens are kept in this step.

        Raises:
            UserError: the parts of the sequence cannot keep equal numbers of tokens.
        """
        if length % shards:
            raise UserError(f"random_ltd: {length} tokens cannot be cut into {shards} equal parts")
        return self._schedule(length, shards).kept(self.passes.step, length)

    def index(
        self,
        layer: int,
        micro_batch: int,
        length: int,
        kept: int,
        batch: int,
        device: torch.device,
        shards: int,
    ) -> Tensor:
        """Return (batch, kept) int64 positions, ascending: `kept / shards` of each part of the sequence.

        Args:
            layer: one of `layers`.
            micro_batch: number of the pass in this step.
            length: tokens of a sequence.
            kept: how many are kept.
            batch: sequences.
            device: of the result.
            shards: parts of the sequence.
        """
        settings = (self.passes.step, micro_batch, length, kept, batch, device, shards, len(self.layers))
        found = self._draws.get(settings)
        if found is None:
            found = self._draw(micro_batch, length, kept, batch, device, shards)
            self._draws[settings] = found
            if len(self._draws) > _DRAWS_KEPT:
                self._draws.popitem(last=False)
        else:
            self._draws.move_to_end(settings)
        return found[self.layers.index(layer)]

    def _draw(
        self, micro_batch: int, length: int, kept: int, batch: int, device: torch.device, shards: int
    ) -> Tensor:
        """Draw for all layers in one launch: (layers, batch, kept)."""
        keys = [self._keys(layer, micro_batch, shards) for layer in self.layers]
        flat = [key for of_layer in keys for key in of_layer]
        drawn = sample_layers(length // shards, kept // shards, batch, flat, device)
        if shards == 1:
            return drawn
        parts = drawn.view(len(keys), shards, batch, kept // shards)
        first = torch.arange(0, length, length // shards, device=drawn.device)
        parts = parts + first.view(1, shards, 1, 1)
        return parts.transpose(1, 2).reshape(len(keys), batch, kept)

    def _keys(self, layer: int, micro_batch: int, shards: int) -> Sequence[int]:
        key = self.key.fold(self.passes.step, micro_batch, layer, self.rank)
        return [int(key)] if shards == 1 else [int(key.fold(shard)) for shard in range(shards)]

    def forget(self) -> None:
        """Let go of the draws of a step that is done."""
        self._draws.clear()
