"""The steps of ``pretrain_gpt.py`` that come before and around the training loop."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_efficient.core.flops import executed_flops_per_token, model_flops_per_token
from ds_efficient.core.gpu_peaks import peak_tflops
from ds_efficient.core.inventory import Inventory
from ds_efficient.core.layout import ParallelLayout
from ds_efficient.core.parallelism import require, warnings
from ds_efficient.core.shape import ModelShape, Recompute
from ds_efficient.errors import UserError
from ds_efficient.report.runlog import RunLog
from ds_efficient.version import __version__
from pretraining import checkpoints
from pretraining.datasets import batch_specs, broadcast_batch, build_datasets, make_loader
from pretraining.processes import Parallel
from pretraining.settings import Settings
from pretraining.steps import PipelinedRunner, PlainRunner
from pretraining.stop import StopSignal
from pretraining.throughput import Meter, device_name, quantity
from pretraining.tokenizers import build_tokenizer
from pretraining.trainer import Trainer

logger = logging.getLogger(__name__)


def check_environment(args: argparse.Namespace, efficiency: Any) -> None:
    """Refuse missing packages and unwritable folders before anything is allocated."""
    from megatron_patches.layer_spec import require_transformer_engine
    from megatron_patches.version_guard import check

    check(allow_untested=efficiency.general.allow_untested_megatron)
    if args.transformer_impl == "transformer_engine":
        require_transformer_engine()
    args.run_dir = args.run_dir or efficiency.general.run_dir or args.save
    for path, flag in (
        (args.save, "--save"),
        (args.run_dir, "--run-dir"),
        (args.data_cache_path, "--data-cache-path"),
    ):
        if path is not None:
            checkpoints.check_writable(path, flag)


def recompute_of(args: argparse.Namespace) -> Recompute:
    """Return the activation recomputation of the command line."""
    return Recompute(
        args.recompute_granularity,
        args.recompute_method,
        args.recompute_num_layers,
        tuple(args.recompute_modules or ("core_attn",)),
    )


def model_shape(args: argparse.Namespace, vocab_size: int) -> ModelShape:
    """Return the model's shape; `vocab_size` is the padded one."""
    return ModelShape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        vocab_size=vocab_size,
        seq_length=args.seq_length,
        ffn_hidden_size=args.ffn_hidden_size,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        swiglu=args.swiglu,
        untie_embeddings=args.untie_embeddings_and_output_weights,
        add_bias_linear=not args.disable_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        normalization=args.normalization,
        qk_layernorm=args.qk_layernorm,
        position_embedding_type=args.position_embedding_type,
        max_position_embeddings=args.max_position_embeddings,
    )


def check_layout(args: argparse.Namespace, settings: Settings, world_size: int) -> None:
    """Refuse combinations that do not run; the rules are those of ``ds_efficient plan``."""
    if args.sequence_parallel and args.tensor_model_parallel_size == 1:
        logger.warning("--sequence-parallel: switched off, it needs --tensor-model-parallel-size above 1")
        args.sequence_parallel = False
    layout = ParallelLayout.from_config(
        settings.deepspeed,
        world_size=world_size,
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        virtual_pipeline_layers=args.num_layers_per_virtual_pipeline_stage,
        sequence_parallel=args.sequence_parallel,
        recompute=recompute_of(args),
        device="cuda" if torch.cuda.is_available() else "cpu",
        transformer_engine=args.transformer_impl == "transformer_engine",
        num_layers=args.num_layers,
        heads=args.num_attention_heads,
        query_groups=args.num_query_groups,
        ffn=args.ffn_hidden_size,
        seq_length=args.seq_length,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
    )
    require(layout)
    # With pipeline stages the JSON holds the batch of all passes (`settings._write_batches`).
    for warning in warnings(dataclasses.replace(layout, micro_batch_size=settings.micro_batch_size)):
        logger.warning("%s", warning)


