"""random-LTD in training runs: every layout is the one-rank run, recomputation, resuming, budgets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool
from tiny_runs import Outcome, deepspeed_json, train

pytestmark = pytest.mark.distributed

Ranks = Callable[[int], RankPool]
GPT2 = ""
LLAMA = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --group-query-attention "
    "--num-query-groups 2 --untie-embeddings-and-output-weights --disable-bias-linear --reset-attention-mask"
)
TENSOR = "--tensor-model-parallel-size 2"
SEQUENCE = f"{TENSOR} --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1"
STEPS, LAYERS, LENGTH, BATCH = 5, 4, 16, 8
KEPT = [4, 6, 8, 10, 12]  # min_value 4, by 2 each step, 16 at step 6


def config(stage: int = 0, **ltd: Any) -> dict[str, Any]:
    schedule = {"min_value": 4, "schedule_config": {"require_steps": 6, "seq_per_step": 2}}
    section = {"enabled": True, "random_ltd_schedule": schedule, **ltd}
    return deepspeed_json(
        zero_optimization={"stage": stage},
        gradient_clipping=0.5,
        data_efficiency={"enabled": True, "data_routing": {"enabled": True, "random_ltd": section}},
    )


References = Callable[[int, str], Outcome]


@pytest.fixture(scope="module")
def reference(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> References:
    """Return the plain run of some arguments on so many ranks; each runs once."""
    known: dict[tuple[int, str], Outcome] = {}

    def run(size: int, arguments: str) -> Outcome:
        if (size, arguments) not in known:
            folder = tmp_path_factory.mktemp("reference")
            known[size, arguments] = train(ranks, size, folder, arguments, config(), steps=STEPS)
        return known[size, arguments]

    return run


LAYOUTS = {
    "tensor parallel": (LLAMA, 2, TENSOR, 1, (1, "")),
    "recomputed pipeline": (LLAMA, 2, f"{PIPELINE} {RECOMPUTE} 1", 0, (1, "")),
    "recomputed in pairs, ZeRO 3": (LLAMA, 1, f"{RECOMPUTE} 2", 3, (1, "")),
    "data parallel, ZeRO 3": (GPT2, 2, f"{RECOMPUTE} 1", 3, (2, "")),
    "sequence parallel, recomputed in pairs": (GPT2, 2, f"{SEQUENCE} {RECOMPUTE} 2", 2, (2, SEQUENCE)),
}


@pytest.mark.parametrize(("model", "size", "layout", "stage", "compared"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_follows_the_plain_run_of_the_same_data_ranks(
    ranks: Ranks,
    tmp_path: Path,
    reference: References,
    model: str,
    size: int,
    layout: str,
    stage: int,
    compared: tuple[int, str],
) -> None:
    """Data-parallel ranks and parts of a sequence choose their own tokens; nothing else changes a choice."""
    run = train(ranks, size, tmp_path, f"{model} {layout}", config(stage), steps=STEPS)
    expected = reference(compared[0], f"{model} {compared[1]}")
    assert run.status == [0] * size
    assert run.losses == pytest.approx(expected.losses, rel=1e-4)
    assert run.norms == pytest.approx(expected.norms, rel=1e-4)
    assert run.of("train", "layer_tokens") == expected.of("train", "layer_tokens")


def test_the_log_counts_layer_tokens_and_their_speed(reference: References) -> None:
    run = reference(1, f"{LLAMA} ")
    consumed = 0
    for step, kept in enumerate(KEPT):
        consumed += BATCH * (2 * kept + 2 * LENGTH)
        assert run.of("train", "tokens")[step] == BATCH * LENGTH * (step + 1)
        assert run.of("train", "layer_tokens")[step] == consumed
        share = (2 * kept + 2 * LENGTH) / LENGTH
        speeds = (run.of("train", name)[step] for name in ("layer_tokens_per_second", "tokens_per_second"))
        assert next(speeds) == pytest.approx(share * next(speeds))
    executed = run.of("train", "executed_tflops")
    model = run.of("train", "model_tflops")
    shares = [one / other for one, other in zip(executed, model, strict=True)]
    assert shares == sorted(shares) and len(set(shares)) == STEPS
    evidence = next(record for record in run.records if record["kind"] == "evidence")["random_ltd"]
    assert evidence["acted"] and evidence["dropped_by_layer_1"] == BATCH * sum(LENGTH - kept for kept in KEPT)


def test_full_recomputation_with_dropout_is_bit_for_bit_the_run_without(ranks: Ranks, tmp_path: Path) -> None:
    plain, again = (
        train(ranks, 1, tmp_path / str(number), f"{LLAMA} {DROPOUT} {more}", config(), steps=STEPS)
        for number, more in enumerate(("", f"{RECOMPUTE} 2"))
    )
    assert plain.losses == again.losses and plain.norms == again.norms


def test_a_run_resumes_exactly_and_stops_at_its_budget(ranks: Ranks, tmp_path: Path) -> None:
    """In the middle of the schedule, with the LayerToken learning rate, on pipeline stages."""
    consumed = [sum(BATCH * (2 * kept + 2 * LENGTH) for kept in KEPT[: end + 1]) for end in range(STEPS)]
    lr = {"enabled": True, "warmup_layer_tokens": 500, "decay_layer_tokens": 2000, "min_lr": 1e-4}
    ltd = {"layer_token_lr_schedule": lr, "layer_token_budget": consumed[3]}
    whole = train(ranks, 2, tmp_path / "whole", PIPELINE, config(1, **ltd), steps=STEPS)
    end = next(record for record in whole.records if record["kind"] == "end")
    assert end["step"] == 4 and "layer_token_budget" in end["reason"]
    rates = whole.of("train", "lr")
    assert rates[:2] == pytest.approx([0.0, 5e-3 * consumed[0] / 500]) and rates[3] < rates[2]
    save = f"{PIPELINE} --save {tmp_path / 'checkpoints'} --load {tmp_path / 'checkpoints'}"
    first = train(ranks, 2, tmp_path / "parts", f"{save} --exit-interval 2", config(1, **ltd), steps=STEPS)
    assert len(first.losses) == 2
    parts = train(ranks, 2, tmp_path / "parts", save, config(1, **ltd), steps=STEPS)
    assert parts.losses == whole.losses and parts.norms == whole.norms
    assert parts.of("train", "lr") == rates
    assert parts.of("train", "layer_tokens") == consumed[:4]


def test_keeping_all_tokens_is_bit_for_bit_the_run_without(ranks: Ranks, tmp_path: Path) -> None:
    keep = {"random_ltd_schedule": {"min_value": LENGTH, "schedule_config": {"require_steps": 6}}}
    run = train(ranks, 1, tmp_path / "keep", LLAMA, config(**keep), steps=3)
    plain = train(ranks, 1, tmp_path / "plain", LLAMA, deepspeed_json(gradient_clipping=0.5), steps=3)
    assert run.losses == plain.losses and run.norms == plain.norms


def test_evaluation_sees_every_token(ranks: Ranks, tmp_path: Path) -> None:
    """The first evaluation, before any step, is that of a run without random-LTD."""
    data = "--eval-iters 2 --eval-interval 2"
    found = []
    for name, chosen in (("ltd", config()), ("plain", deepspeed_json(gradient_clipping=0.5))):
        run = train(ranks, 1, tmp_path / name, data, chosen, steps=2)
        found.append((run.of("eval", "loss")[0], run.losses[0]))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]
