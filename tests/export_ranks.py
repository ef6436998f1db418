"""Runs of the training script that return the logits of the model in training, for tests of exports."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rank_pool import run_script

TOKENS = torch.arange(2 * 16).view(2, 16).mul(37).remainder(101)


def logits(engine: Any) -> torch.Tensor | None:
    """Return the logits (2, 16, vocabulary) of `TOKENS` in fp32; None except on the last pipeline stage."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    model = engine.module
    training = model.training
    engine.eval()
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            shape = (TOKENS.shape[1], TOKENS.shape[0], model.config.hidden_size)
            hidden = torch.empty(shape, dtype=model.config.params_dtype)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = model(TOKENS, positions, None)
        if not parallel_state.is_pipeline_last_stage():
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            output = None
        else:
            output = gather_from_tensor_model_parallel_region(output).float()
    engine.train(training)
    return output


def run_with_logits(argv: list[str], when: str = "end") -> tuple[int, list[Any] | None]:
    """Run the script; return its status and the logits of this rank at the ``"start"`` or ``"end"``."""
    import pretrain_gpt
    from pretraining import setup

    build, shut_down = setup.build_trainer, pretrain_gpt._shut_down
    engines: list[Any] = []
    found: list[torch.Tensor | None] = [None]

    def build_and_keep(args: Any, settings: Any, engine: Any, *rest: Any) -> Any:
        engines.append(engine)
        if when == "start":
            found[0] = logits(engine)
        return build(args, settings, engine, *rest)

    def look_and_shut_down() -> None:
        if when == "end":
            found[0] = logits(engines[0])
        shut_down()

    with (
        mock.patch.object(setup, "build_trainer", build_and_keep),
        mock.patch.object(pretrain_gpt, "_shut_down", look_and_shut_down),
    ):
        status = run_script(argv)
    return status, None if found[0] is None else found[0].tolist()


class LogitsPool:
    """Like RankPool; keeps the logits of the last rank, which is on the last pipeline stage."""

    def __init__(self, pool: Any, when: str = "end") -> None:
        self._pool, self._when = pool, when
        self.logits: torch.Tensor | None = None

    def run(self, target: str, argv: list[str], timeout: float = 120.0) -> list[int]:
        """Run the script on every rank; return the exit statuses."""
        outputs = self._pool.run("export_ranks:run_with_logits", argv, self._when, timeout=timeout)
        if outputs[-1][1] is not None:
            self.logits = torch.tensor(outputs[-1][1])
        return [status for status, _ in outputs]