def layer_token_schedule(args: argparse.Namespace, efficiency: Any) -> bool:
    """Return whether the learning rate follows layer tokens; then the arguments of its schedule are idle."""
    ltd = efficiency.random_ltd
    if not (ltd.enabled and ltd.layer_token_lr_schedule.enabled):
        return False
    for name in sorted(args.given):
        if name == "min_lr" or name.startswith(("lr_warmup", "lr_decay")):
            logger.warning("--%s: has no effect, layer_token_lr_schedule is enabled", name.replace("_", "-"))
    return True


def build_tokenizer_from(args: argparse.Namespace) -> Any:
    """Return the tokenizer that the command line names; synthetic data needs only a vocabulary."""
    if (
        args.mock_data
        and args.vocab_size is not None
        and not args.given & {"tokenizer_type", "tokenizer_model"}
    ):
        return build_tokenizer("NullTokenizer", None, args.vocab_size - 1)
    return build_tokenizer(
        args.tokenizer_type, args.tokenizer_model, args.vocab_size, eod_token=args.eod_token
    )


def open_run_log(args: argparse.Namespace) -> RunLog | None:
    """Open run.jsonl in the run's folder; None without ``--run-dir`` and ``--save``."""
    return None if args.run_dir is None else RunLog(Path(args.run_dir) / "run.jsonl")


class Data:
    """Batches of the splits on this rank's device."""

    def __init__(
        self, args: argparse.Namespace, settings: Settings, tokenizer: Any, parallel: Parallel
    ) -> None:
        self._args = args
        self._settings = settings
        self._parallel = parallel
        self.datasets = build_datasets(args, tokenizer, parallel.info)
        masked = self.datasets.attention_mask
        self._specs = batch_specs(settings.micro_batch_size, args.seq_length, attention_mask=masked)
        info = parallel.info
        self._stage_needs_data = masked or info.is_first_stage or info.is_last_stage
        self.eval_splits = self._splits()

    def _splits(self) -> tuple[str, ...]:
        """Which of valid and test exist, with the same answer on every rank."""
        box = [[name for name in ("valid", "test") if getattr(self.datasets, name) is not None]]
        dist.broadcast_object_list(box, src=0, group=self._parallel.info.host_group)
        return tuple(box[0])

    def batches(self, split: str, consumed_samples: int) -> Iterator[dict[str, Any]]:
        """Yield the batches of `split` from `consumed_samples` on."""
        if not self._stage_needs_data:
            yield from itertools.repeat(dict.fromkeys(self._specs))
        info = self._parallel.info
        reader: Iterator[Any] = itertools.repeat(None)
        if info.tensor_parallel_rank == 0:
            reader = iter(
                make_loader(
                    getattr(self.datasets, split),
                    consumed_samples,
                    self._settings.micro_batch_size,
                    info.data_parallel_rank,
                    info.data_parallel_size,
                    self._args.num_workers,
                )
            )
        for batch in reader:
            yield broadcast_batch(
                batch,
                self._parallel.tensor_group,
                self._parallel.tensor_source,
                self._specs,
                self._parallel.device,
            )


def require_eval_splits(data: Data) -> None:
    """Refuse ``--skip-train`` where there is nothing to evaluate either.

    Raises:
        UserError: no validation and no test data.
    """
    if not data.eval_splits:
        raise UserError(
            "--skip-train: there is no validation or test data; name some by --split or --valid-data-path, "
            "and --eval-iters above 0"
        )


