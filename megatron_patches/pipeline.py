"""One training step through pipeline stages: megatron-core's 1F1B schedule, DeepSpeed's optimizer.

The schedule runs the micro-batches on the bare module while the engine's own reduction is switched off; then
the tied embedding's gradients are summed over the first and the last stage, and the engine reduces over the
data-parallel group and steps. That works with ZeRO 0 and 1: higher stages partition gradients during the
backward pass, which the schedule does not go through (refused in `ds_efficient.core.parallelism`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

Batch = dict[str, torch.Tensor]
LossSum = Callable[[torch.Tensor, Batch], torch.Tensor]


class PipelineRunner:
    """Runs forward and backward passes of all micro-batches of a step.

    Args:
        engine: DeepSpeed engine around a GPTModel of this stage.
        num_microbatches: passes a step.
        micro_batch_size: samples a pass.
        seq_length: tokens a sample.
        loss_function: (per-token losses (B, S), batch) -> scalar mean loss of the micro-batch.
    """

    def __init__(
        self,
        engine: Any,
        *,
        num_microbatches: int,
        micro_batch_size: int,
        seq_length: int,
        loss_function: LossSum,
    ) -> None:
        self.engine = engine
        self.num_microbatches = num_microbatches
        self.micro_batch_size = micro_batch_size
        self.seq_length = seq_length
        self.loss_function = loss_function
        self._schedule = get_forward_backward_func()

    def _forward_step(self, batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        output = model(
            batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"]
        )

        def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            mean = self.loss_function(losses, batch)
            # The schedule divides the returned tensor in place, so what is logged must be a copy.
            return mean, {"loss": mean.detach().clone()}

        return output, loss

    def run(
        self, batches: Iterator[Batch], num_microbatches: int | None = None, *, train: bool
    ) -> torch.Tensor:
        """Run the schedule over `batches`.

        Returns:
            Mean loss over the micro-batches on every stage of this pipeline, fp32, on the device.
        """
        count = num_microbatches or self.num_microbatches
        context = self.engine.no_sync() if train else contextlib.nullcontext()
        with context:
            results = self._schedule(
                forward_step_func=self._forward_step,
                data_iterator=batches,
                model=[self.engine.module],
                num_microbatches=count,
                seq_length=self.seq_length,
                micro_batch_size=self.micro_batch_size,
                forward_only=not train,
            )
        device = next(self.engine.module.parameters()).device
        total = torch.zeros((), dtype=torch.float32, device=device)
        for result in results:
            total += result["loss"].float()
        mean = total / count
        dist.broadcast(
            mean,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        attachment = getattr(self.engine, "ds_efficient", None)
        if train and attachment is not None and attachment.needs_loss:
            attachment.loss = float(mean)
        return mean

    def step(self) -> None:
        """Complete, reduce and apply the gradients of `run`."""
        self._sum_tied_embeddings()
        self.engine.allreduce_gradients()
        self.engine.step()

    def _sum_tied_embeddings(self) -> None:
        module = self.engine.module
        if not module.share_embeddings_and_output_weights:
            return
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        if first or last:
            weight = module.shared_embedding_or_output_weight()
            gradient = weight.grad if weight.grad is not None else weight.grad_accum
            dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
