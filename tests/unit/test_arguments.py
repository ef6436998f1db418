"""The command line: Megatron-LM's names, every mistake named, nothing taken in silence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining.arguments import IGNORED_FLAGS, build_parser, parse_args

from ds_efficient.errors import UserError

NEEDED = "--deepspeed_config ds.json --num-layers 2 --hidden-size 96 --num-attention-heads 4 --seq-length 16"
BASE = f"{NEEDED} --mock-data --train-iters 3".split()


def refusal(more: str, base: list[str] = BASE) -> str:
    with pytest.raises(UserError) as raised:
        parse_args([*base, *more.split()])
    return str(raised.value)


def test_what_follows_from_other_arguments() -> None:
    args = parse_args(BASE)
    assert (args.ffn_hidden_size, args.kv_channels, args.num_query_groups) == (384, 24, 4)
    assert (args.max_position_embeddings, args.tokenizer_type, args.run_dir) == (
        16,
        "ByteLevelTokenizer",
        None,
    )
    assert parse_args([*BASE, "--swiglu"]).ffn_hidden_size == 256  # 8/3 of 96, a multiple of 64
    assert parse_args([*BASE, "--save", "a"]).run_dir == "a"
    assert parse_args([*BASE, "--save", "a", "--run-dir", "b"]).run_dir == "b"
    assert parse_args([*BASE, "--use-rotary-position-embeddings"]).position_embedding_type == "rope"
    assert parse_args([*BASE, "--recompute-activations"]).recompute_granularity == "selective"
    full = parse_args([*BASE, "--recompute-granularity", "full"])
    assert (full.recompute_method, full.recompute_num_layers) == ("uniform", 1)
    grouped = parse_args([*BASE, "--group-query-attention", "--num-query-groups", "2"])
    assert grouped.num_query_groups == 2
    assert parse_args([*BASE, "--tokenizer-model", "t.json"]).tokenizer_type == "HuggingFaceTokenizer"


def test_what_was_given_is_told_from_defaults() -> None:
    args = parse_args([*BASE, "--seed", "1234", "--bf16"])
    assert {"seed", "bf16", "mock_data", "train_iters"} <= args.given
    assert not {"clip_grad", "fp16", "lr"} & args.given


@pytest.mark.parametrize("flag", IGNORED_FLAGS)
def test_flags_of_megatron_without_a_meaning_here_are_accepted(flag: str) -> None:
    assert getattr(parse_args([*BASE, flag]), flag[2:].replace("-", "_"))


def test_both_spellings_of_the_launchers_arguments() -> None:
    assert parse_args([*BASE, "--local-rank", "1"]).local_rank == 1
    assert parse_args([*BASE, "--local_rank=1"]).local_rank == 1


@pytest.mark.parametrize("action", build_parser()._actions, ids=lambda action: action.option_strings[0])
def test_every_argument_has_a_help_text(action: object) -> None:
    assert getattr(action, "help", None)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("--hiden-size 3", "--hiden-size: unknown argument; did you mean --hidden-size?"),
        ("--train-iter=3", "did you mean --train-iters?"),
        ("--zzzz", "--zzzz: unknown argument"),
        ("stray", "stray: belongs to no argument"),
        ("--lr fast", "--lr: invalid float value: 'fast'"),
        ("--lr-decay-style steep", "invalid choice: 'steep'"),
        ("--bf16 --fp16", "--bf16 and --fp16: give one"),
        ("--swiglu --squared-relu", "--swiglu and --squared-relu: give one"),
        ("--train-samples 9", "--train-iters and --train-samples: give one"),
        ("--lr-warmup-iters 1 --lr-warmup-fraction 0.1", "give one"),
        ("--data-path a", "--mock-data and a data path"),
        ("--save-interval 2", "--save does not say where"),
        ("--max-position-embeddings 8", "at least --seq-length 16"),
        ("--hidden-size 97", "multiple of --num-attention-heads 4"),
        ("--num-attention-heads 0", "--num-attention-heads 0: must be at least 1"),
        ("--group-query-attention --num-query-groups 3", "multiple of --num-query-groups 3"),
        ("--num-query-groups 2", "needs --group-query-attention"),
        ("--recompute-activations --recompute-granularity full", "contradicts"),
        ("--skip-train --eval-iters 0", "nothing would be done"),
        ("--finetune", "--finetune: needs --load"),
        ("--no-load-optim", "--no-load-optim: needs --load"),
        ("--ckpt-step 3", "--ckpt-step 3: needs --load"),
        ("--rotary-percent 0", "above 0 and at most 1"),
        ("--hidden-dropout 1", "--hidden-dropout 1.0: must be at least 0 and below 1"),
    ],
)
def test_mistakes_are_named(more: str, text: str) -> None:
    assert text in refusal(more)


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal("--num-layers 0 --clip-grad -1 --bf16 --fp16")
    assert all(text in message for text in ("--num-layers 0", "--clip-grad -1.0", "--bf16 and --fp16"))


def test_what_is_missing_is_named() -> None:
    assert "--seq-length" in refusal("", NEEDED.split()[:-2])
    assert "--data-path: needed" in refusal("--train-iters 3", NEEDED.split())
    assert "--train-iters or --train-samples" in refusal("--mock-data", NEEDED.split())
    assert parse_args([*NEEDED.split(), "--mock-data", "--skip-train"]).train_iters is None


COUNTS = ("num-layers", "micro-batch-size", "train-iters", "save-interval", "log-interval", "lr-decay-iters")
AMOUNTS = ("lr", "min-lr", "clip-grad", "weight-decay", "lr-warmup-init", "exit-duration-in-mins")


@given(st.sampled_from(COUNTS), st.integers(-5, 0))
@settings(deadline=None, max_examples=20)
def test_counts_below_one_are_refused(name: str, value: int) -> None:
    assert f"--{name} {value}: must be at least 1" in refusal(f"--{name}={value} --save a")


@given(st.sampled_from(AMOUNTS), st.sampled_from(["-1", "nan", "inf", "-inf"]))
@settings(deadline=None, max_examples=20)
def test_amounts_that_are_no_amounts_are_refused(name: str, value: str) -> None:
    assert f"--{name} {float(value)}: must be a number of at least 0" in refusal(f"--{name}={value}")
