"""Reads what MKOR must know of a linear layer: how it is stored, cut, and what its input rows are."""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_efficient.core.compact_weight import compact_of
from ds_efficient.core.linear_seam import Cut
from ds_efficient.core.plain_linears import is_conv1d
from ds_efficient.core.technique import RunContext
from ds_efficient.errors import UserError
from ds_efficient.mkor.blocks import Layer


def read_layer(where: str, name: str, module: nn.Module, context: RunContext, *, exact: bool) -> Layer:
    """Return the description of a layer, as the other techniques have left it.

    Args:
        where: its name in this rank's model, for messages.
        name: its name in the whole model.
        module: the layer.
        context: sizes of the run.
        exact: one block a layer, whatever tensor parallelism cuts.

    Raises:
        UserError: its gradient cannot be seen as one matrix here.
    """
    weight = module._parameters.get("weight")
    if weight is None or not weight.requires_grad:
        raise UserError(
            f"mkor: {where} ({type(module).__name__}) has no trained parameter `weight`; add it to "
            "mkor.exclude"
        )
    if len(getattr(weight, "ds_shape", weight.shape)) != 2:
        raise UserError(f"mkor: {where}: its weight is no matrix; add it to mkor.exclude")
    cut, stride = _cut(module, weight)
    compact = compact_of(module)
    if compact is not None and cut is not None and context.tensor_parallel_size > 1 and exact:
        raise UserError(
            f"mkor: {where} has a sparse weight, which one rank cannot expand for the others: with "
            'tensor parallelism use mkor.tensor_parallel "block", or disable one of the two techniques there'
        )
    bias = module._parameters.get("bias")
    full_out, full_in = _sizes(module, weight)
    return Layer(
        name=name,
        module=module,
        full_out=full_out,
        full_in=full_in,
        bias=bias is not None and bias.requires_grad,
        cut=cut,
        stride=stride,
        sequence_parallel=bool(getattr(module, "sequence_parallel", False)) and cut is not None,
        transposed=_transposed(module),
        compact=compact,
    )


def _cut(module: nn.Module, weight: Any) -> tuple[Cut | None, int]:
    """Return the dimension that tensor parallelism cuts, and the number of stacked matrices."""
    stride = int(getattr(weight, "partition_stride", 1))
    if hasattr(module, "output_size_per_partition"):
        return "out", stride
    if hasattr(module, "input_size_per_partition"):
        return "in", stride
    return None, 1


def _transposed(module: nn.Module) -> bool:
    """Whether the weight is stored (in, out): transformers' Conv1D, or a layer made from it."""
    return is_conv1d(module) or bool(getattr(module, "transposed", False))


def _sizes(module: Any, weight: Any) -> tuple[int, int]:
    """Return (out, in) of the whole layer."""
    if hasattr(module, "output_size") and hasattr(module, "input_size"):
        return int(module.output_size), int(module.input_size)
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    first, second = getattr(weight, "ds_shape", weight.shape)
    return (int(second), int(first)) if _transposed(module) else (int(first), int(second))
