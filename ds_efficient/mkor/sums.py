"""Rank-1 statistics of a layer in an engine: sums of input rows and of output gradients of this rank.

Hooks on the layer itself, whatever it computes inside (`nn.Linear`, megatron-core's parallel layers, sparse
or sketched ones): what a forward pass found is added when the backward pass reaches the layer's output, so
that passes that train nothing, and the second pass of recomputed activations, do not count
(`ds_efficient.mkor.statistics`). Only in steps that update the factors is anything summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Collecting:
    """Whether the present step's statistics are wanted: shared by all layers."""

    on = False


class LayerSums:
    """Sums over the micro-batches of a step.

    Attributes:
        rows: input rows seen.
        passes: backward passes that were counted since the beginning.

    Args:
        module: the layer; its first argument is the input (..., in), its result, or the first of several,
            the output (..., out).
        inputs: whether input rows are summed.
        outputs: whether output gradients are.
        collecting: switch.
    """

    def __init__(self, module: nn.Module, inputs: bool, outputs: bool, collecting: Collecting) -> None:
        self._inputs, self._outputs, self._collecting = inputs, outputs, collecting
        self._handle = module.register_forward_hook(self._forward)
        self.rows = self.passes = 0
        self._a: Tensor | None = None
        self._g: Tensor | None = None

    @torch.compiler.disable
    def _forward(self, module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        if not self._collecting.on:
            return
        output = result[0] if isinstance(result, tuple) else result
        if not isinstance(output, Tensor) or not output.requires_grad or not arguments:
            return
        x = arguments[0].detach()
        rows = x.numel() // max(1, x.shape[-1])
        total = x.reshape(-1, x.shape[-1]).sum(0, dtype=torch.float32) if self._inputs else None

        def backward(gradient: Tensor) -> None:
            self.rows += rows
            self.passes += 1
            if total is not None:
                self._a = total if self._a is None else self._a + total
            if self._outputs:
                flat = gradient.detach().reshape(-1, gradient.shape[-1])
                found = flat.sum(0, dtype=torch.float32)
                self._g = found if self._g is None else self._g + found

        output.register_hook(backward)

    def packet(self, side: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what is sent of one vector.

        Args:
            side: "right" for the sum of input rows, "left" for the sum of output gradients.
            dtype: of the vector.

        Returns:
            (2,) fp32: the weight (rows) and the scale; and the vector divided by the scale, of `dtype`.
        """
        total = self._a if side == "right" else self._g
        assert total is not None
        scale = total.abs().amax()
        # an infinite entry stays one, and says so at the owner
        safe = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
        return torch.stack([torch.full_like(safe, float(self.rows)), safe]), (total / safe).to(dtype)

    def ensure(self, inputs: int, outputs: int, device: torch.device) -> None:
        """Take zeros where no backward pass reached the layer, so that every rank has something to send."""
        if self._a is None and self._inputs:
            self._a = torch.zeros(inputs, device=device)
        if self._g is None and self._outputs:
            self._g = torch.zeros(outputs, device=device)

    def clear(self) -> None:
        """Begin a new step."""
        self.rows = 0
        self._a = self._g = None

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()
        self.clear()
