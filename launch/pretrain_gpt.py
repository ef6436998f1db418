"""Pretrain a GPT with DeepSpeed and megatron-core.

    deepspeed --num_gpus 2 launch/pretrain_gpt.py --deepspeed_config ds_configs/zero1_bf16.json \
        --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 \
        --micro-batch-size 8 --train-iters 1000 --lr 3e-4 --data-path data/corpus_text_document --save runs/a

Also starts under torchrun and srun. Reads from top to bottom: arguments, configuration, process groups,
model, engine, data, checkpoint, training.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone that is not installed

from pretraining.arguments import IGNORED_FLAGS, parse_args

from ds_efficient.errors import USER_ERROR_EXIT, UserError

logger = logging.getLogger("pretrain_gpt")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit status."""
    args = parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    _set_up_logging(args.log_level, rank)
    for flag, reason in IGNORED_FLAGS.items():
        if getattr(args, flag[2:].replace("-", "_")):
            logger.info("%s has no effect here: %s", flag, reason)

    # Configuration: everything that can be refused is refused before anything is allocated.
    from pretraining import processes, setup
    from pretraining.settings import reconcile

    from ds_efficient import load_config
    from ds_efficient.core.deepspeed_compat import require_version

    efficiency = load_config(args.deepspeed_config)
    require_version()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    settings = reconcile(args, efficiency.deepspeed, world_size)
    efficiency = load_config(dict(settings.deepspeed))
    setup.check_layout(args, settings, world_size)
    tokenizer = setup.build_tokenizer_from(args)
    setup.check_environment(args, efficiency)

    # Process groups and random streams.
    processes.start_processes(args)
    parallel = processes.start_model_parallel(args)

    # Model and engine.
    from pretraining.model import parameter_groups
    from pretraining.pretrained import build_with_weights
    from pretraining.schedule import LRScheduler, schedule_from

    import ds_efficient
    from ds_efficient.core.shape import padded_vocab_size
    from megatron_patches import MegatronMpu

    vocab_size = padded_vocab_size(
        tokenizer.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    model = build_with_weights(args, settings, vocab_size, efficiency, tokenizer)
    optimizer_params = settings.deepspeed["optimizer"]["params"]
    schedule = None
    if settings.own_schedule and not args.skip_train and not setup.layer_token_schedule(args, efficiency):
        schedule = schedule_from(args, optimizer_params["lr"], settings.train_iters)
    engine, _, _, _ = ds_efficient.initialize(
        model=model,
        model_parameters=lambda changed: parameter_groups(changed, optimizer_params["weight_decay"]),
        config=efficiency,
        mpu=MegatronMpu(),
        lr_scheduler=None if schedule is None else lambda optimizer: LRScheduler(optimizer, schedule),
        total_steps=settings.train_iters,
    )

    # Data, progress, checkpoint. The random streams are restored last, after everything that might draw.
    from pretraining import checkpoints

    data = setup.Data(args, settings, tokenizer, parallel)
    progress = checkpoints.Progress()
    order = checkpoints.DataOrder(data.datasets.identity, data.datasets.changes_since)
    checkpoints.register_states(engine, args, settings, vocab_size, tokenizer, progress, order)
    resumed = checkpoints.load(engine, args, settings, progress, order)
    log = setup.open_run_log(args) if rank == 0 else None
    setup.announce(args, settings, engine, vocab_size, progress, log, resumed)

    # Training.
    trainer = setup.build_trainer(args, settings, engine, data, progress, parallel, log, vocab_size)
    if args.skip_train:
        setup.require_eval_splits(data)
        for split in data.eval_splits:
            trainer.evaluate(split)
        trainer.finish("--skip-train")
    elif progress.step >= settings.train_iters:
        logger.info("nothing to do: the checkpoint is at step %d of %d", progress.step, settings.train_iters)
        trainer.finish(f"--train-iters {settings.train_iters} reached")
    else:
        trainer.run()
        if "test" in data.eval_splits and args.eval_iters > 0 and progress.step >= settings.train_iters:
            trainer.evaluate("test")
    return 0


def _set_up_logging(level: str, rank: int) -> None:
    """Log to standard output, on rank 0 only; the other ranks keep warnings."""
    logging.basicConfig(
        stream=sys.stdout,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.WARNING,
        force=True,
    )
    chosen = getattr(logging, level.upper()) if rank == 0 else logging.ERROR
    # megatron-core's and DeepSpeed's notes on absent packages: this project needs none of them.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|deepspeed)\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|deepspeed)\.")
    for name in ("pretrain_gpt", "pretraining", "ds_efficient", "megatron_patches"):
        logging.getLogger(name).setLevel(chosen)


def _shut_down() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def run(argv: Sequence[str] | None = None) -> Any:
    """Run `main`; users' mistakes become one message and exit status 2, whichever ranks they happen on."""
    try:
        status = main(argv)
    except UserError as error:
        from pretraining import failure

        failure.report(error)
        return USER_ERROR_EXIT
    except Exception as error:
        from pretraining import failure

        if not failure.is_lost_connection(error):
            raise
        failure.report_lost_connection()
        return 1
    _shut_down()
    return status


if __name__ == "__main__":
    sys.exit(run())
