"""Training and evaluation steps, with and without pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from pretraining.settings import Settings

Batch = dict[str, torch.Tensor]


def mean_loss(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the mean of the per-token losses (B, S) where ``loss_mask`` is 1; 0 where it is 0 everywhere."""
    mask = batch["loss_mask"].float()
    return (losses.float() * mask).sum() / mask.sum().clamp(min=1.0)


class PlainRunner:
    """Steps of an engine that holds the whole depth of the model."""

    def __init__(self, engine: Any, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings

    def _forward(self, batch: Batch) -> torch.Tensor:
        losses = self.engine(
            batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"]
        )
        return mean_loss(losses, batch)

    def train_step(self, batches: Iterator[Batch]) -> torch.Tensor:
        """Run one optimizer step; return the mean loss of this data-parallel rank, on the device."""
        total: torch.Tensor | None = None
        for _ in range(self.settings.num_microbatches):
            loss = self._forward(next(batches))
            self.engine.backward(loss)
            self.engine.step()
            part = loss.detach()
            total = part if total is None else total + part
        assert total is not None
        return total / self.settings.num_microbatches

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], count: int) -> torch.Tensor:
        """Return the mean loss over `count` batches of this data-parallel rank."""
        total: torch.Tensor | None = None
        for _ in range(count):
            part = self._forward(next(batches))
            total = part if total is None else total + part
        assert total is not None
        return total / count


class PipelinedRunner:
    """Steps of an engine that holds one pipeline stage."""

    def __init__(self, engine: Any, settings: Settings, seq_length: int) -> None:
        from megatron_patches.pipeline import PipelineRunner

        self._pipeline = PipelineRunner(
            engine,
            num_microbatches=settings.num_microbatches,
            micro_batch_size=settings.micro_batch_size,
            seq_length=seq_length,
            loss_function=mean_loss,
        )

    def train_step(self, batches: Iterator[Batch]) -> torch.Tensor:
        """Run one optimizer step; return the mean loss of this data-parallel rank, on the device."""
        loss = self._pipeline.run(batches, train=True)
        self._pipeline.step()
        return loss

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], count: int) -> torch.Tensor:
        """Return the mean loss over `count` batches of this data-parallel rank."""
        return self._pipeline.run(batches, count, train=False)


def average_over_data_parallel(value: torch.Tensor, group: Any) -> float:
    """Return the mean of a scalar over the data-parallel ranks."""
    total = value.detach().clone().double()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
        total /= dist.get_world_size(group)
    return float(total)
