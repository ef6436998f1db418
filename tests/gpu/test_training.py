"""Training on GPUs: one GPU learns what the CPU learns, two GPUs over NCCL what one learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool
from tiny_runs import Outcome, deepspeed_json, train

pytestmark = pytest.mark.gpu

Ranks = Callable[[int], RankPool]
LLAMA = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --group-query-attention "
    "--num-query-groups 2 --untie-embeddings-and-output-weights --disable-bias-linear --qk-layernorm"
)
TENSOR = "--tensor-model-parallel-size 2"
SEQUENCE = f"{TENSOR} --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def one_gpu(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """Return the fp32 run on one GPU for a choice of model arguments; each runs once."""
    known: dict[str, Outcome] = {}

    def reference(model: str) -> Outcome:
        if model not in known:
            known[model] = train(ranks, 1, tmp_path_factory.mktemp("one"), model, config(0), timeout=240.0)
        return known[model]

    return reference


def config(stage: int, **more: object) -> dict[str, object]:
    return deepspeed_json(zero_optimization={"stage": stage}, gradient_clipping=0.5, **more)


@needs_gpu
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_gpu_with_every_zero_stage(
    ranks: Ranks, tmp_path: Path, one_gpu: Callable[[str], Outcome], stage: int
) -> None:
    run = train(ranks, 1, tmp_path, LLAMA, config(stage), timeout=240.0)
    assert run.status == [0]
    assert run.losses == pytest.approx(one_gpu(LLAMA).losses, rel=1e-4)
    assert run.norms == pytest.approx(one_gpu(LLAMA).norms, rel=1e-4)


@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_follow_fp32(
    ranks: Ranks, tmp_path: Path, one_gpu: Callable[[str], Outcome], precision: str
) -> None:
    scale = {"initial_scale_power": 10} if precision == "fp16" else {}
    run = train(
        ranks, 1, tmp_path, LLAMA, config(1, **{precision: {"enabled": True, **scale}}), timeout=240.0
    )
    assert run.losses == pytest.approx(one_gpu(LLAMA).losses, rel=1e-2)
    assert run.norms == pytest.approx(one_gpu(LLAMA).norms, rel=5e-2)


@needs_gpu
def test_recomputation_draws_the_same_dropout(ranks: Ranks, tmp_path: Path) -> None:
    dropout = "--attention-dropout 0.1 --hidden-dropout 0.1"
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    kept = train(ranks, 1, tmp_path / "kept", dropout, config(1), timeout=240.0)
    again = train(ranks, 1, tmp_path / "again", f"{dropout} {recompute}", config(1), timeout=240.0)
    assert again.losses == pytest.approx(kept.losses, rel=1e-5)


@needs_gpu
def test_resume_goes_on_where_the_run_stopped(ranks: Ranks, tmp_path: Path) -> None:
    arguments = "--attention-dropout 0.1 --hidden-dropout 0.1"
    whole = train(ranks, 1, tmp_path / "whole", arguments, config(1), steps=6, timeout=240.0)
    saving = f"{arguments} --save {tmp_path}/ck --load {tmp_path}/ck"
    first = train(
        ranks, 1, tmp_path / "half", f"{saving} --exit-interval 3", config(1), steps=6, timeout=240.0
    )
    second = train(ranks, 1, tmp_path / "half", saving, config(1), steps=6, timeout=240.0)
    assert first.status == second.status == [0]
    assert second.losses == pytest.approx(whole.losses, rel=1e-6)


@needs_two
@pytest.mark.parametrize(
    ("cut", "model", "stage"),
    [
        ("", LLAMA, 1),
        ("", LLAMA, 2),
        ("", "", 3),
        (TENSOR, LLAMA, 1),
        (SEQUENCE, LLAMA, 1),
        (SEQUENCE, "", 3),
        (PIPELINE, "", 1),
        (PIPELINE, LLAMA, 0),
    ],
    ids=["dp-z1", "dp-z2", "dp-z3", "tp-z1", "sp-z1", "sp-z3", "pp-tied-z1", "pp-z0"],
)
def test_two_gpus_learn_what_one_learns(
    ranks: Ranks, tmp_path: Path, one_gpu: Callable[[str], Outcome], cut: str, model: str, stage: int
) -> None:
    run = train(ranks, 2, tmp_path, f"{model} {cut}", config(stage), timeout=240.0)
    assert run.status == [0, 0]
    assert run.losses == pytest.approx(one_gpu(model).losses, rel=1e-4)
    assert run.norms == pytest.approx(one_gpu(model).norms, rel=1e-4)


@needs_two
@pytest.mark.parametrize("cut", ["", SEQUENCE, PIPELINE], ids=["dp", "sp", "pp"])
def test_two_gpus_in_bf16(ranks: Ranks, tmp_path: Path, one_gpu: Callable[[str], Outcome], cut: str) -> None:
    run = train(ranks, 2, tmp_path, f"{LLAMA} {cut}", config(1, bf16={"enabled": True}), timeout=240.0)
    assert run.losses == pytest.approx(one_gpu(LLAMA).losses, rel=1e-2)
