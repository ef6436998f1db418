"""Any torch model: a Hugging Face GPT-2 trains through `ds_efficient.initialize`, and resumes exactly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool

pytest.importorskip("transformers", reason="needs the extra ds_efficient[hf]")

SCRIPT = Path(__file__).resolve().parents[2] / "launch/train_hf_gpt2.py"
TINY = "--num-layers 2 --hidden-size 64 --seq-length 64 --log-interval 1 --lr 3e-3".split()
ZERO_2 = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 1.0,
}
STEPS, BREAK = 30, 20
FALL = 1.5  # nats; from about ln 256 = 5.5, and English letter frequencies alone give about 3.2


def arguments(folder: Path, config: Any, *others: str) -> list[str]:
    """Write the config and return the command line."""
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return ["--deepspeed_config", str(path), *TINY, *others]


def losses(output: str) -> dict[int, float]:
    """Return the training loss of each step."""
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss (\S+)$", output, re.M)}


def validation(output: str) -> list[float]:
    """Return the validation losses: before and after."""
    return [float(loss) for loss in re.findall(r"^step \d+ validation loss (\S+)$", output, re.M)]


@pytest.mark.distributed
def test_two_ranks_under_zero_2_learn_and_resume_exactly(
    ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    save = ["--save", str(tmp_path / "run"), "--save-interval", str(BREAK)]
    unbroken = arguments(tmp_path, ZERO_2, "--train-iters", str(STEPS), *save)
    (status, output), (other_status, nothing) = ranks(2).run("hf_ranks:train", unbroken)
    assert (status, other_status, nothing) == (0, 0, "")
    whole = losses(output)
    assert list(whole) == list(range(1, STEPS + 1))
    before, after = validation(output)
    assert after < before - FALL
    assert whole[STEPS] < whole[1] - FALL

    (tmp_path / "run/latest").write_text(f"global_step{BREAK}")
    resumed = arguments(tmp_path, ZERO_2, "--train-iters", str(STEPS), "--load", str(tmp_path / "run"))
    (status, output), _ = ranks(2).run("hf_ranks:train", resumed)
    assert status == 0
    assert losses(output) == {step: loss for step, loss in whole.items() if step > BREAK}
    assert validation(output)[1] == after


@pytest.mark.slow
def test_one_process_without_launcher_follows_two_ranks(
    ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    config = {**ZERO_2, "gradient_accumulation_steps": 4}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments(tmp_path, config, "--train-iters", "3")],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (_, output), _ = ranks(2).run("hf_ranks:train", arguments(tmp_path, ZERO_2, "--train-iters", "3"))
    assert len(losses(output)) == 3
    # The same 16 samples a step, summed in another order.
    assert losses(done.stdout) == pytest.approx(losses(output), abs=2e-5)


def test_users_mistakes_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_hf_gpt2

    short = tmp_path / "short.txt"
    short.write_text("too short")
    monkeypatch.setenv("RANK", "0")
    cases = (
        (
            ["--data", f"{tmp_path}/no"],
            ZERO_2,
            f"--data {tmp_path}/no: cannot be read (No such file or directory)",
        ),
        (["--data", str(short)], ZERO_2, "--data: 9 bytes, but --seq-length 64 needs at least 1280"),
        ([], {**ZERO_2, "slope": {"patern": "2:4"}}, "slope.patern"),
    )
    for others, content, message in cases:
        monkeypatch.setattr(sys, "argv", ["", *arguments(tmp_path, content, *others)])
        assert train_hf_gpt2.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("train_hf_gpt2.py: ") and message in error
