"""Statistics of a layer in an engine: sums of input rows and of output gradients of this rank.

Hooks on the layer itself, whatever it computes inside (`nn.Linear`, megatron-core's parallel layers, sparse
or sketched ones): what a forward pass found is added when the backward pass reaches the layer's output, so
that passes that train nothing, and the second pass of recomputed activations, do not count
(`ds_efficient.mkor.statistics`). Only in steps that update the factors is anything summed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_efficient.mkor.signs import RowSketch
from ds_efficient.mkor.statistics import RowSums


class Collecting:
    """Whether the present step's statistics are wanted: shared by all layers.

    Attributes:
        on: whether they are.
        step: optimizer steps done.
    """

    on = False
    step = 0


class LayerSums(RowSums):
    """Sums over the micro-batches of a step, in float32, and what is sent of them.

    Args:
        module: the layer; its input is (..., in), its output (..., out).
        inputs: whether input rows are summed.
        outputs: whether output gradients are.
        collecting: switch.
        sketch: for several vectors a side; None: plain sums.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: bool,
        outputs: bool,
        collecting: Collecting,
        sketch: RowSketch | None = None,
    ) -> None:
        super().__init__(module, inputs=inputs, outputs=outputs, wanted=lambda: collecting.on, sketch=sketch)

    def packet(self, side: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what is sent of one side's vector or vectors.

        Args:
            side: "right" for the sums of input rows, "left" for the sums of output gradients.
            dtype: of the vectors.

        Returns:
            (2,) fp32: the weight (rows) and the scale; with a sketch of r vectors (2 + r,), the sums of signs
            behind them. And the vectors divided by the scale, flat, of `dtype`.
        """
        found = self._inputs if side == "right" else self._outputs
        assert found is not None
        total, rows = found.float(), self.rows
        ones = total[:0]
        if self._sketch is not None:
            total, ones = total[:, :-1].flatten(), total[:, -1]
            rows = self.rows if side == "right" else self.output_rows
        scale = total.abs().amax()
        # an infinite entry stays one, and says so at the owner
        safe = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
        header = torch.stack([torch.full_like(safe, float(rows)), safe])
        return torch.cat([header, ones]), (total / safe).to(dtype)

    def ensure(self, inputs: int, outputs: int, device: torch.device) -> None:
        """Take zeros where no backward pass reached the layer, so that every rank has something to send."""

        def nothing(size: int) -> Tensor:
            sizes = (size,) if self._sketch is None else (self._sketch.vectors, size + 1)
            return torch.zeros(sizes, device=device)

        if self._inputs is None and self._sums_inputs:
            self._inputs = nothing(inputs)
        if self._outputs is None and self._sums_outputs:
            self._outputs = nothing(outputs)
