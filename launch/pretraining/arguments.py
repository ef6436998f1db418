"""Command line of ``pretrain_gpt.py``, with Megatron-LM's names and meanings."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ds_efficient.errors import UserError

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root")

# Accepted so that Megatron-LM scripts run; DeepSpeed or this project does the same without them.
IGNORED_FLAGS = {
    "--use-mcore-models": "the model always is megatron-core's",
    "--use-distributed-optimizer": "zero_optimization.stage in the DeepSpeed config does it",
    "--overlap-grad-reduce": "zero_optimization.overlap_comm in the DeepSpeed config does it",
    "--overlap-param-gather": "DeepSpeed's ZeRO does it",
    "--use-flash-attn": "attention goes through scaled_dot_product_attention, flash on a GPU",
    "--use-cpu-initialization": "weights are drawn by key, equal on every device and layout",
    "--no-gradient-accumulation-fusion": "it is always off: DeepSpeed has no main_grad",
    "--no-persist-layer-norm": "torch's norms are used",
    "--no-masked-softmax-fusion": "the softmax is inside scaled_dot_product_attention",
    "--deepspeed": "the engine always is DeepSpeed's",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, so that every mistake ends the same way."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise instead of printing the whole usage."""
        raise UserError(f"{message} (see --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an unknown argument is named with the known one that it resembles."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = list(self._option_string_actions)
            named = []
            for text in (text for text in unknown if text.startswith("-")):
                near = difflib.get_close_matches(text.split("=")[0], flags, n=1, cutoff=0.6)
                named.append(f"{text}: unknown argument" + (f"; did you mean {near[0]}?" if near else ""))
            self.error("\n  ".join(named) or f"{' '.join(unknown)}: belongs to no argument")
        return parsed


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; ``--help`` prints it by groups."""
    parser = Parser(
        prog="pretrain_gpt.py",
        description="Pretrain a GPT with DeepSpeed and megatron-core.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_deepspeed(parser.add_argument_group("DeepSpeed"))
    _add_parallel(parser.add_argument_group("parallelism"))
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_optimizer(parser.add_argument_group("optimizer and learning rate"))
    _add_precision(parser.add_argument_group("precision and recomputation"))
    _add_data(parser.add_argument_group("data and tokenizer"))
    _add_output(parser.add_argument_group("checkpoints, evaluation, logging"))
    ignored = parser.add_argument_group("accepted without effect")
    for flag, reason in IGNORED_FLAGS.items():
        ignored.add_argument(flag, action="store_true", help=reason)
    return parser


def _add_deepspeed(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--deepspeed_config", "--deepspeed-config", required=True, metavar="JSON", help="DeepSpeed config")
    add("--local_rank", "--local-rank", type=int, default=-1, help="set by the launcher")
    add("--distributed-backend", choices=("nccl", "gloo"), default=None, help="nccl with a GPU, else gloo")
    add("--distributed-timeout-minutes", type=int, default=30, help="time-out of a collective")


def _add_parallel(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    add("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="pipeline stages")
    add("--context-parallel-size", type=int, default=1, metavar="N", help="context-parallel ranks")
    add("--expert-model-parallel-size", type=int, default=1, metavar="N", help="expert-parallel ranks")
    add("--num-layers-per-virtual-pipeline-stage", type=int, default=None, metavar="N", help="interleaving")
    add("--sequence-parallel", action="store_true", help="cut norms and dropout along the sequence")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--num-layers", type=int, required=True, help="transformer layers")
    add("--hidden-size", type=int, required=True, help="hidden size")
    add("--num-attention-heads", type=int, required=True, help="attention heads")
    add("--ffn-hidden-size", type=int, default=None, help="4 x hidden size; 8/3 of it with --swiglu")
    add("--kv-channels", type=int, default=None, help="head size; hidden size / heads")
    add("--group-query-attention", action="store_true", help="grouped queries")
    add("--num-query-groups", type=int, default=1, help="groups with --group-query-attention")
    add("--max-position-embeddings", type=int, default=None, help="longest sequence; --seq-length")
    add(
        "--position-embedding-type",
        choices=("learned_absolute", "rope", "none"),
        default="learned_absolute",
        help="position embedding",
    )
    add("--use-rotary-position-embeddings", action="store_true", help="same as rope")
    add("--rotary-base", type=int, default=10000, help="base of the rotary frequencies")
    add("--rotary-percent", type=float, default=1.0, help="share of the head that is rotated")
    add("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm", help="norm layers")
    add("--norm-epsilon", type=float, default=1e-5, help="epsilon of the norms")
    add("--qk-layernorm", action="store_true", help="norms on queries and keys")
    add("--swiglu", action="store_true", help="gated SiLU instead of GELU")
    add("--squared-relu", action="store_true", help="squared ReLU instead of GELU")
    add("--disable-bias-linear", action="store_true", help="linear layers without bias")
    add("--add-qkv-bias", action="store_true", help="bias of the QKV layer all the same")
    add("--untie-embeddings-and-output-weights", action="store_true", help="separate output weights")
    add("--make-vocab-size-divisible-by", type=int, default=128, help="vocabulary padding")
    add("--attention-dropout", type=float, default=0.1, help="dropout of attention probabilities")
    add("--hidden-dropout", type=float, default=0.1, help="dropout of hidden states")
    add("--init-method-std", type=float, default=0.02, help="standard deviation of the initial weights")
    add("--apply-query-key-layer-scaling", action="store_true", help="scale scores by layer (fp16)")
    add("--transformer-impl", choices=("local", "transformer_engine"), default="local", help="layers")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--micro-batch-size", type=int, default=None, help="samples a data-parallel rank per pass")
    add("--global-batch-size", type=int, default=None, help="samples an optimizer step")
    add("--seq-length", type=int, required=True, help="tokens a sample")
    add("--train-iters", type=int, default=None, help="optimizer steps")
    add("--train-samples", type=int, default=None, help="samples, instead of --train-iters")
    add("--exit-interval", type=int, default=None, help="save and stop at the next multiple of this step")
    add("--exit-duration-in-mins", type=float, default=None, help="save and stop after this time")
    add("--seed", type=int, default=1234, help="seed of weights, data order and dropout")
    add("--skip-train", action="store_true", help="only evaluate")


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lr", type=float, default=None, help="peak learning rate; or optimizer.params.lr in the config")
    add("--min-lr", type=float, default=0.0, help="lowest learning rate")
    add("--lr-decay-style", choices=LR_DECAY_STYLES, default="linear", help="shape of the decay")
    add("--lr-decay-iters", type=int, default=None, help="steps of the decay; --train-iters")
    add("--lr-warmup-iters", type=int, default=0, help="steps of linear warm-up")
    add("--lr-warmup-fraction", type=float, default=None, help="warm-up as a share of the decay steps")
    add("--lr-warmup-init", type=float, default=0.0, help="learning rate at the start of the warm-up")
    add("--weight-decay", type=float, default=0.01, help="decay of matrices; none for biases and norms")
    add("--clip-grad", type=float, default=1.0, help="largest gradient norm; 0 is off")
    add("--adam-beta1", type=float, default=0.9, help="Adam's beta1")
    add("--adam-beta2", type=float, default=0.999, help="Adam's beta2")
    add("--adam-eps", type=float, default=1e-8, help="Adam's epsilon")
    add("--optimizer", choices=("adam", "sgd"), default="adam", help="where the config has no optimizer")


def _add_precision(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--bf16", action="store_true", help="same as bf16.enabled in the config")
    add("--fp16", action="store_true", help="same as fp16.enabled in the config")
    add("--recompute-activations", action="store_true", help="recompute attention only")
    add("--recompute-granularity", choices=("full", "selective"), default=None, help="what is recomputed")
    add("--recompute-method", choices=("uniform", "block"), default=None, help="with full recomputation")
    add("--recompute-num-layers", type=int, default=None, help="layers a block; with full recomputation")
    add("--recompute-modules", nargs="+", default=None, help="with selective recomputation")
    add("--no-bias-gelu-fusion", action="store_true", help="no compiled bias + GELU (GPU)")
    add("--no-bias-swiglu-fusion", action="store_true", help="no compiled bias + SwiGLU (GPU)")
    add("--no-bias-dropout-fusion", action="store_true", help="no compiled bias + dropout + add (GPU)")
    add("--no-rope-fusion", action="store_true", help="the rotary embedding in several kernels (GPU)")
    add("--no-cross-entropy-fusion", action="store_true", help="the cross entropy in several kernels (GPU)")


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data-path", nargs="*", default=None, help="prefix, or weight prefix weight prefix ...")
    add("--split", default=None, help="shares of training, validation, test: 969,30,1")
    add("--train-data-path", nargs="*", default=None, help="training prefixes, instead of --data-path")
    add("--valid-data-path", nargs="*", default=None, help="validation prefixes")
    add("--test-data-path", nargs="*", default=None, help="test prefixes")
    add("--data-cache-path", default=None, help="folder of the index caches; beside the data")
    add("--mock-data", action="store_true", help="synthetic tokens")
    add("--num-workers", type=int, default=2, help="loader processes a rank")
    add("--reset-position-ids", action="store_true", help="positions restart after each document")
    add("--reset-attention-mask", action="store_true", help="no attention across documents")
    add("--eod-mask-loss", action="store_true", help="no loss on end-of-document tokens")
    add("--tokenizer-type", default=None, help="as in prepare_data.py")
    add("--tokenizer-model", default=None, help="tokenizer.json or SentencePiece model")
    add("--eod-token", default=None, help="end-of-document token of --tokenizer-model")
    add("--vocab-size", type=int, default=None, help="for NullTokenizer")


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--save", default=None, metavar="DIR", help="folder of the checkpoints and of run.jsonl")
    add("--load", default=None, metavar="DIR", help="folder to resume from")
    add("--save-interval", type=int, default=None, help="steps between checkpoints")
    add("--pretrained-checkpoint", default=None, metavar="DIR", help="start from its weights, at step 0")
    add("--ckpt-step", type=int, default=None, help="load this step instead of the latest")
    add("--no-load-optim", action="store_true", help="start with a new optimizer")
    add("--no-load-rng", action="store_true", help="do not restore random states")
    add("--finetune", action="store_true", help="load weights only, start at step 0")
    add("--exit-on-missing-checkpoint", action="store_true", help="stop where --load holds none")
    add("--eval-interval", type=int, default=1000, help="steps between evaluations")
    add("--eval-iters", type=int, default=100, help="batches an evaluation; 0 is off")
    add("--log-interval", type=int, default=100, help="steps between log lines")
    add("--run-dir", default=None, metavar="DIR", help="folder of run.jsonl; --save")
    add("--log-level", choices=("debug", "info", "warning"), default="info", help="detail of the log")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments that can be checked alone.

    Returns:
        The namespace, with ``given``: the names that stood on the command line.

    Raises:
        UserError: unknown, missing or contradictory arguments, all named.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    args.given = _given(parser, argv)
    problems = [problem for check in _CHECKS for problem in check(args)]
    if problems:
        raise UserError("arguments:\n  " + "\n  ".join(problems))
    _derive(args)
    return args


def _given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Names that stood on the command line, so that they can be told from defaults."""
    defaults = {action.dest: action.default for action in parser._actions}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    found = set(vars(parser.parse_args(argv)))
    for action in parser._actions:
        action.default = defaults[action.dest]
    return found


def _check_positive(args: argparse.Namespace) -> list[str]:
    names = (
        "num_layers hidden_size num_attention_heads ffn_hidden_size kv_channels num_query_groups seq_length "
        "max_position_embeddings micro_batch_size global_batch_size tensor_model_parallel_size "
        "pipeline_model_parallel_size context_parallel_size expert_model_parallel_size train_iters "
        "train_samples save_interval eval_interval log_interval exit_interval make_vocab_size_divisible_by "
        "recompute_num_layers distributed_timeout_minutes lr_decay_iters rotary_base"
    )
    values = ((name, getattr(args, name)) for name in names.split())
    return [
        f"--{name.replace('_', '-')} {value}: must be at least 1"
        for name, value in values
        if value is not None and value < 1
    ]


_NOT_NEGATIVE = (
    "lr min_lr lr_warmup_init weight_decay clip_grad lr_warmup_iters eval_iters num_workers ckpt_step seed "
    "exit_duration_in_mins init_method_std norm_epsilon adam_eps"
).split()


def _check_ranges(args: argparse.Namespace) -> list[str]:
    problems = []
    for name in ("attention_dropout", "hidden_dropout", "lr_warmup_fraction", "adam_beta1", "adam_beta2"):
        value = getattr(args, name)
        if value is not None and not 0.0 <= value < 1.0:
            problems.append(f"--{name.replace('_', '-')} {value}: must be at least 0 and below 1")
    for name in _NOT_NEGATIVE:
        value = getattr(args, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            problems.append(f"--{name.replace('_', '-')} {value}: must be a number of at least 0")
    if not 0.0 < args.rotary_percent <= 1.0:
        problems.append(f"--rotary-percent {args.rotary_percent}: must be above 0 and at most 1")
    return problems


def _broken(rules: Iterable[tuple[bool, str]]) -> list[str]:
    return [message for broken, message in rules if broken]


def _check_contradictions(args: argparse.Namespace) -> list[str]:
    rules = (
        (args.bf16 and args.fp16, "--bf16 and --fp16: give one of them"),
        (args.swiglu and args.squared_relu, "--swiglu and --squared-relu: give one of them"),
        (
            args.train_iters is None and args.train_samples is None and not args.skip_train,
            "--train-iters or --train-samples: one of them is needed",
        ),
        (
            args.train_iters is not None and args.train_samples is not None,
            "--train-iters and --train-samples: give one of them",
        ),
        (
            args.lr_warmup_fraction is not None and args.lr_warmup_iters > 0,
            "--lr-warmup-fraction and --lr-warmup-iters: give one of them",
        ),
        (
            args.mock_data and bool(args.data_path or args.train_data_path),
            "--mock-data and a data path: give one of them",
        ),
        (
            not args.mock_data and not (args.data_path or args.train_data_path),
            "--data-path: needed, or --train-data-path, or --mock-data",
        ),
        (
            bool(args.data_path) and bool(args.train_data_path),
            "--data-path and --train-data-path: give one of them",
        ),
        (
            args.recompute_activations and args.recompute_granularity == "full",
            "--recompute-activations means selective; it contradicts --recompute-granularity full",
        ),
        (
            args.skip_train and args.eval_iters == 0,
            "--skip-train and --eval-iters 0: nothing would be done; raise --eval-iters",
        ),
    )
    return _broken(rules)


def _check_needs(args: argparse.Namespace) -> list[str]:
    """Arguments that mean nothing without another one."""
    rules = (
        (
            args.save_interval is not None and args.save is None,
            f"--save-interval {args.save_interval}: says when to save, but --save does not say where",
        ),
        (
            "num_query_groups" in args.given and not args.group_query_attention,
            f"--num-query-groups {args.num_query_groups}: needs --group-query-attention",
        ),
        *(
            (getattr(args, name) and args.load is None, f"--{name.replace('_', '-')}: needs --load")
            for name in ("finetune", "no_load_optim", "no_load_rng", "exit_on_missing_checkpoint")
        ),
        (args.ckpt_step is not None and args.load is None, f"--ckpt-step {args.ckpt_step}: needs --load"),
    )
    return _broken(rules)


def _check_sizes(args: argparse.Namespace) -> list[str]:
    """Sizes of the model that do not fit each other."""
    rules = (
        (
            args.max_position_embeddings is not None and args.max_position_embeddings < args.seq_length,
            f"--max-position-embeddings {args.max_position_embeddings}: must be at least --seq-length "
            f"{args.seq_length}",
        ),
        (
            args.kv_channels is None and args.hidden_size % max(1, args.num_attention_heads) != 0,
            f"--hidden-size {args.hidden_size}: must be a multiple of --num-attention-heads "
            f"{args.num_attention_heads}, or --kv-channels given",
        ),
        (
            args.group_query_attention and args.num_attention_heads % max(1, args.num_query_groups) != 0,
            f"--num-attention-heads {args.num_attention_heads}: must be a multiple of --num-query-groups "
            f"{args.num_query_groups}",
        ),
    )
    return _broken(rules)


_CHECKS = (_check_positive, _check_ranges, _check_contradictions, _check_needs, _check_sizes)


def _derive(args: argparse.Namespace) -> None:
    """Fill in what follows from other arguments."""
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if args.kv_channels is None:
        args.kv_channels = args.hidden_size // args.num_attention_heads
    if args.ffn_hidden_size is None:
        # Megatron-LM's rule: 8/3 of the hidden size with a gate, rounded to a multiple of 64.
        args.ffn_hidden_size = (
            int((4 * args.hidden_size * 2 / 3) / 64) * 64 if args.swiglu else 4 * args.hidden_size
        )
        args.ffn_hidden_size = max(args.ffn_hidden_size, 64)
    if not args.group_query_attention:
        args.num_query_groups = args.num_attention_heads
    if args.recompute_activations:
        args.recompute_granularity = "selective"
    if args.recompute_granularity == "full" and args.recompute_method is None:
        args.recompute_method, args.recompute_num_layers = "uniform", args.recompute_num_layers or 1
    if args.tokenizer_type is None:
        args.tokenizer_type = "HuggingFaceTokenizer" if args.tokenizer_model else "ByteLevelTokenizer"
    args.run_dir = args.run_dir or args.save
