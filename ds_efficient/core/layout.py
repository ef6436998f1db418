"""How a run is laid out over its ranks: parallel sizes, ZeRO, precision, batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_efficient.core.shape import ModelShape, Recompute
from ds_efficient.errors import UserError

PRECISIONS = ("fp32", "bf16", "fp16")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FUSED_ADAM = "fused_adam"
NO_RECOMPUTE = Recompute()


@dataclass(frozen=True)
class ParallelLayout:
    """Everything that decides whether a combination runs, and what it costs.

    Attributes:
        world_size: ranks.
        tensor, pipeline, context, expert: parallel sizes.
        virtual_pipeline_layers: ``--num-layers-per-virtual-pipeline-stage``, or None.
        sequence_parallel: norms and dropout cut along the sequence over the tensor-parallel ranks.
        zero_stage: DeepSpeed's ``zero_optimization.stage``.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        optimizer: ``"fused_adam"`` where DeepSpeed takes its FusedAdam, else the lower-case type
            (``"torch_adam"``, ``"sgd"``, ...).
        offload_optimizer, offload_param: None, ``"cpu"`` or ``"nvme"``.
        micro_batch_size: samples of one pass of one data-parallel rank.
        global_batch_size: samples of one optimizer step; None: one micro-batch on each data-parallel rank.
        recompute: activation recomputation.
        device: ``"cuda"``, ``"cpu"``, or None where it is not known.
        transformer_engine: whether Transformer Engine's layers are used.
        gradient_accumulation_fusion: megatron-core's option of that name.
        deepcompile: DeepSpeed's ``compile.deepcompile``.
        num_layers, heads, query_groups, ffn, vocab_size, seq_length, tied_embeddings: of the model; None
            where it is not known: the rules about them are then not applied.
        num_experts: experts of a mixture-of-experts model, or None.
    """

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    virtual_pipeline_layers: int | None = None
    sequence_parallel: bool = False
    zero_stage: int = 0
    precision: str = "fp32"
    optimizer: str = FUSED_ADAM
    offload_optimizer: str | None = None
    offload_param: str | None = None
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    recompute: Recompute = NO_RECOMPUTE
    device: str | None = None
    transformer_engine: bool = False
    gradient_accumulation_fusion: bool = False
    deepcompile: bool = False
    num_layers: int | None = None
    heads: int | None = None
    query_groups: int | None = None
    ffn: int | None = None
    vocab_size: int | None = None
    seq_length: int | None = None
    tied_embeddings: bool | None = None
    num_experts: int | None = None

    @property
    def model_parallel(self) -> int:
        """Ranks that share one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data-parallel ranks, at least 1."""
        return max(1, self.world_size // max(1, self.model_parallel))

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.micro_batch_size * self.data if self.global_batch_size is None else self.global_batch_size

    @property
    def num_microbatches(self) -> int:
        """Passes of one data-parallel rank in one optimizer step, at least 1."""
        return max(1, self.global_batch // max(1, self.micro_batch_size * self.data))

    @property
    def element_bytes(self) -> int:
        """Bytes of a parameter in the forward pass."""
        return BYTES[self.precision]

    @classmethod
    def from_config(
        cls, deepspeed: Mapping[str, Any], shape: ModelShape | None = None, **options: Any
    ) -> ParallelLayout:
        """Return the layout that a DeepSpeed JSON, a model and options (fields of this class) describe.

        Batch sizes and precision may stand in the JSON or in the options; where both speak they must agree.

        Raises:
            UserError: they do not agree, or the JSON enables bf16 and fp16.
        """
        problems: list[str] = []
        values: dict[str, Any] = _from_json(deepspeed, problems)
        if shape is not None:
            values |= {
                "num_layers": shape.num_layers,
                "heads": shape.num_attention_heads,
                "query_groups": shape.groups,
                "ffn": shape.ffn,
                "vocab_size": shape.vocab_size,
                "seq_length": shape.seq_length,
                "tied_embeddings": not shape.untie_embeddings,
            }
        given = {name: value for name, value in options.items() if value is not None}
        problems += _disagreements(deepspeed, given)
        layout = cls(**{**values, **given})
        if layout.global_batch_size is None:
            passes = _number(deepspeed, "gradient_accumulation_steps") or 1
            values["global_batch_size"] = layout.micro_batch_size * layout.data * passes
            layout = cls(**{**values, **given})
        elif "micro_batch_size" not in {**values, **given}:
            passes = _number(deepspeed, "gradient_accumulation_steps") or 1
            values["micro_batch_size"] = max(1, layout.global_batch_size // (layout.data * passes))
            layout = cls(**{**values, **given})
        problems += _accumulation(deepspeed, layout)
        if problems:
            raise UserError("\n  ".join(["the layout contradicts itself:", *problems]))
        return layout


_BATCH_KEYS = {"micro_batch_size": "train_micro_batch_size_per_gpu", "global_batch_size": "train_batch_size"}


def _number(deepspeed: Mapping[str, Any], key: str) -> int | None:
    value = deepspeed.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _section(deepspeed: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    for key in path:
        value = deepspeed.get(key)
        if not isinstance(value, Mapping):
            return {}
        deepspeed = value
    return deepspeed


def _offload(zero: Mapping[str, Any], key: str) -> str | None:
    device = _section(zero, key).get("device")
    return None if device in (None, "none") else str(device)


def optimizer_kind(deepspeed: Mapping[str, Any]) -> str:
    """Return the optimizer a DeepSpeed JSON asks for; without one, torch's Adam is taken."""
    section = _section(deepspeed, "optimizer")
    kind = str(section.get("type", "torch_adam")).lower()
    if kind in ("adam", "adamw", "fusedadam"):
        torch_adam = bool(_section(section, "params").get("torch_adam", False))
        return "torch_adam" if torch_adam else FUSED_ADAM
    return kind


def _from_json(deepspeed: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    zero = _section(deepspeed, "zero_optimization")
    keys = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16"}  # bfloat16: DeepSpeed's older name
    halves = list(
        dict.fromkeys(name for key, name in keys.items() if _section(deepspeed, key).get("enabled") is True)
    )
    if len(halves) > 1:
        problems.append("bf16.enabled and fp16.enabled are both true; keep one")
    values: dict[str, Any] = {
        "zero_stage": _number(zero, "stage") or 0,
        "precision": halves[0] if halves else "fp32",
        "optimizer": optimizer_kind(deepspeed),
        "offload_optimizer": _offload(zero, "offload_optimizer"),
        "offload_param": _offload(zero, "offload_param"),
        "deepcompile": _section(deepspeed, "compile").get("deepcompile") is True,
    }
    for name, key in _BATCH_KEYS.items():
        if _number(deepspeed, key) is not None:
            values[name] = deepspeed[key]
    return values


def _disagreements(deepspeed: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} = {deepspeed[key]} in the JSON, {name} = {given[name]} asked for; remove one of them"
        for name, key in _BATCH_KEYS.items()
        if name in given and _number(deepspeed, key) not in (None, given[name])
    ]


def _accumulation(deepspeed: Mapping[str, Any], layout: ParallelLayout) -> list[str]:
    passes = _number(deepspeed, "gradient_accumulation_steps")
    per_pass = layout.micro_batch_size * layout.data
    if passes is None or layout.global_batch % max(1, per_pass) or passes * per_pass == layout.global_batch:
        return []
    return [
        f"gradient_accumulation_steps = {passes}, but global batch {layout.global_batch} / (micro-batch "
        f"{layout.micro_batch_size} x {layout.data} data-parallel ranks) = {layout.num_microbatches}; "
        "change one of them"
    ]