def announce(
    args: argparse.Namespace,
    settings: Settings,
    engine: Any,
    vocab_size: int,
    progress: checkpoints.Progress,
    log: RunLog | None,
    resumed: bool,
) -> None:
    """Say what runs, in the log and in run.jsonl."""
    shape = model_shape(args, vocab_size)
    parameters = Inventory.from_shape(shape).total_parameters
    world = dist.get_world_size()
    logger.info(
        "GPT %s parameters: %s | %s, ZeRO %d | %d ranks: tensor %d, pipeline %d, data %d | "
        "batch %d = %d x %d x %d",
        quantity(parameters),
        shape,
        settings.precision,
        settings.zero_stage,
        world,
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        settings.data_parallel_size,
        settings.global_batch_size,
        settings.micro_batch_size,
        settings.data_parallel_size,
        settings.num_microbatches,
    )
    if resumed:
        logger.info(
            "resumed from %s at step %d (%d samples)", args.load, progress.step, progress.consumed_samples
        )
    if log is None:
        return
    goes_on = resumed and not args.finetune
    continues = log.path.stat().st_size > 0
    if not (goes_on and continues):
        _write_start(log, args, settings, world, parameters)
    if goes_on:
        log.write("resume", step=progress.step)


def _write_start(
    log: RunLog, args: argparse.Namespace, settings: Settings, world: int, parameters: int
) -> None:
    plain = {name: value for name, value in vars(args).items() if name != "given"}
    log.write(
        "run",
        config=dict(settings.deepspeed),
        args=plain,
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        versions=versions(),
        gpu=device_name(),
        world_size=world,
        parameters=parameters,
        precision=settings.precision,
        start_time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import deepspeed
    import megatron.core

    return {
        "ds_efficient": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "megatron-core": megatron.core.__version__,
        "cuda": torch.version.cuda or "none",
    }


def executed_flops(args: argparse.Namespace, shape: ModelShape, engine: Any, group: Any) -> float:
    """Return the FLOPs of one token that the whole model executes now: recomputation and techniques counted.

    A rank knows what the techniques do on its pipeline stage only; the ranks add up what the stages leave
    out.

    Args:
        args: command line.
        shape: of the whole dense model.
        engine: DeepSpeed engine with the techniques' actions.
        group: gloo group of all ranks.
    """
    from megatron_patches.initialization import global_name

    stages = args.pipeline_model_parallel_size
    count = functools.partial(
        executed_flops_per_token, shape, recompute=recompute_of(args), pipeline_parallel=stages
    )
    every = count().total
    groups = engine.ds_efficient.actions_now()
    if not groups:
        return every
    first_layer = engine.module.decoder.layers[0].layer_number - 1
    actions = [
        # with a dot, so that the number at the end of a whole layer's name is found too
        dataclasses.replace(action, module=global_name(f"{action.module}.", first_layer, tied=False)[:-1])
        for found in groups.values()
        for action in found
    ]
    left_out = torch.tensor(every - count(actions=actions).total, dtype=torch.float64)
    if stages > 1:
        dist.all_reduce(left_out, group=group)
        left_out /= dist.get_world_size() // stages  # ranks that hold the same stage
    return every - float(left_out)


def build_trainer(
    args: argparse.Namespace,
    settings: Settings,
    engine: Any,
    data: Data,
    progress: checkpoints.Progress,
    parallel: Parallel,
    log: RunLog | None,
    vocab_size: int,
) -> Trainer:
    """Put the parts together."""
    shape = model_shape(args, vocab_size)
    model_flops = model_flops_per_token(shape).total
    peak = peak_tflops(device_name(), settings.precision)
    runner: PlainRunner | PipelinedRunner = PlainRunner(engine, settings)
    if args.pipeline_model_parallel_size > 1:
        runner = PipelinedRunner(engine, settings, args.seq_length)
    return Trainer(
        args=args,
        settings=settings,
        engine=engine,
        runner=runner,
        progress=progress,
        log=log,
        meter=Meter(
            tokens_per_step=settings.global_batch_size * args.seq_length,
            flops_per_token=model_flops,
            world_size=dist.get_world_size(),
            peak_flops=None if peak is None else peak * 1e12,
        ),
        stop=StopSignal(args, parallel.info.host_group),
        train_batches=data.batches("train", progress.consumed_samples),
        eval_batches={split: functools.partial(data.batches, split, 0) for split in data.eval_splits},
        data_parallel_group=parallel.data_group,
        executed_share=lambda: executed_flops(args, shape, engine, parallel.info.host_group) / model_flops,
    )
