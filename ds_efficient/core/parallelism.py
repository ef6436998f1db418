"""Which combinations of parallelism, ZeRO and precision run: one rule a function.

The trainer, ``ds_efficient plan`` and the table in the documentation all ask these rules.
"""

from __future__ import annotations

from collections.abc import Callable

from ds_efficient.core.layout import FUSED_ADAM, PRECISIONS, ParallelLayout
from ds_efficient.errors import UserError

Rule = Callable[[ParallelLayout], str | None]
RULES: list[Rule] = []


def _rule(function: Rule) -> Rule:
    RULES.append(function)
    return function


def check(layout: ParallelLayout) -> list[str]:
    """Return one line for each broken rule: name, value, what is allowed, remedy. Empty: it runs."""
    return [message for message in (rule(layout) for rule in RULES) if message is not None]


def require(layout: ParallelLayout) -> None:
    """Refuse a layout that does not run.

    Raises:
        UserError: every broken rule at once.
    """
    problems = check(layout)
    if problems:
        count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
        raise UserError("\n  ".join([f"this layout does not run: {count}", *problems]))


def warnings(layout: ParallelLayout) -> list[str]:
    """Return what runs but wastes time or memory."""
    found = []
    if layout.pipeline > 1 and layout.num_microbatches < layout.pipeline:
        found.append(
            f"{layout.num_microbatches} micro-batches for {layout.pipeline} pipeline stages: stages wait; "
            f"raise the global batch to at least {layout.pipeline * layout.micro_batch_size * layout.data}"
        )
    if layout.zero_stage and layout.data == 1 and layout.world_size > 1:
        found.append(
            f"zero_optimization.stage = {layout.zero_stage} with one data-parallel rank partitions nothing"
        )
    if layout.tensor > 8:
        found.append(
            f"tensor-parallel size {layout.tensor}: more than the GPUs of most hosts; its all-reduces then "
            "cross the network"
        )
    return found


@_rule
def sizes_are_positive(layout: ParallelLayout) -> str | None:
    """World size, parallel sizes and batch sizes are at least 1."""
    values = {
        "world size": layout.world_size,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "micro_batch_size": layout.micro_batch_size,
        "global_batch_size": layout.global_batch_size,
    }
    wrong = [f"{name} = {value}" for name, value in values.items() if value is not None and value < 1]
    return f"{', '.join(wrong)}: at least 1 is needed" if wrong else None


@_rule
def stage_exists(layout: ParallelLayout) -> str | None:
    """The ZeRO stage is 0, 1, 2 or 3."""
    if layout.zero_stage in (0, 1, 2, 3):
        return None
    return f"zero_optimization.stage = {layout.zero_stage}: allowed are 0, 1, 2, 3"


@_rule
def precision_exists(layout: ParallelLayout) -> str | None:
    """The precision is fp32, bf16 or fp16."""
    if layout.precision in PRECISIONS:
        return None
    return f"precision = {layout.precision!r}: allowed are {', '.join(PRECISIONS)}"


@_rule
def world_holds_whole_models(layout: ParallelLayout) -> str | None:
    """The world size is a multiple of tensor x pipeline x context parallel sizes."""
    if layout.model_parallel < 1 or layout.world_size % layout.model_parallel == 0:
        return None
    return (
        f"{layout.world_size} ranks: a multiple of tensor x pipeline x context parallel sizes = "
        f"{layout.tensor} x {layout.pipeline} x {layout.context} = {layout.model_parallel} is needed; start "
        "more processes (deepspeed --num_gpus) or lower one of the sizes"
    )


@_rule
def fp16_needs_a_gpu(layout: ParallelLayout) -> str | None:
    """fp16 needs a GPU: DeepSpeed's CPU accelerator does not have it."""
    if layout.precision == "fp16" and layout.device == "cpu":
        return "fp16.enabled = true on CPU: DeepSpeed's CPU accelerator has no fp16; use bf16 or fp32"
    return None


@_rule
def no_context_parallelism(layout: ParallelLayout) -> str | None:
    """Context parallelism is not supported."""
    if layout.context <= 1:
        return None
    return (
        f"context_parallel_size = {layout.context}: only 1 is supported; use --sequence-parallel with tensor "
        "parallelism for long sequences"
    )


@_rule
def no_virtual_pipeline(layout: ParallelLayout) -> str | None:
    """Interleaved (virtual) pipeline stages are not supported."""
    if layout.virtual_pipeline_layers is None:
        return None
    return (
        f"num_layers_per_virtual_pipeline_stage = {layout.virtual_pipeline_layers}: interleaved stages are "
        "not supported, since a DeepSpeed engine holds one module; leave the argument out"
    )


