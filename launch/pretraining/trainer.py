"""The loop: steps, log lines, evaluations, checkpoints, stopping."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.errors import UserError
from ds_efficient.random_ltd.accounting import budget_reached
from ds_efficient.report.runlog import RunLog
from pretraining import checkpoints
from pretraining.settings import Settings
from pretraining.steps import Batch, average_over_data_parallel
from pretraining.stop import Stop, StopSignal
from pretraining.throughput import Meter, duration, peak_memory, quantity

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """One run.

    Attributes:
        args: command line.
        settings: reconciled settings.
        engine: DeepSpeed engine.
        runner: `PlainRunner` or `PipelinedRunner`.
        progress: where the run stands.
        log: run.jsonl on rank 0, None elsewhere or without ``--run-dir``.
        meter: speed of training steps.
        stop: when to end early.
        train_batches: endless batches of this rank.
        eval_batches: for each split a function that starts its batches anew; empty without data for it.
        data_parallel_group: for averages.
        executed_share: returns executed over model FLOPs: recomputation adds, techniques leave out; a
            collective call.
    """

    args: argparse.Namespace
    settings: Settings
    engine: Any
    runner: Any
    progress: checkpoints.Progress
    log: RunLog | None
    meter: Meter
    stop: StopSignal
    train_batches: Iterator[Batch]
    eval_batches: dict[str, Callable[[], Iterator[Batch]]]
    data_parallel_group: Any
    executed_share: Callable[[], float] = lambda: 1.0
    _logged: tuple[int, int] = (0, 0)  # tokens and layer tokens at the last line

    def _tokens(self) -> tuple[int, int]:
        """Return the tokens and layer tokens consumed so far."""
        tokens = self.progress.consumed_samples * self.args.seq_length
        seen = self.engine.ds_efficient.consumed_layer_tokens
        return tokens, tokens * self.args.num_layers if seen is None else seen

    def run(self) -> str:
        """Train to the end or an early stop; return the reason."""
        args, progress = self.args, self.progress
        reason = f"--train-iters {self.settings.train_iters} reached"
        spent = self._budget()
        if spent is not None:  # by the checkpoint already
            self.finish(spent.reason)
            return spent.reason
        saved_at = progress.step
        if progress.step == 0:
            self._evaluate_due(first=True)
        self.engine.train()
        self._logged = self._tokens()
        self.meter.start()
        began, before = time.perf_counter(), progress.seconds
        losses: list[torch.Tensor] = []
        while progress.step < self.settings.train_iters:
            rate = self.engine.get_lr()[0]  # of this step: the scheduler moves on inside it
            losses.append(self.runner.train_step(self.train_batches))
            progress.step += 1
            progress.consumed_samples += self.settings.global_batch_size
            progress.seconds = before + time.perf_counter() - began
            self.meter.count()
            stop = self.stop.after(progress.step) or self._budget()
            last = progress.step == self.settings.train_iters
            if progress.step % args.log_interval == 0 or last or stop:
                self._log(losses, rate)
                losses = []
            pause = time.perf_counter()
            urgent = stop is not None and stop.urgent
            if (progress.step % args.eval_interval == 0 or last) and not urgent:
                self._evaluate_due()
            due = args.save_interval is not None and progress.step % args.save_interval == 0
            if args.save is not None and (due or stop or last) and saved_at != progress.step:
                if losses:  # a diverged state must not become the latest checkpoint
                    self._require_finite(self._mean(losses))
                self._save()
                saved_at = progress.step
            self.meter.exclude(time.perf_counter() - pause)
            began += time.perf_counter() - pause
            if stop is not None and (urgent or not last):
                reason = stop.reason
                break
        self.finish(reason)
        return reason

    def _budget(self) -> Stop | None:
        """Return whether a budget of tokens or layer tokens is spent; the same on every rank."""
        ltd = self.engine.ds_efficient.config.random_ltd
        if not ltd.enabled:
            return None
        spent = budget_reached(
            *self._tokens(), token_budget=ltd.token_budget, layer_token_budget=ltd.layer_token_budget
        )
        return None if spent is None else Stop(f"random_ltd.{spent}", urgent=False)

    def _mean(self, losses: list[torch.Tensor]) -> float:
        return average_over_data_parallel(torch.stack(losses).mean(), self.data_parallel_group)

    def _log(self, losses: list[torch.Tensor], rate: float) -> None:
        """Write one line and one record; `losses` are those of the interval, on the device."""
        loss = self._mean(losses)
        speed = self.meter.read()
        progress, norm = self.progress, compat.gradient_norm_of_last_step(self.engine)
        tokens, layer_tokens = self._tokens()
        of_interval = (layer_tokens - self._logged[1]) / max(1, tokens - self._logged[0])
        self._logged = tokens, layer_tokens
        executed_share = self.executed_share()
        memory = self._largest(peak_memory())
        scale = compat.loss_scale(self.engine)
        if self.log is not None:
            executed = (speed["model_tflops"] or 0.0) * executed_share
            self.log.write(
                "train",
                step=progress.step,
                loss=loss,
                lr=rate,
                grad_norm=norm,
                tokens=tokens,
                layer_tokens=layer_tokens,
                seconds=progress.seconds,
                tokens_per_second=speed["tokens_per_second"],
                layer_tokens_per_second=(speed["tokens_per_second"] or 0.0) * of_interval,
                model_tflops=speed["model_tflops"],
                executed_tflops=executed,
                mfu=speed["mfu"],
                peak_memory=memory,
                **({} if scale is None else {"loss_scale": scale}),
                **{name: dict(values) for name, values in self.engine.ds_efficient.metrics.items()},
            )
        remaining = (self.settings.train_iters - progress.step) * (speed["seconds_per_step"] or 0.0)
        mfu = "N/A" if speed["mfu"] is None else f"{100 * speed['mfu']:.1f}%"
        logger.info(
            "step %d/%d | loss %.4f | lr %.3e | norm %s | %s tok/s | %.3g TFLOP/s | MFU %s | %.2f GiB%s | "
            "left %s",
            progress.step,
            self.settings.train_iters,
            loss,
            rate,
            "N/A" if norm is None else f"{norm:.3f}",
            quantity(speed["tokens_per_second"] or 0.0),
            speed["model_tflops"],
            mfu,
            memory / 2**30,
            "" if scale is None else f" | scale {scale:g}",
            duration(remaining),
        )
        self._require_finite(loss)
        self.meter.start()

    def _require_finite(self, loss: float) -> None:
        """Raise UserError, on all ranks, where the loss is not a number; fp16's scaling lives with some."""
        if math.isfinite(loss) or self.settings.precision == "fp16":
            return
        if self.log is not None:
            self.log.write("end", step=self.progress.step, reason=f"diverged: the loss is {loss}")
        raise UserError(
            f"the loss is {loss} at step {self.progress.step}: training has diverged. Resume from the last "
            "checkpoint with a lower --lr, a longer warm-up or a smaller --clip-grad"
        )

    def _largest(self, value: int) -> int:
        """Return the largest of the ranks' values."""
        box = torch.tensor([value], dtype=torch.int64, device=self.engine.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def _evaluate_due(self, *, first: bool = False) -> None:
        if self.args.eval_iters > 0 and "valid" in self.eval_batches:
            self.evaluate("valid")
        elif first and self.args.eval_iters > 0:
            logger.info("no validation data: --split or --valid-data-path names none")

    def evaluate(self, split: str) -> float:
        """Return the mean loss over ``--eval-iters`` global batches, the same ones every time."""
        began = time.perf_counter()
        self.engine.eval()
        passes = self.args.eval_iters * self.settings.num_microbatches
        local = self.runner.evaluate(self.eval_batches[split](), passes)
        self.engine.train()
        loss = average_over_data_parallel(local, self.data_parallel_group)
        samples = self.args.eval_iters * self.settings.global_batch_size
        seconds = time.perf_counter() - began
        perplexity = math.exp(min(loss, 50.0))
        logger.info(
            "%s loss %.4f | perplexity %.2f | at step %d | %.1f s",
            split,
            loss,
            perplexity,
            self.progress.step,
            seconds,
        )
        if self.log is not None:
            self.log.write(
                "eval",
                step=self.progress.step,
                split=split,
                loss=loss,
                perplexity=perplexity,
                tokens=samples * self.args.seq_length,
                train_tokens=self.progress.consumed_samples * self.args.seq_length,
                train_seconds=self.progress.seconds,
                seconds=seconds,
            )
        return loss

    def _save(self) -> None:
        began = time.perf_counter()
        folder = checkpoints.save(self.engine, self.args, self.progress)
        logger.info("saved %s in %.1f s", folder, time.perf_counter() - began)

    def finish(self, reason: str) -> None:
        """Write the techniques' evidence and why the run ends."""
        evidence = {
            name: {"acted": proof.acted, "summary": proof.summary, **proof.counts}
            for name, proof in self.engine.ds_efficient.evidence().items()
        }
        if self.log is not None:
            if evidence:
                self.log.write("evidence", **evidence)
            self.log.write("end", step=self.progress.step, reason=reason)
        logger.info("stopped at step %d: %s", self.progress.step, reason)
