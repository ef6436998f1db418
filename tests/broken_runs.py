"""Deliberately broken runs: they prove that the equivalence tests can fail."""

from __future__ import annotations

from typing import Any
from unittest import mock

from rank_pool import run_script


def without_partial_sums(argv: list[str]) -> int:
    """Train with the gradients of replicated parameters left partial."""
    with mock.patch("megatron_patches.partial_gradients.sum_partial_gradients", lambda model, group: []):
        return run_script(argv)


def with_tied_copy_counted(argv: list[str]) -> int:
    """Train with the last stage's copy of the embedding counted in the norm."""
    from pretraining import model

    build = model.build_model

    def build_without_mark(*args: Any) -> Any:
        built = build(*args)
        for parameter in built.parameters():
            if hasattr(parameter, "ds_pipe_replicated"):
                del parameter.ds_pipe_replicated
        return built

    with mock.patch.object(model, "build_model", build_without_mark):
        return run_script(argv)
