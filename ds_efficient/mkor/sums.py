"""Rank-1 statistics of a layer in an engine: sums of input rows and of output gradients of this rank.

Hooks on the layer itself, whatever it computes inside (`nn.Linear`, megatron-core's parallel layers, sparse
or sketched ones): what a forward pass found is added when the backward pass reaches the layer's output, so
that passes that train nothing, and the second pass of recomputed activations, do not count
(`ds_efficient.mkor.statistics`). Only in steps that update the factors is anything summed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_efficient.mkor.statistics import RowSums


class Collecting:
    """Whether the present step's statistics are wanted: shared by all layers."""

    on = False


class LayerSums(RowSums):
    """Sums over the micro-batches of a step, in float32, and what is sent of them.

    Args:
        module: the layer; its input is (..., in), its output (..., out).
        inputs: whether input rows are summed.
        outputs: whether output gradients are.
        collecting: switch.
    """

    def __init__(self, module: nn.Module, inputs: bool, outputs: bool, collecting: Collecting) -> None:
        super().__init__(module, inputs=inputs, outputs=outputs, wanted=lambda: collecting.on)

    def packet(self, side: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what is sent of one vector.

        Args:
            side: "right" for the sum of input rows, "left" for the sum of output gradients.
            dtype: of the vector.

        Returns:
            (2,) fp32: the weight (rows) and the scale; and the vector divided by the scale, of `dtype`.
        """
        found = self._inputs if side == "right" else self._outputs
        assert found is not None
        total = found.float()
        scale = total.abs().amax()
        # an infinite entry stays one, and says so at the owner
        safe = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
        return torch.stack([torch.full_like(safe, float(self.rows)), safe]), (total / safe).to(dtype)

    def ensure(self, inputs: int, outputs: int, device: torch.device) -> None:
        """Take zeros where no backward pass reached the layer, so that every rank has something to send."""
        if self._inputs is None and self._sums_inputs:
            self._inputs = torch.zeros(inputs, device=device)
        if self._outputs is None and self._sums_outputs:
            self._outputs = torch.zeros(outputs, device=device)