@_rule
def no_experts(layout: ParallelLayout) -> str | None:
    """Mixture-of-experts models and expert parallelism are not supported."""
    if layout.expert <= 1 and not layout.num_experts:
        return None
    return (
        f"num_experts = {layout.num_experts}, expert_model_parallel_size = {layout.expert}: "
        "mixture-of-experts models are not supported; leave both arguments out"
    )


@_rule
def sequence_parallel_needs_tensor_parallel(layout: ParallelLayout) -> str | None:
    """Sequence parallelism needs tensor parallelism."""
    if not layout.sequence_parallel or layout.tensor > 1:
        return None
    return (
        f"sequence_parallel with tensor_model_parallel_size = {layout.tensor}: it cuts the sequence over the "
        "tensor-parallel ranks; drop --sequence-parallel or raise --tensor-model-parallel-size to 2 or more"
    )


def _indivisible(name: str, value: int | None, size: int, size_name: str, remedy: str) -> str | None:
    if value is None or size < 1 or value % size == 0:
        return None
    return f"{name} = {value} is not a multiple of {size_name} = {size}; {remedy}"


def _cut_by_tensor(layout: ParallelLayout, name: str, value: int | None) -> str | None:
    return _indivisible(name, value, layout.tensor, "tensor_model_parallel_size", "change one of them")


@_rule
def heads_divide(layout: ParallelLayout) -> str | None:
    """Tensor-parallel ranks share the attention heads evenly."""
    return _cut_by_tensor(layout, "num_attention_heads", layout.heads)


@_rule
def query_groups_divide(layout: ParallelLayout) -> str | None:
    """Query groups are a multiple or a divisor of the tensor-parallel size."""
    groups, tensor = layout.query_groups, layout.tensor
    if not groups or groups < 1 or tensor < 1 or groups % tensor == 0 or tensor % groups == 0:
        return None
    return (
        f"num_query_groups = {groups} is neither a multiple nor a divisor of tensor_model_parallel_size = "
        f"{tensor}; change one of them"
    )


@_rule
def mlp_divides(layout: ParallelLayout) -> str | None:
    """Tensor-parallel ranks share the MLP's inner width evenly."""
    return _cut_by_tensor(layout, "ffn_hidden_size", layout.ffn)


@_rule
def vocabulary_divides(layout: ParallelLayout) -> str | None:
    """Tensor-parallel ranks share the padded vocabulary evenly."""
    return _indivisible(
        "padded vocabulary size",
        layout.vocab_size,
        layout.tensor,
        "tensor_model_parallel_size",
        "let it be padded (--make-vocab-size-divisible-by)",
    )


@_rule
def sequence_divides(layout: ParallelLayout) -> str | None:
    """With sequence parallelism, tensor-parallel ranks share the sequence evenly."""
    return _cut_by_tensor(layout, "seq_length", layout.seq_length) if layout.sequence_parallel else None


@_rule
def layers_divide(layout: ParallelLayout) -> str | None:
    """Pipeline stages hold equally many layers."""
    return _indivisible(
        "num_layers", layout.num_layers, layout.pipeline, "pipeline_model_parallel_size", "change one of them"
    )


