"""One truth from the command line and the DeepSpeed JSON: where both speak they must agree."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ds_efficient.errors import UserError

NEVER = 2**31 - 1
_SEEDS = 2**32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCHEDULE_ARGUMENTS = (
    "lr_decay_style lr_decay_iters lr_warmup_iters lr_warmup_fraction lr_warmup_init min_lr"
).split()


@dataclass(frozen=True)
class Settings:
    """What the run uses, after the command line and the JSON were reconciled.

    Attributes:
        deepspeed: the JSON with every derived key filled in.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        micro_batch_size: samples a data-parallel rank and pass.
        global_batch_size: samples an optimizer step.
        num_microbatches: passes an optimizer step.
        data_parallel_size: world size over tensor x pipeline x context ranks.
        train_iters: optimizer steps of the run.
        own_schedule: whether the learning rate follows the command line (not the JSON's ``scheduler``).
    """

    deepspeed: Mapping[str, Any]
    precision: str
    micro_batch_size: int
    global_batch_size: int
    num_microbatches: int
    data_parallel_size: int
    train_iters: int
    own_schedule: bool

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters in the forward pass."""
        return DTYPES[self.precision]

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the JSON."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))


class _Merge:
    """Collects contradictions between the command line and the JSON."""

    def __init__(self, args: argparse.Namespace, config: dict[str, Any]) -> None:
        self.args = args
        self.config = config
        self.problems: list[str] = []

    def choose(self, path: str, argument: str, value: Any, *, fill: bool = True) -> Any:
        """Return the JSON's value at `path`, or the command line's; note it where both differ."""
        *parents, key = path.split(".")
        section = self.config
        for parent in parents:
            section = section.setdefault(parent, {}) if fill else section.get(parent, {})
        stands = section.get(key)
        if stands is None:
            if fill and value is not None:
                section[key] = value
            return value
        if argument in self.args.given and value is not None and stands != value:
            flag = "--" + argument.replace("_", "-")
            self.problems.append(
                f"{path}: {stands!r} in the JSON, {flag} {value!r} on the command line; remove one of them"
            )
        return stands


def reconcile(args: argparse.Namespace, config: Mapping[str, Any], world_size: int) -> Settings:
    """Fill the DeepSpeed JSON from the arguments and check that nothing contradicts.

    Args:
        args: from `pretraining.arguments.parse_args`.
        config: the JSON as read.
        world_size: number of processes.

    Raises:
        UserError: every contradiction and every batch size that does not divide.
    """
    merge = _Merge(args, copy.deepcopy(dict(config)))
    precision = _precision(merge)
    data_parallel = _data_parallel_size(merge, world_size)
    micro, total = _batches(merge, data_parallel)
    _optimizer(merge)
    own_schedule = _schedule(merge)
    merge.choose("gradient_clipping", "clip_grad", float(args.clip_grad))
    merge.choose("ds_efficient.seed", "seed", args.seed)
    args.seed = merge.config["ds_efficient"]["seed"]
    if args.seed >= _SEEDS:
        merge.problems.append(
            f"--seed {args.seed}: must be below 2^32, the limit of numpy's shuffles of the data"
        )
    merge.config.setdefault("steps_per_print", NEVER)
    train_iters = args.train_iters or 0
    if args.train_samples is not None and total:
        train_iters = args.train_samples // total
        if train_iters == 0:
            merge.problems.append(
                f"--train-samples {args.train_samples}: fewer than one global batch of {total}"
            )
    if merge.problems:
        raise UserError(f"{args.deepspeed_config}:\n  " + "\n  ".join(merge.problems))
    args.micro_batch_size, args.global_batch_size, args.train_iters = micro, total, train_iters
    passes = total // (micro * data_parallel)
    _write_batches(merge.config, micro, total, passes, data_parallel, args.pipeline_model_parallel_size)
    return Settings(
        deepspeed=merge.config,
        precision=precision,
        micro_batch_size=micro,
        global_batch_size=total,
        num_microbatches=passes,
        data_parallel_size=data_parallel,
        train_iters=train_iters,
        own_schedule=own_schedule,
    )


def _precision(merge: _Merge) -> str:
    chosen = []
    for name in ("bf16", "fp16"):
        asked = True if getattr(merge.args, name) else None
        if merge.choose(f"{name}.enabled", name, asked, fill=asked is not None):
            chosen.append(name)
    if len(chosen) > 1:
        merge.problems.append("bf16 and fp16: both enabled; keep one")
    return chosen[0] if chosen else "fp32"


def _data_parallel_size(merge: _Merge, world_size: int) -> int:
    args = merge.args
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    if world_size % model != 0:
        merge.problems.append(
            f"{world_size} processes: must be a multiple of tensor x pipeline x context parallel sizes = "
            f"{args.tensor_model_parallel_size} x {args.pipeline_model_parallel_size} x "
            f"{args.context_parallel_size} = {model}; start more processes (deepspeed --num_gpus), "
            "or lower one"
        )
    return max(1, world_size // model)


def _batches(merge: _Merge, data_parallel: int) -> tuple[int, int]:
    args = merge.args
    micro = merge.choose(
        "train_micro_batch_size_per_gpu", "micro_batch_size", args.micro_batch_size, fill=False
    )
    total = merge.choose("train_batch_size", "global_batch_size", args.global_batch_size, fill=False)
    passes = merge.config.get("gradient_accumulation_steps")
    if micro is None and total is not None:
        micro = max(1, total // (data_parallel * (passes or 1)))
    if micro is None:
        merge.problems.append(
            "--micro-batch-size: needed, or train_micro_batch_size_per_gpu or train_batch_size in the JSON"
        )
        return 1, data_parallel
    if total is None:
        total = micro * data_parallel * (passes or 1)
    one_pass = micro * data_parallel
    if total % one_pass != 0 or total < one_pass:
        merge.problems.append(
            f"global batch {total}: must be a multiple of micro-batch {micro} x {data_parallel} "
            "data-parallel "
            f"ranks = {one_pass}"
        )
        return micro, one_pass
    if passes is not None and passes != total // one_pass:
        merge.problems.append(
            f"gradient_accumulation_steps: {passes} in the JSON, but global batch {total} / (micro-batch "
            f"{micro} x {data_parallel} data-parallel ranks) = {total // one_pass}"
        )
    return micro, total


def _write_batches(
    config: dict[str, Any], micro: int, total: int, passes: int, data_parallel: int, stages: int
) -> None:
    """With pipeline stages the schedule runs the micro-batches, and the engine sees one large one."""
    config["train_batch_size"] = total
    config["train_micro_batch_size_per_gpu"] = total // data_parallel if stages > 1 else micro
    config["gradient_accumulation_steps"] = 1 if stages > 1 else passes


def _optimizer(merge: _Merge) -> None:
    args, config = merge.args, merge.config
    if "optimizer" not in config:
        config["optimizer"] = (
            {"type": "AdamW", "params": {"torch_adam": True, "fused": torch.cuda.is_available()}}
            if args.optimizer == "adam"
            else {"type": "SGD", "params": {"momentum": 0.9}}
        )
    kind = str(config["optimizer"].get("type", "")).lower()
    params = config["optimizer"].setdefault("params", {})
    if merge.choose("optimizer.params.lr", "lr", 0.0 if args.skip_train else args.lr) is None:
        merge.problems.append("--lr: needed, or optimizer.params.lr in the JSON")
    merge.choose("optimizer.params.weight_decay", "weight_decay", args.weight_decay)
    if "adam" in kind or "lamb" in kind:
        merge.choose("optimizer.params.eps", "adam_eps", args.adam_eps)
        stands = params.get("betas")
        betas = [args.adam_beta1, args.adam_beta2]
        if stands is None:
            params["betas"] = betas
        elif {"adam_beta1", "adam_beta2"} & args.given and [float(b) for b in stands] != betas:
            merge.problems.append(
                f"optimizer.params.betas: {stands} in the JSON, {betas} on the command line; "
                "remove one of them"
            )


def _schedule(merge: _Merge) -> bool:
    """Return whether the learning rate follows the command line."""
    scheduler = merge.config.get("scheduler")
    if not scheduler:
        return True
    given = [f"--{name.replace('_', '-')}" for name in _SCHEDULE_ARGUMENTS if name in merge.args.given]
    if given:
        merge.problems.append(
            f"scheduler: {scheduler.get('type')} in the JSON and {', '.join(given)} on the command line; "
            "remove one of them"
        )
    return False
