"""``--pretrained-checkpoint``: the weights of a trained dense model, before any technique changes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_ranks import TOKENS, LogitsPool
from rank_pool import RankPool
from tiny_runs import Outcome, deepspeed_json, train

from ds_efficient.export import export_hf

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
LLAMA = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--group-query-attention --num-query-groups 2 "
)
TENSOR = "--tensor-model-parallel-size 2 "
PIPELINE = "--pipeline-model-parallel-size 2 "
SLOPE = {"enabled": True, "mask": "magnitude", "adapter": {"rank": 0}}


@pytest.fixture(scope="module")
def dense(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Return the checkpoints of a dense run on two tensor-parallel ranks, and its logits."""
    folder = tmp_path_factory.mktemp("dense")
    pool = LogitsPool(ranks(2))
    arguments = f"{LLAMA}{TENSOR}--lr-decay-style constant --save {folder / 'save'}"
    config = deepspeed_json(zero_optimization={"stage": 1})
    outcome = train(lambda size: pool, 2, folder, arguments, config)  # type: ignore[arg-type, return-value]
    assert outcome.status == [0, 0]
    assert pool.logits is not None
    return folder / "save", pool.logits


def start(
    ranks: Ranks, folder: Path, size: int, arguments: str, config: dict[str, Any]
) -> tuple[Outcome, torch.Tensor]:
    """Run two steps; return the run and the logits before the first step."""
    pool = LogitsPool(ranks(size), "start")
    outcome = train(lambda size: pool, size, folder, LLAMA + arguments, config, steps=2)  # type: ignore[arg-type, return-value]
    assert outcome.status == [0] * size
    assert pool.logits is not None
    return outcome, pool.logits


def pruned_by_magnitude(model: Any) -> None:
    """Keep the two largest magnitudes of every four inputs of the decoder's linear layers."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            groups = module.weight.data.view(module.out_features, -1, 4)
            smallest = groups.abs().topk(2, dim=-1, largest=False).indices
            groups.scatter_(-1, smallest, 0.0)


@pytest.mark.parametrize(("size", "layout", "stage"), [(1, "", 0), (2, PIPELINE, 1), (2, "", 3)])
def test_a_dense_run_on_any_layout_starts_with_the_trained_model_at_step_0(
    ranks: Ranks, tmp_path: Path, dense: tuple[Path, torch.Tensor], size: int, layout: str, stage: int
) -> None:
    save, expected = dense
    config = deepspeed_json(zero_optimization={"stage": stage})
    run, logits = start(ranks, tmp_path, size, f"{layout}--pretrained-checkpoint {save}", config)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert run.of("train", "step") == [1, 2]


def test_magnitude_masks_prune_the_trained_weights_whatever_the_layout(
    ranks: Ranks, tmp_path: Path, dense: tuple[Path, torch.Tensor]
) -> None:
    save, unpruned = dense
    export_hf(save, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    pruned_by_magnitude(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert not torch.allclose(expected, unpruned, rtol=1e-2, atol=1e-2)
    losses = []
    for number, (size, layout) in enumerate([(1, ""), (2, TENSOR)]):
        arguments = f"{layout}--pretrained-checkpoint {save / 'global_step4'}"
        run, logits = start(ranks, tmp_path / str(number), size, arguments, deepspeed_json(slope=SLOPE))
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
        losses.append(run.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_checkpoint_in_load_wins(ranks: Ranks, tmp_path: Path, dense: tuple[Path, torch.Tensor]) -> None:
    save = dense[0]
    both = f"{LLAMA}--pretrained-checkpoint {save} --save {tmp_path} --load {tmp_path}".split()
    log = _Logging(ranks(1))
    for steps in (1, 2):
        outcome = train(lambda size: log, 1, tmp_path, " ".join(both), steps=steps)  # type: ignore[arg-type, return-value]
        assert outcome.status == [0]
        resumed = f"--pretrained-checkpoint has no effect: the run resumes from {tmp_path}/global_step1"
        assert (resumed in log.text) == (steps == 2)
        assert (f"weights from {save}/global_step4" in log.text) == (steps == 1)
    assert outcome.of("train", "step") == [1, 2]


class _Logging:
    """Like RankPool; keeps what the ranks wrote to stdout."""

    def __init__(self, pool: RankPool) -> None:
        self._pool = pool
        self.text = ""

    def run(self, target: str, argv: list[str], timeout: float = 120.0) -> list[int]:
        outputs = self._pool.run("broken_saves:run_with_log", argv, timeout=timeout)
        self.text = "".join(text for _, text in outputs)
        return [status for status, _ in outputs]


class _Failing(_Logging):
    """Like RankPool; keeps what the ranks wrote to stderr."""

    def run(self, target: str, argv: list[str], timeout: float = 120.0) -> list[int]:
        outputs = self._pool.run("rank_pool:run_script_with_output", argv, timeout=timeout)
        self.text = "".join(text for _, text in outputs)
        return [status for status, _ in outputs]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--num-query-groups 4", ["saved with --num-query-groups 2, this run has 4"]),
        ("--vocab-size 300", ["saved with padded vocabulary size 128, this run has 384"]),
        ("--pretrained-checkpoint nowhere", ["nowhere: no such folder"]),
        ("--pretrained-checkpoint {save}/..", ["holds no checkpoint"]),
    ],
)
def test_what_does_not_fit_is_named(
    ranks: Ranks, tmp_path: Path, dense: tuple[Path, torch.Tensor], change: str, named: list[str]
) -> None:
    save = dense[0]
    arguments = f"{LLAMA}--pretrained-checkpoint {save} {change.format(save=save)}"
    failing = _Failing(ranks(1))
    assert train(lambda size: failing, 1, tmp_path, arguments).status == [2]  # type: ignore[arg-type, return-value]
    assert "Traceback" not in failing.text
    assert [text for text in named if text not in failing.text] == []


def test_a_sparse_checkpoint_is_no_pretrained_model(ranks: Ranks, tmp_path: Path) -> None:
    save = tmp_path / "save"
    sparse = deepspeed_json(slope=SLOPE)
    assert train(ranks, 1, tmp_path / "a", f"{LLAMA}--save {save}", sparse, steps=1).status == [0]
    failing = _Failing(ranks(1))
    arguments = f"{LLAMA}--pretrained-checkpoint {save}"
    assert train(lambda size: failing, 1, tmp_path / "b", arguments).status == [2]  # type: ignore[arg-type, return-value]
    assert "its layers are sparse already; go on with it through --load" in failing.text
