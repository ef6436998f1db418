"""Bytes that a rank sends in one optimizer step, by category.

Collectives over n ranks are counted as rings: an all-reduce of B bytes sends 2 (n-1)/n B a rank, an
all-gather or reduce-scatter (n-1)/n B, with B the full size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_efficient.core.inventory import Inventory
from ds_efficient.core.layout import ParallelLayout
from ds_efficient.core.memory import rank_parameters
from ds_efficient.core.shape import ModelShape


@dataclass(frozen=True)
class CommunicationEstimate:
    """Bytes sent by the rank that sends most, for one optimizer step.

    Attributes:
        gradients: reduction over the data-parallel ranks.
        parameters: gathering of partitioned parameters (ZeRO 1 to 3).
        tensor: tensor and sequence parallelism.
        pipeline: activations and their gradients between stages, and tied embedding gradients.
    """

    gradients: float
    parameters: float
    tensor: float
    pipeline: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.gradients + self.parameters + self.tensor + self.pipeline

    def to_json(self) -> dict[str, int]:
        """Return bytes by category."""
        names = ("gradients", "parameters", "tensor", "pipeline", "total")
        return {name: round(getattr(self, name)) for name in names}


def data_parallel_bytes(
    parameters: float, layout: ParallelLayout, *, all_reduce: bool = True
) -> tuple[float, float]:
    """Return (gradient bytes, parameter bytes) a rank sends in one optimizer step.

    - ZeRO 0: one all-reduce of the gradients.
    - ZeRO 1: one reduction and one all-gather of the updated parameters.
    - ZeRO 2: a reduction for each micro-batch, and the all-gather.
    - ZeRO 3: a reduce-scatter for each micro-batch; the parameters gathered in each forward and backward
      pass.

    Args:
        parameters: of the rank (of its tensor-parallel shard and pipeline stage).
        layout: sizes and stage.
        all_reduce: whether stages 1 and 2 reduce a bucket with an all-reduce, of which each rank keeps its
            part (DeepSpeed's ``use_multi_rank_bucket_allreduce``, on by default), or only to the rank that
            owns it.
    """
    ring = (layout.data - 1) / layout.data
    size = parameters * layout.element_bytes
    passes = layout.num_microbatches if layout.pipeline == 1 else 1
    one_way = ring * size
    if layout.zero_stage == 0:
        return 2 * one_way, 0.0
    reduction = one_way * (2 if all_reduce else 1)
    if layout.zero_stage == 1:
        return reduction, one_way
    if layout.zero_stage == 2:
        return reduction * passes, one_way
    return one_way * passes, 2 * one_way * passes


def tensor_parallel_bytes(shape: ModelShape, layout: ParallelLayout, stage: int) -> float:
    """Return what a rank of a pipeline stage sends to its tensor-parallel ranks in one optimizer step.

    Each layer has two all-reduces of the hidden states forward and two backward. Sequence parallelism makes
    each an all-gather and a reduce-scatter, of the same size, and gathers the inputs of linear_qkv and
    linear_fc1 once more in the backward pass. Recomputed layers do their forward part twice.
    """
    if layout.tensor == 1:
        return 0.0
    ring = (layout.tensor - 1) / layout.tensor
    tokens = shape.seq_length * layout.micro_batch_size
    hidden = tokens * shape.hidden_size * layout.element_bytes
    layers = max(1, shape.num_layers // layout.pipeline)
    again = layout.recompute.full_layers(layers)
    reduce = 2 * ring * hidden  # one all-reduce, or a gather and a scatter
    gather = ring * hidden if layout.sequence_parallel else 0.0
    sent = layers * (4 * reduce + 2 * gather) + again * 2 * reduce
    if layout.recompute.selects("mlp"):
        sent += (layers - again) * reduce
    if stage == 0:
        sent += ring * hidden * (1 if layout.sequence_parallel else 2)  # the sum over the cut vocabulary
        sent += ring * hidden if layout.sequence_parallel else 0.0  # and its gradient's gather
    if stage == layout.pipeline - 1:
        sent += reduce + gather  # the output layer's input and its gradient
        sent += 3 * 2 * ring * tokens * 4  # the loss: maximum, sum, target's logit, in fp32
    return sent * layout.num_microbatches


def pipeline_bytes(shape: ModelShape, layout: ParallelLayout, stage: int) -> float:
    """Return what a rank of a pipeline stage sends to its neighbours in one optimizer step."""
    if layout.pipeline == 1:
        return 0.0
    across = layout.tensor if layout.sequence_parallel else 1
    one = shape.seq_length * layout.micro_batch_size * shape.hidden_size * layout.element_bytes / across
    last = layout.pipeline - 1
    directions = (1 if stage < last else 0) + (1 if stage > 0 else 0)
    sent = one * directions * layout.num_microbatches
    if not shape.untie_embeddings and stage in (0, last):
        # an all-reduce between two ranks sends the size once
        sent += shape.vocab_size * shape.hidden_size * layout.element_bytes / layout.tensor
    return sent


def estimate_communication(
    inventory: Inventory, layout: ParallelLayout, deepspeed: Mapping[str, Any] | None = None
) -> CommunicationEstimate:
    """Return the bytes of the pipeline stage that sends most.

    Args:
        inventory: of the whole model, as the techniques leave it (`Inventory.with_actions`); without a known
            shape tensor and pipeline traffic counts 0.
        layout: one that runs.
        deepspeed: the JSON, for ``zero_optimization.use_multi_rank_bucket_allreduce``.
    """
    zero = (deepspeed or {}).get("zero_optimization")
    all_reduce = (
        bool(zero.get("use_multi_rank_bucket_allreduce", True)) if isinstance(zero, Mapping) else True
    )
    found = []
    for stage in range(layout.pipeline):
        held = rank_parameters(inventory, layout, stage)
        gradients, parameters = data_parallel_bytes(held, layout, all_reduce=all_reduce)
        tensor = pipeline = 0.0
        if inventory.model is not None:
            tensor = tensor_parallel_bytes(inventory.model, layout, stage)
            pipeline = pipeline_bytes(inventory.model, layout, stage)
        found.append(CommunicationEstimate(gradients, parameters, tensor, pipeline))
    return max(found, key=lambda one: one.total)
