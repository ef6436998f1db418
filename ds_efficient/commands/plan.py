"""``ds_efficient plan``: what a run will do and need, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ds_efficient.errors import UserError

if TYPE_CHECKING:
    from ds_efficient.core.shape import ModelShape

# Without a shape the plan shows a GPT of 354 million parameters.
EXAMPLE = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}
DEFAULT_VOCABULARY = 50257
DEFAULT_SEQUENCE = 2048


def add_parser(subparsers: Any) -> None:
    """Add the sub-command; the names of its arguments are Megatron's."""
    parser = subparsers.add_parser(
        "plan",
        help="what a run will do and need, without a GPU",
        description="Show for a configuration and a model shape: what each technique does to each layer, "
        "parameters, memory for each ZeRO stage, FLOPs, bytes sent. Needs no GPU and allocates nothing.",
    )
    parser.add_argument("config", metavar="JSON", help="DeepSpeed JSON file")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--train-iters", type=int, metavar="N", help="optimizer steps, for schedules")
    _add_layout(parser.add_argument_group("layout"))
    _add_model(parser.add_argument_group("model (all or none of the first three)"))
    _add_activations(parser.add_argument_group("activations"))
    parser.set_defaults(run=run)


def _add_layout(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--world-size", type=int, default=1, metavar="N", help="ranks (default 1)")
    add("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    add("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="pipeline stages")
    add("--context-parallel-size", type=int, default=1, metavar="N", help="context-parallel ranks")
    add("--expert-model-parallel-size", type=int, default=1, metavar="N", help="expert-parallel ranks")
    add("--num-layers-per-virtual-pipeline-stage", type=int, metavar="N", help="interleaved stages")
    add("--sequence-parallel", action="store_true", help="cut norms and dropout along the sequence")
    add("--micro-batch-size", type=int, metavar="N", help="samples a rank and pass; or in the JSON")
    add("--global-batch-size", type=int, metavar="N", help="samples an optimizer step; or in the JSON")
    add("--transformer-impl", choices=("local", "transformer_engine"), default="local", help="layers")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--num-layers", type=int, metavar="N", help="transformer layers")
    add("--hidden-size", type=int, metavar="N", help="hidden size")
    add("--num-attention-heads", type=int, metavar="N", help="attention heads")
    add("--ffn-hidden-size", type=int, metavar="N", help="inner width of the MLP")
    add("--kv-channels", type=int, metavar="N", help="width of a head")
    add("--group-query-attention", action="store_true", help="grouped queries")
    add("--num-query-groups", type=int, metavar="N", help="groups; needs --group-query-attention")
    add("--swiglu", action="store_true", help="gated SiLU instead of GELU")
    add("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm", help="norm layers")
    add("--qk-layernorm", action="store_true", help="norms on queries and keys")
    add("--disable-bias-linear", action="store_true", help="linear layers without bias")
    add("--add-qkv-bias", action="store_true", help="bias of the QKV layer all the same")
    add("--untie-embeddings-and-output-weights", action="store_true", help="separate output weights")
    add(
        "--position-embedding-type",
        choices=("learned_absolute", "rope", "none"),
        default="learned_absolute",
        help="position embedding",
    )
    add("--use-rotary-position-embeddings", action="store_true", help="same as rope")
    add("--max-position-embeddings", type=int, metavar="N", help="rows of learned positions")
    add("--seq-length", type=int, default=DEFAULT_SEQUENCE, metavar="N", help="tokens a sample (2048)")
    add("--vocab-size", type=int, default=DEFAULT_VOCABULARY, metavar="N", help="before padding (50257)")
    add("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="padding (128)")


def _add_activations(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--hidden-dropout", type=float, default=0.1, metavar="P", help="dropout of hidden states (0.1)")
    add("--attention-dropout", type=float, default=0.1, metavar="P", help="dropout in attention (0.1)")
    add("--recompute-activations", action="store_true", help="recompute attention only")
    add("--recompute-granularity", choices=("full", "selective"), help="what is recomputed")
    add("--recompute-method", choices=("uniform", "block"), help="with full recomputation")
    add("--recompute-num-layers", type=int, metavar="N", help="layers a block")
    add("--recompute-modules", nargs="+", metavar="NAME", help="core_attn, mlp, layernorm")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from ds_efficient.config import load_config
    from ds_efficient.core.memory import Activations
    from ds_efficient.core.plan import build_plan
    from ds_efficient.core.shape import Recompute

    shape, assumed = _shape(args)
    granularity = "selective" if args.recompute_activations else args.recompute_granularity
    recompute = Recompute(
        granularity,
        args.recompute_method,
        args.recompute_num_layers,
        tuple(args.recompute_modules or ("core_attn",)),
    )
    plan = build_plan(
        load_config(args.config),
        shape,
        args.world_size,
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        virtual_pipeline_layers=args.num_layers_per_virtual_pipeline_stage,
        sequence_parallel=args.sequence_parallel,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        transformer_engine=args.transformer_impl == "transformer_engine",
        recompute=recompute,
        activations=Activations(hidden_dropout=args.hidden_dropout, attention_dropout=args.attention_dropout),
        total_steps=args.train_iters,
    )
    if assumed:
        print(f"note: {assumed}", file=sys.stderr)
    sys.stdout.write(json.dumps(plan.to_json(), indent=2) + "\n" if args.json else plan.text())
    return 0


def _shape(args: argparse.Namespace) -> tuple[ModelShape, str | None]:
    """Return the model's shape, and a note when it is an assumed one."""
    from ds_efficient.core.shape import ModelShape, padded_vocab_size

    sizes = {name: getattr(args, name) for name in EXAMPLE}
    missing = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is None]
    note = None
    if len(missing) == len(sizes):
        sizes = dict(EXAMPLE)
        note = "no model sizes given: the plan is for an example of 24 layers x 1024, 16 heads; " + (
            "give --num-layers, --hidden-size and --num-attention-heads for yours"
        )
    problems = _problems(args, [] if note else missing)
    if problems:
        raise UserError("\n  ".join(["arguments:", *problems]))
    rope = args.use_rotary_position_embeddings
    shape = ModelShape(
        **sizes,
        vocab_size=padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, max(1, args.tensor_model_parallel_size)
        ),
        seq_length=args.seq_length,
        ffn_hidden_size=args.ffn_hidden_size,
        num_query_groups=(args.num_query_groups or 1) if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        swiglu=args.swiglu,
        untie_embeddings=args.untie_embeddings_and_output_weights,
        add_bias_linear=not args.disable_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        normalization=args.normalization,
        qk_layernorm=args.qk_layernorm,
        position_embedding_type="rope" if rope else args.position_embedding_type,
        max_position_embeddings=args.max_position_embeddings,
    )
    return shape, note


def _problems(args: argparse.Namespace, missing: list[str]) -> list[str]:
    found = [f"{name}: needed with the other model sizes" for name in missing]
    if args.train_iters is not None and args.train_iters < 1:
        found.append(f"--train-iters {args.train_iters}: at least 1 is needed")
    if args.num_query_groups is not None and not args.group_query_attention:
        found.append("--num-query-groups: has no effect without --group-query-attention; add it")
    if args.recompute_activations and args.recompute_granularity == "full":
        found.append("--recompute-activations means selective; it contradicts --recompute-granularity full")
    if args.make_vocab_size_divisible_by < 1:
        found.append(
            f"--make-vocab-size-divisible-by {args.make_vocab_size_divisible_by}: at least 1 is needed"
        )
    for name in ("hidden_dropout", "attention_dropout"):
        if not 0 <= getattr(args, name) < 1:
            found.append(f"--{name.replace('_', '-')} {getattr(args, name)}: from 0 to below 1 is allowed")
    return found
