"""Rank-1 statistics of a layer: the mean of its inputs and the sum of its output gradients over the rows.

For ``y = x W^T + b`` and a loss that is a mean over rows, MKOR takes two vectors of each step:

* a, the mean row of x, with a trailing 1 where the layer has a bias, so that (W | b) is one matrix;
* g, the gradient of the mean loss by a shift of all outputs alike: the sum over rows of dL/dy, which is the
  gradient of the bias. Where there is a bias, its gradient is taken as it is.

Several micro-batches add up: a is weighted by rows, and g like the gradient itself (each loss divided by the
number of micro-batches, as gradient accumulation needs anyway). Only vectors are kept, never activations.

What a forward pass found is added when its backward pass reaches the layer's output. So passes that train
nothing do not count, nor does one that is thrown away; and where activations are recomputed, of the two
forward passes of a layer exactly the one counts whose graph is used (the first for the non-reentrant form of
checkpointing, the second for the reentrant one). No count of passes is needed for that.

With a statistics rank above 1 each side has that many vectors, sums of rows with random signs, whose outer
products estimate the whole second moment (`ds_efficient.mkor.signs`); a bias's gradient then does not do.

A convolution's rows are the positions of its output and its columns the entries of a patch. The sum of all
patches is found from the sum of the images, so no patch is ever laid out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ds_efficient.errors import UserError
from ds_efficient.mkor.signs import RowSketch, row_count
from ds_efficient.mkor.signs import wide_type as _wide


def input_sum(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Return the sum of the rows of a layer's input, and their number.

    Args:
        module: an `nn.Linear`, or an `nn.Conv2d` with one group.
        x: its input, (..., in) or (batch, channels, height, width) or without batch.

    Returns:
        (columns of the weight as a matrix,) in fp32, fp64 for fp64; for a convolution in the order of
        ``weight.flatten(1)``.
    """
    x = x.detach()
    if isinstance(module, nn.Conv2d):
        return _patch_sum(module, x)
    return x.reshape(-1, x.shape[-1]).sum(0, dtype=_wide(x)), row_count(x)


def _patch_sum(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, int]:
    images = x.shape[0] if x.dim() == 4 else 1
    total = x.sum(0, dtype=_wide(x)) if x.dim() == 4 else x.to(_wide(x))
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    total = F.pad(total[None], conv._reversed_padding_repeated_twice, mode=mode)[0]
    spans = []
    for axis in (0, 1):
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        positions = (total.shape[1 + axis] - reach - 1) // conv.stride[axis] + 1
        stride = conv.stride[axis]
        starts = [conv.dilation[axis] * i for i in range(conv.kernel_size[axis])]
        spans.append([slice(start, start + (positions - 1) * stride + 1, stride) for start in starts])
    sums = [total[:, rows, columns].sum((1, 2)) for rows in spans[0] for columns in spans[1]]
    rows = images * len(range(total.shape[1])[spans[0][0]]) * len(range(total.shape[2])[spans[1][0]])
    return torch.stack(sums, 1).flatten(), rows


def output_sum(module: nn.Module, gradient: Tensor) -> Tensor:
    """Return the sum over rows of the gradient of a layer's output, (out,) in fp32, fp64 for fp64."""
    if isinstance(module, nn.Conv2d):
        positions = [axis for axis in range(gradient.dim()) if axis != gradient.dim() - 3]
        return gradient.sum(positions, dtype=_wide(gradient))
    return gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=_wide(gradient))


