"""What the data arguments mean: blends with weights, splits, and numbers of samples. Pure functions."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ds_efficient.errors import UserError

SPLITS = ("train", "valid", "test")
DEFAULT_SPLIT = "969,30,1"


@dataclass(frozen=True)
class Blend:
    """Dataset prefixes (absolute), and weights or None for weights by size."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class DataRequest:
    """Everything that decides which samples a run sees, in which order.

    Attributes:
        blend: one blend cut by ``split``; or None.
        blend_per_split: a blend or None for train, valid, test; or None.
        split: shares of train, valid, test; only with ``blend``.
        mock: synthetic tokens instead.
        num_samples: samples to draw for train, valid, test; 0 leaves a split out.
        seq_length: tokens a sample.
        seed: of the shuffle.
        reset_position_ids, reset_attention_mask, eod_mask_loss: as in Megatron-LM.
        cache: folder of the index caches.
    """

    blend: Blend | None
    blend_per_split: tuple[Blend | None, Blend | None, Blend | None] | None
    split: tuple[float, float, float] | None
    mock: bool
    num_samples: tuple[int, int, int]
    seq_length: int
    seed: int
    reset_position_ids: bool
    reset_attention_mask: bool
    eod_mask_loss: bool
    cache: str

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Every prefix once, in order."""
        blends = (self.blend, *(self.blend_per_split or ()))
        return tuple(dict.fromkeys(prefix for blend in blends if blend for prefix in blend.prefixes))


def parse_blend(values: Sequence[str] | None, argument: str) -> Blend | None:
    """Read ``prefix``, ``prefix prefix ...`` or ``weight prefix weight prefix ...``.

    Raises:
        UserError: weights and prefixes do not alternate, a weight is not above 0, a prefix stands twice.
    """
    if not values:
        return None
    numbers = [_number(value) for value in values]
    weights: tuple[float, ...] | None = None
    if all(number is None for number in numbers):
        prefixes = list(values)
    else:
        pairs = list(zip(numbers[::2], values[1::2], strict=False))
        alternate = len(values) % 2 == 0 and all(number is not None for number in numbers[::2])
        if not alternate or any(number is not None for number in numbers[1::2]):
            raise UserError(
                f"{argument} {' '.join(values)}: weights are malformed; give prefixes alone, or a weight "
                "before "
                "every prefix (a prefix that is a number: write ./NUMBER)"
            )
        weights = tuple(number for number, _ in pairs if number is not None)
        prefixes = [prefix for _, prefix in pairs]
        bad = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
        if bad:
            raise UserError(f"{argument}: weight {bad[0]}: must be above 0 and finite")
    absolute = tuple(os.path.abspath(prefix) for prefix in prefixes)
    double = [prefix for index, prefix in enumerate(absolute) if prefix in absolute[:index]]
    if double:
        raise UserError(f"{argument}: {double[0]} stands twice; give it once with a larger weight")
    return Blend(absolute, weights)


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def parse_split(split: str) -> tuple[float, float, float]:
    """Read ``969,30,1``; missing shares are 0.

    Raises:
        UserError: not one to three numbers of at least 0 that are not all 0.
    """
    shares = [_number(part) for part in split.split(",")]
    valid = [share for share in shares if share is not None and math.isfinite(share) and share >= 0]
    if len(valid) != len(shares) or not 1 <= len(shares) <= 3 or sum(valid) <= 0:
        raise UserError(
            f"--split {split}: must be one to three numbers of at least 0, with commas, not all 0, such as "
            "99,1,0"
        )
    first, second, third = [*valid, 0.0, 0.0][:3]
    return first, second, third


def sample_counts(args: argparse.Namespace, has_test: bool) -> tuple[int, int, int]:
    """Return the samples to draw for train, valid, test.

    Training needs those of the whole run, also when it resumes: the number decides the shuffle. Every
    evaluation uses the same ``eval_iters`` batches from the beginning of its split, so one evaluation's worth
    is enough.
    """
    train = getattr(args, "train_samples", None)
    if train is None:
        train = (args.train_iters or 0) * args.global_batch_size
    evaluation = args.eval_iters * args.global_batch_size
    return train, evaluation, evaluation if has_test else 0


def data_request(args: argparse.Namespace) -> DataRequest:
    """Check the data arguments against each other.

    Raises:
        UserError: a contradiction, or nothing to read.
    """
    blend = parse_blend(args.data_path, "--data-path")
    per_split = (
        parse_blend(args.train_data_path, "--train-data-path"),
        parse_blend(args.valid_data_path, "--valid-data-path"),
        parse_blend(args.test_data_path, "--test-data-path"),
    )
    some = any(per_split)
    given = [
        name
        for name, there in (
            ("--data-path", blend),
            ("--train/valid/test-data-path", some),
            ("--mock-data", args.mock_data),
        )
        if there
    ]
    if len(given) != 1:
        raise UserError(
            "no data: give --data-path, or --train-data-path and --valid-data-path, or --mock-data"
            if not given
            else f"{' and '.join(given)}: give one of them"
        )
    if args.split is not None and blend is None:
        raise UserError(f"--split {args.split}: only --data-path is split")
    split = parse_split(args.split or DEFAULT_SPLIT) if blend else None
    # The default's share for a test is not a request for one.
    has_test = (
        args.mock_data
        or per_split[2] is not None
        or (args.split is not None and split is not None and split[2] > 0)
    )
    counts = sample_counts(args, has_test)
    _check_presence(counts, blend, per_split, split)
    first = (blend or next(filter(None, per_split), None)) if not args.mock_data else None
    cache = args.data_cache_path or (
        os.path.join(os.path.dirname(first.prefixes[0]), "cache") if first else ""
    )
    return DataRequest(
        blend=blend,
        blend_per_split=per_split if some else None,
        split=split,
        mock=args.mock_data,
        num_samples=counts,
        seq_length=args.seq_length,
        seed=args.seed,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        cache=os.path.abspath(cache) if cache else "",
    )


def _check_presence(
    counts: tuple[int, int, int],
    blend: Blend | None,
    per_split: tuple[Blend | None, ...],
    split: tuple[float, float, float] | None,
) -> None:
    """Refuse a split that samples are wanted from but that gets no data by the arguments alone."""
    remedies = (
        "--train-data-path, or a larger share in --split",
        "--split 99,1,0, or --eval-iters 0",
        "--split 98,1,1",
    )
    for index, name in enumerate(SPLITS):
        empty = (split is not None and split[index] == 0) or (any(per_split) and per_split[index] is None)
        if counts[index] > 0 and empty and (blend or any(per_split)):
            source = "the share in --split is 0" if split is not None else f"--{name}-data-path is missing"
            raise UserError(f"no {name} data: {source}; give {remedies[index]}")
