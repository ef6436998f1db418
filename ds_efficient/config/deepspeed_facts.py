"""What DeepSpeed does with its own keys: meaning, type, what it no longer takes. Checked against 0.19.8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """A top-level key of DeepSpeed: its JSON schema and one line on what it does."""

    schema: dict[str, Any]
    text: str


_FLAG: dict[str, Any] = {"type": "boolean"}
_OBJECT: dict[str, Any] = {"type": "object"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 1}
_DTYPE: dict[str, Any] = {"enum": ["fp16", "bf16", "fp32"]}

TOP_LEVEL: dict[str, Key] = {
    "activation_checkpointing": Key(_OBJECT, "DeepSpeed's own activation checkpointing."),
    "aio": Key({"type": ["object", "null"]}, "Asynchronous I/O for offloading to disk."),
    "allgather_size": Key({"type": "number"}, "Bucket size of the old form of zero_optimization."),
    "autotuning": Key(_OBJECT, "DeepSpeed's autotuner."),
    "bf16": Key(_OBJECT, "Training in bfloat16."),
    "bfloat16": Key(_OBJECT, "Older name of bf16."),
    "checkpoint": Key(_OBJECT, "How checkpoints are written."),
    "comet": Key(_OBJECT, "Metrics to Comet."),
    "comms_logger": Key(_OBJECT, "Log of the communication calls."),
    "communication_data_type": Key(
        {"enum": ["fp16", "bf16", "fp32", None]}, "Type in which gradients are exchanged."
    ),
    "compile": Key(_OBJECT, "DeepCompile."),
    "csv_monitor": Key(_OBJECT, "Metrics to CSV files."),
    "data_efficiency": Key(_OBJECT, "Curriculum learning and random token dropping."),
    "data_types": Key(_OBJECT, "Types of gradient accumulation, parameters and buffers."),
    "dataloader_drop_last": Key(_FLAG, "Drop the last, incomplete batch."),
    "datastates_ckpt": Key({}, "DataStates checkpoint engine."),
    "disable_allgather": Key(_FLAG, "Replace the all-gather by broadcasts."),
    "disable_python_gc": Key(_FLAG, "Collect garbage only between steps."),
    "dump_state": Key(_FLAG, "Print the engine's state at the start."),
    "expert_parallel": Key(_OBJECT, "Expert parallelism."),
    "flops_profiler": Key(_OBJECT, "FLOPs profiler."),
    "fp16": Key(_OBJECT, "Training in float16 with loss scaling."),
    "gradient_accumulation_steps": Key(_COUNT, "Micro-batches of a rank in one optimizer step."),
    "gradient_allreduce_op": Key({"enum": ["mean", "sum"]}, "How gradients are combined over the ranks."),
    "gradient_clipping": Key(
        {"type": "number", "minimum": 0}, "Largest gradient norm; 0 switches clipping off. Default 1.0."
    ),
    "gradient_predivide_factor": Key(
        {"type": "number", "exclusiveMinimum": 0}, "Divisor of gradients before they are summed."
    ),
    "hybrid_engine": Key(_OBJECT, "Engine for training and generation in turn."),
    "log_level": Key({"type": ["string", "null"]}, "DeepSpeed's log level."),
    "managed_gradient_accumulation": Key(_FLAG, "Let DeepSpeed count the micro-batches."),
    "memory_breakdown": Key(_FLAG, "Log memory at several points of a step."),
    "optimizer": Key(_OBJECT, "Optimizer: type and params."),
    "pipeline": Key(_OBJECT, "DeepSpeed's pipeline engine."),
    "prescale_gradients": Key(_FLAG, "Scale gradients before they are summed."),
    "scheduler": Key(_OBJECT, "Learning-rate schedule: type and params."),
    "seq_parallel_communication_data_type": Key(_DTYPE, "Type of sequence-parallel gradient sums."),
    "sequence_parallel_size": Key(_COUNT, "Ranks that share a sequence (Ulysses)."),
    "steps_per_print": Key({"type": ["integer", "null"], "minimum": 1}, "Steps between two progress lines."),
    "tensor_parallel": Key(_OBJECT, "DeepSpeed's automatic tensor parallelism."),
    "tensorboard": Key(_OBJECT, "Metrics to TensorBoard."),
    "timers": Key(_OBJECT, "Throughput timer."),
    "torch_autocast": Key(_OBJECT, "Mixed precision by torch.autocast."),
    "train_batch_size": Key(_COUNT, "Sequences in one optimizer step, over all ranks."),
    "train_micro_batch_size_per_gpu": Key(_COUNT, "Sequences of one forward pass of a rank."),
    "use_data_before_expert_parallelism": Key(_FLAG, "Order of data and expert parallel ranks."),
    "vocabulary_size": Key({"type": ["integer", "null"]}, "Vocabulary size, for a warning only."),
    "wall_clock_breakdown": Key(_FLAG, "Log the time of forward, backward and step."),
    "wandb": Key(_OBJECT, "Metrics to Weights & Biases."),
    "weight_quantization": Key(_OBJECT, "Weight quantisation for inference."),
    "zero_allow_untested_optimizer": Key(_FLAG, "Let ZeRO run with an optimizer it does not know."),
    "zero_force_ds_cpu_optimizer": Key(_FLAG, "Insist on DeepSpeed's CPU optimizer when offloading."),
    "zero_optimization": Key(_OBJECT, "ZeRO: partitioning over the data-parallel ranks."),
}

# Not looked up while DeepSpeed parses a minimal configuration, yet known to it.
RARE_TOP_LEVEL = frozenset({"allgather_size", "sequence_parallel_size"})

_GONE = "DeepSpeed 0.19.8 removed it and stops when the key is there; "

REMOVED: dict[str, str] = {
    "amp": _GONE + 'use "bf16", "fp16" or "torch_autocast"',
    "compression_training": _GONE + "delete the section",
    "curriculum_learning": _GONE + "use data_efficiency.data_sampling.curriculum_learning",
    "eigenvalue": _GONE + "delete the section",
    "elasticity": _GONE + "set the batch size keys directly",
    "graph_harvesting": _GONE + "delete the key",
    "nebula": _GONE + "delete the section; checkpoints are written by torch",
    "progressive_layer_drop": _GONE + "delete the section",
    "quantize_training": _GONE + "delete the section",
    "sparse_attention": _GONE + "delete the section",
    "sparse_gradients": _GONE + "delete the key",
}

REMOVED_ZERO: dict[str, str] = {
    "mics_hierarchical_params_gather": _GONE + "delete the key",
    "mics_shard_size": _GONE + "delete the key; zero_hpz_partition_size is the nearest there is",
    "zeropp_loco_param": _GONE + "delete the key",
}

REMOVED_OPTIMIZERS = frozenset({"onebitadam", "onebitlamb", "zerooneadam"})

# Keys of the sections in which ours stand; DeepSpeed drops any other without a word.
PARENT_KEYS: dict[str, tuple[str, ...]] = {
    "data_efficiency": ("enabled", "seed", "data_sampling", "data_routing"),
    "data_efficiency.data_routing": ("enabled", "random_ltd"),
}

# Keys below the top level whose values DeepSpeed takes from a list.
CHOICES: dict[str, tuple[Any, ...]] = {
    "data_types.grad_accum_dtype": ("fp32", "bf16", "fp16", None),
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
    "zero_optimization.stage": (0, 1, 2, 3),
}

# Where "auto" does have a meaning, to DeepSpeed itself; a path stands for everything below it.
AUTO_ALLOWED = (
    "autotuning",
    "data_types.keep_in_fp32_modules",
    "expert_parallel",
    "pipeline.partition",
    "pipeline.stages",
    "zero_optimization.zenflow.select_interval",
    "zero_optimization.zenflow.select_strategy",
    "zero_optimization.zenflow.update_interval",
)

OPTIMIZERS = (
    "Adam",
    "AdamW",
    "Adagrad",
    "Lamb",
    "Lion",
    "Muon",
    "MuAdam",
    "MuAdamW",
    "MuSGD",
    "SGD",
    "RMSprop",
    "Adafactor",
    "NAdam",
    "RAdam",
)

SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
