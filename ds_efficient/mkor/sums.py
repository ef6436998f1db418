"""Statistics of a layer in an engine: sums of input rows and of output gradients of this rank.

Hooks on the layer itself, whatever it computes inside (`nn.Linear`, megatron-core's parallel layers, sparse
or sketched ones): what a forward pass found is added when the backward pass reaches the layer's output, so
that passes that train nothing, and the second pass of recomputed activations, do not count
(`ds_efficient.mkor.statistics`). Only in steps that update the factors is anything summed.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    def vector(self, side: str) -> Tensor:
        """Return the sums of one side: "right" for the input rows, "left" for the output gradients."""
        found = self._inputs if side == "right" else self._outputs
        assert found is not None
        return found

    def count(self, side: str) -> int:
        """Return the rows of one side as they are weighed."""
        return self.output_rows if self._sketch is not None and side == "left" else self.rows

    def ensure(self, inputs: int, outputs: int, device: torch.device) -> None:
        """Take zeros where no backward pass reached the layer, so that every rank has something to send."""

        def nothing(size: int) -> Tensor:
            sizes = (size,) if self._sketch is None else (self._sketch.vectors, size + 1)
            return torch.zeros(sizes, device=device)

        if self._inputs is None and self._sums_inputs:
            self._inputs = nothing(inputs)
        if self._outputs is None and self._sums_outputs:
            self._outputs = nothing(outputs)


def packets(layers: Sequence[LayerSums], side: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what is sent of one side's vector or vectors of layers of one size.

    Args:
        layers: at least one.
        side: "right" for the sums of input rows, "left" for the sums of output gradients.
        dtype: of the vectors.

    Returns:
        (layers, 2) fp32: the weight (rows) and the scale; with a sketch of r vectors (layers, 2 + r), the
        sums of signs behind them. And the vectors divided by the scale, flat, of `dtype`.
    """
    total = torch.stack([one.vector(side) for one in layers]).float()
    ones = total[:, :0]
    if total.dim() == 3:
        total, ones = total[..., :-1].flatten(1), total[..., -1]
    scale = total.abs().amax(1, keepdim=True)
    # an infinite entry stays one, and says so at the owner
    safe = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    counts = [one.count(side) for one in layers]
    if len(set(counts)) == 1:
        rows = torch.full_like(safe, float(counts[0]))
    else:  # filled, not copied: a copy from the host would wait for the device
        rows = torch.stack([torch.full_like(safe[0], float(count)) for count in counts])
    return torch.cat([rows, safe, ones], 1), (total / safe).to(dtype).view(-1)
