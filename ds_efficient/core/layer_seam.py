"""How a transformer layer of another package lets a technique leave out tokens.

`megatron_patches` implements `LayerSeam` for megatron-core's layers, which know by themselves what is
positional there; techniques use it and know nothing of megatron-core. Layers of any other model are handled
by the technique itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """The tokens that a layer keeps of one micro-batch.

    Attributes:
        index: (batch, kept) int64, ascending: positions in the whole sequence.
        local: (batch, kept / shards) int64, ascending: positions in this rank's part of the sequence; `index`
            itself without sequence parallelism.
    """

    index: Tensor
    local: Tensor


class TokenDrop(Protocol):
    """Chooses the tokens of one layer."""

    def choose(
        self, *, length: int, batch: int, device: torch.device, shards: int = 1, shard: int = 0
    ) -> Kept | None:
        """Return the tokens that the layer keeps in this pass; None: all.

        Args:
            length: tokens of the whole sequence.
            batch: sequences of the micro-batch.
            device: of the result.
            shards: equal parts in which sequence parallelism cuts the sequence; each keeps as many tokens.
            shard: this rank's part.
        """


@runtime_checkable
class LayerSeam(Protocol):
    """A transformer layer that leaves out tokens by itself.

    A layer inherits from it, after its own class, to be recognised by ``isinstance``.
    """

    def install_token_drop(self, drop: TokenDrop) -> None:
        """Ask `drop` for the tokens to keep, in each training pass from now on.

        Raises:
            UserError: the layer is set up in a way that cannot do without some of the tokens.
        """