@_rule
def recomputed_layers_exist(layout: ParallelLayout) -> str | None:
    """Recomputed layers are not more than a stage has."""
    count, layers = layout.recompute.num_layers, layout.num_layers
    if count is None or layers is None or layout.pipeline < 1 or count <= max(1, layers // layout.pipeline):
        return None
    return (
        f"recompute_num_layers = {count}: a pipeline stage has {layers // layout.pipeline} layers; lower it "
        "to at most that"
    )


@_rule
def pipeline_needs_low_zero(layout: ParallelLayout) -> str | None:
    """Pipeline parallelism runs with ZeRO 0 and 1 only."""
    if layout.pipeline <= 1 or layout.zero_stage < 2:
        return None
    return (
        f"zero_optimization.stage = {layout.zero_stage} with pipeline_model_parallel_size = "
        f"{layout.pipeline}: stages 2 and 3 reduce gradients inside each backward pass, which the pipeline's "
        "schedule does not go through; use stage 0 or 1"
    )


@_rule
def pipeline_has_no_fp16(layout: ParallelLayout) -> str | None:
    """Pipeline parallelism runs in fp32 and bf16 only."""
    if layout.pipeline <= 1 or layout.precision != "fp16":
        return None
    return (
        f"fp16.enabled = true with pipeline_model_parallel_size = {layout.pipeline}: the pipeline's schedule "
        "does not scale the loss; use bf16 or fp32"
    )


@_rule
def tied_pipeline_needs_right_norm(layout: ParallelLayout) -> str | None:
    """Pipeline parallelism with tied embeddings and bf16 needs ZeRO 1, or ZeRO 0 with FusedAdam."""
    if layout.pipeline <= 1 or not layout.tied_embeddings or layout.zero_stage != 0:
        return None
    # In fp32 the norm is our own (`deepspeed_compat.clip_plain_gradients`) and counts the copy once.
    if layout.precision == "fp32" or layout.optimizer == FUSED_ADAM:
        return None
    return (
        f"tied embeddings with pipeline_model_parallel_size = {layout.pipeline}, zero_optimization.stage = 0 "
        f"and {layout.precision}: DeepSpeed counts the embedding's gradient twice in the norm; use stage 1, "
        "or --untie-embeddings-and-output-weights"
    )


@_rule
def half_precision_tensor_parallel_needs_right_norm(layout: ParallelLayout) -> str | None:
    """Tensor parallelism in bf16 or fp16 with ZeRO 0 needs FusedAdam."""
    half = layout.precision in ("bf16", "fp16")
    if layout.tensor <= 1 or not half or layout.zero_stage != 0 or layout.optimizer == FUSED_ADAM:
        return None
    return (
        f"{layout.precision} with zero_optimization.stage = 0, optimizer {layout.optimizer} and "
        f"tensor_model_parallel_size = {layout.tensor}: DeepSpeed leaves the other ranks' shards out of the "
        "gradient norm; use stage 1, or FusedAdam (optimizer type AdamW without torch_adam)"
    )


@_rule
def no_gradient_accumulation_fusion(layout: ParallelLayout) -> str | None:
    """megatron-core's gradient accumulation fusion is not supported."""
    if not layout.gradient_accumulation_fusion:
        return None
    return (
        "gradient_accumulation_fusion = true: it adds into main_grad, which DeepSpeed's parameters do not "
        "have; use --no-gradient-accumulation-fusion"
    )


@_rule
def norm_recomputation_needs_transformer_engine(layout: ParallelLayout) -> str | None:
    """Selective recomputation of layernorm needs Transformer Engine's layers."""
    if not layout.recompute.selects("layernorm") or layout.transformer_engine:
        return None
    return (
        "recompute_modules contains layernorm: megatron-core needs Transformer Engine for it; leave it out "
        "or use --transformer-impl transformer_engine"
    )


@_rule
def no_deepcompile(layout: ParallelLayout) -> str | None:
    """DeepSpeed's DeepCompile is not supported."""
    if not layout.deepcompile:
        return None
    return (
        "compile.deepcompile = true: it bypasses the gradient hooks that parallelism and the techniques "
        "need; set it to false"
    )


@_rule
def offload_needs_a_partition(layout: ParallelLayout) -> str | None:
    """Offloading the optimizer needs ZeRO 1 to 3, offloading parameters ZeRO 3."""
    if layout.offload_param is not None and layout.zero_stage != 3:
        return (
            f"zero_optimization.offload_param with stage = {layout.zero_stage}: stage 3 is needed; set it or "
            "remove offload_param"
        )
    if layout.offload_optimizer is not None and layout.zero_stage == 0:
        return (
            "zero_optimization.offload_optimizer with stage = 0: stage 1, 2 or 3 is needed; set it or remove "
            "offload_optimizer"
        )
    return None


@_rule
def batches_divide(layout: ParallelLayout) -> str | None:
    """The global batch is a multiple of micro-batch x data-parallel ranks."""
    per_pass = layout.micro_batch_size * layout.data
    if per_pass < 1 or layout.global_batch < 1:
        return None  # reported by sizes_are_positive
    if layout.global_batch % per_pass == 0:
        return None
    return (
        f"global batch {layout.global_batch} is not a multiple of micro-batch {layout.micro_batch_size} x "
        f"{layout.data} data-parallel ranks = {per_pass}; change one of them"
    )


def broken_rules(layout: ParallelLayout) -> list[Rule]:
    """Return the rules a layout breaks."""
    return [rule for rule in RULES if rule(layout) is not None]


def table() -> str:
    """Return the table of combinations as Markdown, made by asking the rules themselves."""
    from ds_efficient.core.parallelism_table import make_table

    return make_table()
