"""Memory of one rank by category, for any ZeRO stage and layout. No device is needed.

Formulas (N: parameters of the rank, D: data-parallel ranks, e: bytes of an element in the forward pass):

========================  ====================  ==============  ==============  ==============
bytes a rank              ZeRO 0                ZeRO 1          ZeRO 2          ZeRO 3
========================  ====================  ==============  ==============  ==============
parameters                e N                   e N             e N             e N / D
gradients                 e N                   e N             e N / D         e N / D
fp32 master copy          4 N (0 in fp32)       4 N / D         4 N / D         4 N / D
optimizer states          s N                   s N / D         s N / D         s N / D
buffers of techniques     b                     b               b               b
========================  ====================  ==============  ==============  ==============

with s = 8 for Adam (see `STATE_BYTES`) and b of `Action.buffer_bytes`. DeepSpeed keeps a master copy in fp32
from stage 1 on even when the model is fp32. Activations are those that the backward pass needs
(`layer_activation_bytes`), of all micro-batches in flight: a pipeline stage p of P holds
min(micro-batches, P - p) under the 1F1B schedule.

The peak lies at the end of the forward pass or at the start of the backward one, where the activations of all
layers meet the logits, or in the optimizer step. What the caching allocator reserves on top, and the
library's own buffers (CUDA context, NCCL, cuBLAS), are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ds_efficient.core.inventory import Inventory, ModuleInfo
from ds_efficient.core.layout import ParallelLayout
from ds_efficient.core.shape import ModelShape
from ds_efficient.core.technique import Action

GIB = 2**30
# Bytes of state a parameter for each optimizer type of DeepSpeed (fp32 states).
STATE_BYTES = {"lion": 4, "fusedlion": 4, "sgd": 0, "adagrad": 4, "muon": 4, "rmsprop": 4}
ADAM_STATE_BYTES = 8
LOSS_BYTES = 4  # the softmax that the loss keeps is fp32


@dataclass(frozen=True)
class ZeroBuffers:
    """Sizes of DeepSpeed's buffers in elements, from ``zero_optimization``.

    Attributes:
        reduce_bucket: gradients gathered for one reduction; allocated whole.
        overlap: two reduce buckets instead of one.
        max_live: parameters that ZeRO 3 keeps gathered at most.
        contiguous: whether the reduce bucket is a buffer of its own.
    """

    reduce_bucket: int = 500_000_000
    overlap: bool = False
    max_live: int = 1_000_000_000
    contiguous: bool = True

    @classmethod
    def from_config(cls, deepspeed: Mapping[str, Any]) -> ZeroBuffers:
        """Read ``zero_optimization``; keys that are absent have DeepSpeed's defaults."""
        zero = deepspeed.get("zero_optimization")
        zero = zero if isinstance(zero, Mapping) else {}

        def number(key: str, default: int) -> int:
            value = zero.get(key, default)
            return int(value) if isinstance(value, int | float) else default

        return cls(
            reduce_bucket=number("reduce_bucket_size", cls.reduce_bucket),
            overlap=bool(zero.get("overlap_comm") or False),
            max_live=number("stage3_max_live_parameters", cls.max_live),
            contiguous=bool(zero.get("contiguous_gradients", True)),
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the fullest rank.

    Attributes:
        zero_stage: ZeRO stage.
        pipeline_stage: the stage, from 0, that needs most.
        parameters, gradients, optimizer: see the module; `optimizer` has the master copy and the states.
        activations: kept for the backward pass.
        logits: the output layer's result and what the loss keeps and makes of it.
        workspace: gradients of activations, and layers that are recomputed, while the backward pass runs.
        communication: DeepSpeed's buckets; with ZeRO 3 also the gathered parameters.
        step: what the optimizer step needs for a moment: fp32 gradients of the rank's partition.
        host: bytes in host memory (offloading).
        buffers: of the techniques (masks, operands); ZeRO neither partitions nor offloads them.
        accumulating: whether gradients of earlier micro-batches are there while activations are made.
    """

    zero_stage: int
    pipeline_stage: int
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float
    communication: float
    step: float
    host: float = 0.0
    buffers: float = 0.0
    accumulating: bool = False

    @property
    def resident(self) -> float:
        """Bytes held all the time."""
        return self.parameters + self.gradients + self.optimizer + self.buffers

    @property
    def peak(self) -> float:
        """Highest bytes of a step.

        Gradients are made while activations are freed: with one micro-batch there are none at the start
        of the backward pass.
        """
        steady = self.parameters + self.optimizer + self.buffers
        steady += self.gradients if self.accumulating else 0.0
        backward = steady + self.activations + max(self.logits, self.workspace + self.communication)
        return max(backward, self.resident + self.communication, self.resident + self.step)

    def to_json(self) -> dict[str, float]:
        """Return bytes by category."""
        names = (
            "parameters",
            "gradients",
            "optimizer",
            "buffers",
            "activations",
            "logits",
            "workspace",
            "communication",
            "step",
            "host",
            "peak",
        )
        return {name: round(getattr(self, name)) for name in names} | {"pipeline_stage": self.pipeline_stage}


@dataclass(frozen=True)
class Activations:
    """What decides the activations beside shape and layout.

    Attributes:
        attention: ``"fused"`` (flash: no scores are kept) or ``"unfused"``.
        hidden_dropout, attention_dropout: probabilities; above 0 a mask is kept.
        kept: share of its saved input that a module keeps, by module (techniques).
    """

    attention: str = "fused"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    kept: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def with_actions(cls, actions: Iterable[Action], **options: Any) -> Activations:
        """Return settings with what the techniques' actions save."""
        kept: dict[str, float] = {}
        for action in actions:
            if not action.skipped and action.saved_activation_fraction:
                kept[action.module] = kept.get(action.module, 1.0) * (1.0 - action.saved_activation_fraction)
        return cls(kept=kept, **options)


def layer_activation_bytes(
    shape: ModelShape, layout: ParallelLayout, settings: Activations | None = None, layer: int | None = None
) -> dict[str, float]:
    """Return what one layer keeps for one micro-batch, in bytes a rank.

    Counted tensor by tensor for megatron-core's local layers (norms, projections, attention, MLP written in
    torch), each tensor once (t: tensor-parallel size; what the norms see is cut by sequence parallelism):

    - ``"residual"``: the input of both norms, and masks of dropout;
    - ``"projections"``: inputs of linear_qkv, linear_proj, linear_fc1 (the norms' outputs; the attention's,
      which the attention kernel keeps too);
    - ``"attention"``: the mixed q, k, v; rotated q and k;
    - ``"core"``: the kernel's log-sum-exp; unfused: the probabilities instead;
    - ``"mlp"``: input and output of the activation function (SwiGLU: both halves, the SiLU, the product).

    Args:
        layer: layer whose modules' kept share counts; None: none.
    """
    settings = settings or Activations()
    e, tensor = layout.element_bytes, layout.tensor
    tokens = shape.seq_length * layout.micro_batch_size
    hidden, query, kv, ffn = shape.hidden_size, shape.query_size, shape.kv_size, shape.ffn
    across = tensor if layout.sequence_parallel else 1

    def kept(name: str) -> float:
        return settings.kept.get(f"decoder.layers.{layer}.{name}", 1.0) if layer is not None else 1.0

    residual = tokens * 2 * hidden * e / across
    if settings.hidden_dropout > 0:
        residual += tokens * 2 * hidden / across
    inputs = tokens * hidden * e / across
    projections = inputs * kept("self_attention.linear_qkv") + inputs * kept("mlp.linear_fc1")
    # compressing linear_proj's input saves nothing while the fused kernel keeps the same tensor
    shared = 1.0 if settings.attention == "fused" else kept("self_attention.linear_proj")
    projections += tokens * query * e / tensor * shared
    rotated = (query + kv) if shape.position_embedding_type == "rope" else 0
    attention = tokens * (query + 2 * kv + rotated) * e / tensor
    if settings.attention == "fused":
        core = tokens * shape.num_attention_heads * 4 / tensor
    else:
        scores = tokens * shape.seq_length * shape.num_attention_heads / tensor
        core = scores * (e + ((1 + e) if settings.attention_dropout > 0 else 0))
    inner = tokens * ffn * e / tensor
    mlp = inner * (3 if shape.swiglu else 1) + inner * kept("mlp.linear_fc2")
    return {
        "residual": residual,
        "projections": projections,
        "attention": attention,
        "core": core,
        "mlp": mlp,
    }


def _layer_bytes(parts: Mapping[str, float], layout: ParallelLayout) -> float:
    """Return what a layer keeps under selective recomputation; whole layers are not in here."""
    left_out = {"mlp": "mlp", "core_attn": "core"}
    skipped = {part for module, part in left_out.items() if layout.recompute.selects(module)}
    return sum(size for part, size in parts.items() if part not in skipped)


def _stage_layers(shape: ModelShape, layout: ParallelLayout, stage: int) -> range:
    per_stage = max(1, shape.num_layers // layout.pipeline)
    return range(stage * per_stage, min((stage + 1) * per_stage, shape.num_layers))


def _stage_activations(
    shape: ModelShape, layout: ParallelLayout, settings: Activations, stage: int
) -> tuple[float, float]:
    """Return (bytes one micro-batch keeps on a stage, workspace of its backward pass)."""
    layers = _stage_layers(shape, layout, stage)
    tokens = shape.seq_length * layout.micro_batch_size
    across = layout.tensor if layout.sequence_parallel else 1
    stream = tokens * shape.hidden_size * layout.element_bytes / across
    whole = layout.recompute.full_layers(len(layers))
    chunk = layout.recompute.num_layers or 1 if layout.recompute.method != "block" else 1
    kept, largest = 0.0, 0.0
    for place, layer in enumerate(layers):
        parts = layer_activation_bytes(shape, layout, settings, layer)
        largest = max(largest, sum(parts.values()))
        if place >= whole:
            kept += _layer_bytes(parts, layout)
        elif place % chunk == 0:
            kept += stream
    if stage == layout.pipeline - 1:
        kept += 2 * stream  # inputs of the last norm and of the output layer
    parts = layer_activation_bytes(shape, layout, settings)
    workspace = parts["mlp"] + 2 * stream
    if whole:
        workspace += largest * min(chunk, whole)
    else:
        workspace += sum(parts.values()) - _layer_bytes(parts, layout)
    return kept, workspace


def logits_bytes(shape: ModelShape, layout: ParallelLayout) -> float:
    """Return the bytes of the logits of one micro-batch and of the loss's fp32 softmax on one rank.

    The logits in the forward type live with an fp32 copy of them, which becomes the softmax and then, in
    place, its gradient; that gradient is cast back.
    """
    elements = shape.seq_length * layout.micro_batch_size * shape.vocab_size / layout.tensor
    return elements * (layout.element_bytes + LOSS_BYTES)


def _on_stage(inventory: Inventory, layout: ParallelLayout, stage: int) -> list[ModuleInfo]:
    """Return the modules of a pipeline stage."""
    layers = max(1, inventory.num_layers // layout.pipeline)
    last = layout.pipeline - 1

    def stage_of(module: ModuleInfo) -> int:
        if module.layer is not None:
            return min(module.layer // layers, last)
        return 0 if module.kind == "embedding" else last

    return [module for module in inventory if stage_of(module) == stage]


def rank_parameters(inventory: Inventory, layout: ParallelLayout, stage: int) -> int:
    """Return the parameters of one rank of a pipeline stage.

    With tied embeddings the last stage holds a copy of the embedding's weight.
    """
    last = layout.pipeline - 1
    held = sum(module.rank_parameters(layout.tensor) for module in _on_stage(inventory, layout, stage))
    if stage == last and last > 0:
        for module in inventory:
            if module.kind == "output" and module.tied_to is not None:
                cut = layout.tensor if module.tensor_parallel else 1
                held += module.in_features * module.out_features // cut
    return held


def _states(layout: ParallelLayout, optimizer: str, held: float, shard: float) -> tuple[float, float]:
    """Return (bytes of master copy and states, bytes of fp32 gradients in the step)."""
    master = 4.0 if layout.zero_stage > 0 or layout.precision != "fp32" else 0.0
    states = STATE_BYTES.get(optimizer, ADAM_STATE_BYTES)
    part = shard if layout.zero_stage > 0 else held
    return part * (master + states), part * (4.0 if layout.precision != "fp32" else 0.0)


def _stage_estimate(
    inventory: Inventory, layout: ParallelLayout, buffers: ZeroBuffers, settings: Activations, stage: int
) -> MemoryEstimate:
    zero, e = layout.zero_stage, layout.element_bytes
    held = float(rank_parameters(inventory, layout, stage))
    modules = _on_stage(inventory, layout, stage)
    shard = held / layout.data
    parameters = e * (shard if zero == 3 else held)
    gradients = e * (shard if zero >= 2 else held)
    optimizer, step = _states(layout, layout.optimizer, held, shard)
    host = 0.0
    if layout.offload_optimizer is not None:
        host, optimizer, step = optimizer + step, 0.0, 0.0
    if layout.offload_param is not None:
        host, parameters = host + parameters, 0.0
    communication = 0.0
    if zero in (1, 2) and buffers.contiguous:
        communication = float(buffers.reduce_bucket * e * (2 if buffers.overlap else 1))
    elif zero == 3:
        live = min(held, buffers.max_live) if layout.data > 1 else 0.0
        communication = e * (min(held, buffers.reduce_bucket) + live)
    kept = logits = workspace = 0.0
    if inventory.model is not None:
        kept, workspace = _stage_activations(inventory.model, layout, settings, stage)
        kept *= min(layout.num_microbatches, layout.pipeline - stage)
        logits = logits_bytes(inventory.model, layout) if stage == layout.pipeline - 1 else 0.0
    return MemoryEstimate(
        zero_stage=zero,
        pipeline_stage=stage,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        logits=logits,
        workspace=workspace,
        communication=communication,
        step=step,
        host=host,
        buffers=float(sum(module.rank_buffer_bytes(layout.tensor) for module in modules)),
        accumulating=layout.num_microbatches > 1,
    )


def estimate(
    inventory: Inventory,
    layout: ParallelLayout,
    *,
    buffers: ZeroBuffers | None = None,
    settings: Activations | None = None,
) -> MemoryEstimate:
    """Return the memory of the pipeline stage that needs most.

    Args:
        inventory: of the whole model, as the techniques leave it (`Inventory.with_actions`); without a known
            shape activations and logits count 0.
        layout: one that runs (`ds_efficient.core.parallelism.check`).
        buffers: DeepSpeed's buffer sizes.
        settings: attention, dropout, and what techniques save.
    """
    buffers, settings = buffers or ZeroBuffers(), settings or Activations()
    stages = (
        _stage_estimate(inventory, layout, buffers, settings, stage) for stage in range(layout.pipeline)
    )
    return max(stages, key=lambda found: found.peak)


def estimate_stages(
    inventory: Inventory,
    layout: ParallelLayout,
    *,
    buffers: ZeroBuffers | None = None,
    settings: Activations | None = None,
) -> list[MemoryEstimate]:
    """Return the estimates for ZeRO 0 to 3 with all else equal; offloading only where the stage has it."""
    found = []
    for stage in range(4):
        changed = replace(
            layout,
            zero_stage=stage,
            offload_optimizer=layout.offload_optimizer if stage else None,
            offload_param=layout.offload_param if stage == 3 else None,
        )
        found.append(estimate(inventory, changed, buffers=buffers, settings=settings))
    return found
