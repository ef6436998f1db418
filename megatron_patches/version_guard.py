"""Which megatron-core versions this project runs on, and the guard that checks what it relies on.

Two checks: the version must be one that the suite ran on (or lie between two of them), and every callable
that we use or override must still have the parameters we pass. An unknown version is an error with a way to
go on; a changed signature is an error without one.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from ds_efficient.errors import UnsupportedVersion

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.16.1", "0.19.2")


@dataclass(frozen=True)
class Seam:
    """One place of megatron-core that we use: a callable and the parameters we pass by name."""

    where: str
    parameters: tuple[str, ...]
    used_for: str


SEAMS: tuple[Seam, ...] = (
    Seam(
        "megatron.core.parallel_state:initialize_model_parallel",
        ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        "process groups",
    ),
    Seam(
        "megatron.core.tensor_parallel.random:model_parallel_cuda_manual_seed", ("seed",), "dropout streams"
    ),
    Seam(
        "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.add", ("name", "seed"), "dropout streams"
    ),
    Seam("megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork", ("name",), "dropout streams"),
    Seam(
        "megatron.core.models.gpt.gpt_layer_specs:get_gpt_layer_local_spec",
        (),
        "the layer spec that ours starts from",
    ),
    Seam(
        "megatron.core.transformer.transformer_block:TransformerBlockSubmodules",
        ("layer_specs", "layer_norm"),
        "one spec for each layer",
    ),
    Seam(
        "megatron.core.transformer.transformer_block:get_num_layers_to_build", ("config",), "pipeline stages"
    ),
    Seam(
        "megatron.core.transformer.transformer_layer:get_transformer_layer_offset",
        ("config",),
        "global layer numbers",
    ),
    Seam(
        "megatron.core.models.gpt:GPTModel",
        (
            "config",
            "transformer_layer_spec",
            "vocab_size",
            "max_sequence_length",
            "pre_process",
            "post_process",
            "parallel_output",
            "share_embeddings_and_output_weights",
            "position_embedding_type",
            "rotary_percent",
            "rotary_base",
        ),
        "the model",
    ),
    Seam("megatron.core.pipeline_parallel:get_forward_backward_func", (), "the pipeline's 1F1B schedule"),
    Seam(
        "megatron.core.tensor_parallel.layers:ColumnParallelLinear",
        ("input_size", "output_size", "config", "init_method", "bias", "skip_bias_add", "gather_output"),
        "linear layers of techniques",
    ),
    Seam(
        "megatron.core.tensor_parallel.layers:RowParallelLinear",
        ("input_size", "output_size", "config", "init_method", "bias", "skip_bias_add", "input_is_parallel"),
        "linear layers of techniques",
    ),
    Seam(
        "megatron.core.tensor_parallel.layers:ColumnParallelLinear._forward_impl",
        ("input", "weight"),
        "linear layers of techniques",
    ),
    Seam(
        "megatron.core.tensor_parallel.layers:RowParallelLinear._forward_impl",
        ("input", "weight"),
        "linear layers of techniques",
    ),
    Seam(
        "megatron.core.tensor_parallel.layers:linear_with_grad_accumulation_and_async_allreduce",
        (
            "input",
            "weight",
            "bias",
            "gradient_accumulation_fusion",
            "allreduce_dgrad",
            "sequence_parallel",
            "grad_output_buffer",
            "tp_group",
        ),
        "what those layers are asked for",
    ),
    Seam(
        "megatron.core.transformer.transformer_layer:TransformerLayer._forward_attention",
        (
            "hidden_states",
            "attention_mask",
            "context",
            "context_mask",
            "rotary_pos_emb",
            "attention_bias",
            "inference_context",
            "packed_seq_params",
            "padding_mask",
        ),
        "layers that leave out tokens",
    ),
    Seam(
        "megatron.core.transformer.utils:make_sharded_tensors_for_checkpoint",
        ("state_dict", "prefix", "tensor_parallel_layers_axis_map", "sharded_offsets"),
        "sharded tensors of techniques",
    ),
    Seam(
        "megatron.core.models.common.language_module.language_module:fused_vocab_parallel_cross_entropy",
        ("vocab_parallel_logits", "target", "tp_group"),
        "the loss on GPUs",
    ),
    Seam(
        "megatron.core.transformer.mlp:apply_swiglu_sharded_factory",
        ("original_sh_ten", "sharded_offsets", "singleton_local_shards"),
        "sharded tensors of techniques in gated layers",
    ),
)


@dataclass(frozen=True)
class Finding:
    """The state of one seam in the installed megatron-core."""

    seam: Seam
    problem: str | None


def installed_version() -> str:
    """Return megatron-core's version.

    Raises:
        UnsupportedVersion: it is not installed.
    """
    try:
        import megatron.core
    except ImportError as error:
        raise UnsupportedVersion(
            f"megatron-core cannot be imported ({error}); install it: pip install 'ds_efficient[megatron]'"
        ) from error
    return str(megatron.core.__version__)


def _resolve(where: str) -> Any:
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _problem(seam: Seam) -> str | None:
    try:
        found = _resolve(seam.where)
    except (ImportError, AttributeError) as error:
        return f"missing: {error}"
    parameters = inspect.signature(found).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    lacking = [name for name in seam.parameters if name not in parameters]
    return f"no parameter {', '.join(lacking)}" if lacking else None


def compatibility() -> list[Finding]:
    """Check every seam against the installed megatron-core."""
    return [Finding(seam, _problem(seam)) for seam in SEAMS]


def check(*, allow_untested: bool = False) -> str:
    """Refuse a megatron-core that this project was not tested with.

    Args:
        allow_untested: go on with an unknown version, with a warning (config key
            ``ds_efficient.allow_untested_megatron``). Changed signatures are refused all the same.

    Returns:
        The version.

    Raises:
        UnsupportedVersion: says what to install or set.
    """
    text = installed_version()
    version, oldest, newest = (Version(v) for v in (text, TESTED_VERSIONS[0], TESTED_VERSIONS[-1]))
    if not oldest <= version <= newest:
        message = (
            f"megatron-core {text} is outside the tested range {oldest} to {newest}; install "
            f"megatron-core=={newest if version > newest else oldest}"
        )
        if not allow_untested or version < oldest:
            remedy = "" if version < oldest else ', or set "ds_efficient": {"allow_untested_megatron": true}'
            raise UnsupportedVersion(message + remedy)
        logger.warning("%s; going on because allow_untested_megatron is set", message)
    problems = [f"{f.seam.where} ({f.seam.used_for}): {f.problem}" for f in compatibility() if f.problem]
    if problems:
        raise UnsupportedVersion(
            f"megatron-core {text} has changed where this project touches it:\n  " + "\n  ".join(problems)
        )
    return text