class RowSums:
    """Sums of a layer's input rows and output gradients over the passes that train it, found by a hook.

    Args:
        module: the layer; its first argument is the input, its result, or the first of several, the output.
        inputs: whether input rows are summed.
        outputs: whether output gradients are.
        wanted: asked in each forward pass whether it counts.
        sketch: sums rows with random signs, several vectors a side; None: plain sums.

    Attributes:
        module: the layer.
        rows: input rows seen since `clear`, those of all micro-batches.
        output_rows: rows of the output, as many but for sequence parallelism; counted with a sketch only.
        passes: backward passes that were counted since the beginning.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        inputs: bool = True,
        outputs: bool = True,
        wanted: Callable[[], bool] = lambda: True,
        sketch: RowSketch | None = None,
    ) -> None:
        self.module = module
        self.rows = self.output_rows = self.passes = 0
        self._sketch = sketch
        self._inputs: Tensor | None = None
        self._outputs: Tensor | None = None
        self._sums_inputs, self._sums_outputs, self._wanted = inputs, outputs, wanted
        self._handles: list[Any] = [module.register_forward_hook(self._forward)]

    @torch.compiler.disable
    def _forward(self, module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        if not self._wanted():
            return
        output = result[0] if isinstance(result, tuple) else result
        if not isinstance(output, Tensor) or not output.requires_grad or not arguments:
            return
        x = arguments[0]
        named = (0, 0) if self._sketch is None else self._sketch.begin_pass()
        total, rows = None, row_count(x)
        if self._sums_inputs:
            total, rows = self._sum_inputs(x, named)

        def backward(gradient: Tensor) -> None:
            self.rows += rows
            self.passes += 1
            if total is not None:
                self._inputs = total if self._inputs is None else self._inputs + total
            if self._sums_outputs:
                found = self._sum_outputs(gradient.detach(), named)
                self._outputs = found if self._outputs is None else self._outputs + found

        output.register_hook(backward)

    def _sum_inputs(self, x: Tensor, named: tuple[int, int]) -> tuple[Tensor, int]:
        """Return the sum of a pass's input rows, and their number."""
        if self._sketch is None:
            return input_sum(self.module, x)
        if isinstance(self.module, nn.Conv2d):
            return self._sketch.of_patches(named, self.module, x)
        return self._sketch.of_rows("right", named, x), row_count(x)

    def _sum_outputs(self, gradient: Tensor, named: tuple[int, int]) -> Tensor:
        """Return the sum over the rows of the gradient of a pass's output."""
        if self._sketch is None:
            return output_sum(self.module, gradient)
        if isinstance(self.module, nn.Conv2d):
            self.output_rows += row_count(gradient, -3)
            return self._sketch.of_positions(named, gradient)
        self.output_rows += row_count(gradient)
        return self._sketch.of_rows("left", named, gradient)

    def clear(self) -> None:
        """Begin a new step."""
        self.rows = self.output_rows = 0
        self._inputs = self._outputs = None
        if self._sketch is not None:
            self._sketch.restart()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()


class LayerStatistics(RowSums):
    """The vectors of one layer over the micro-batches of a step.

    Attributes:
        with_bias: whether the bias is trained, so that the last column of (W | b) is there.

    Args:
        module: an `nn.Linear` or `nn.Conv2d` whose weight is trained.
        sketch: for several vectors a side; None: the mean vectors.
    """

    def __init__(self, module: nn.Linear | nn.Conv2d, sketch: RowSketch | None = None) -> None:
        self.with_bias = module.bias is not None and module.bias.requires_grad
        super().__init__(module, outputs=not self.with_bias or sketch is not None, sketch=sketch)
        if module.bias is not None and self.with_bias and sketch is None:
            self._handles.append(module.bias.register_post_accumulate_grad_hook(self._bias))

    def _bias(self, bias: Tensor) -> None:
        # The micro-batches so far, and before anybody clips it.
        if bias.grad is not None:
            self._outputs = bias.grad.detach().to(_wide(bias.grad), copy=True)

    def vectors(self, loss_scale: float = 1.0) -> tuple[Tensor, Tensor] | None:
        """Return a and g of the step so far, or all of them; None where no backward pass reached the layer.

        Args:
            loss_scale: what the loss was multiplied by.

        Returns:
            (in,) or, with a trained bias, (in + 1,); and (out,). With a sketch of r vectors (r, in), or
            (r, in + 1), and (r, out).
        """
        if not self.rows or self._inputs is None or self._outputs is None:
            return None
        if self._sketch is not None:
            inputs = self._inputs if self.with_bias else self._inputs[:, :-1]
            return inputs / math.sqrt(self.rows), (
                self._outputs[:, :-1] * (math.sqrt(self.output_rows) / loss_scale)
            )
        a = self._inputs / self.rows
        if self.with_bias:
            a = torch.cat([a, a.new_ones(1)])
        return a, self._outputs / loss_scale


def preconditioned_layers(
    model: nn.Module, exclude: tuple[str, ...] = ()
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that MKOR works on, by their dotted names.

    These are `nn.Linear` and `nn.Conv2d` (of one group) with a trained weight of their own: a weight or bias
    that several modules share has several inputs, and one that is computed (a parametrization) no gradient.

    Args:
        model: to look through.
        exclude: ends of dotted module names to leave out.

    Raises:
        UserError: no such layer, or one without a shape yet (a lazy layer).
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or _excluded(name, exclude):
            continue
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if isinstance(weight, UninitializedParameter):
            raise UserError(f"layer {name}: a lazy layer has no shape yet; run the model once before MKOR")
        if (
            weight is None
            or not weight.requires_grad
            or (isinstance(module, nn.Conv2d) and module.groups > 1)
        ):
            continue
        if all(owners[id(parameter)] == 1 for parameter in (weight, bias) if parameter is not None):
            found[name] = module
    if not found:
        left_out = f", with exclude={list(exclude)}" if exclude else ""
        raise UserError(
            f"MKOR: the model has no nn.Linear or nn.Conv2d with a trained weight of its own{left_out}; "
            "use the optimizer alone"
        )
    return found


def _excluded(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
