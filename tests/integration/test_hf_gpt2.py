"""Any torch model: a Hugging Face GPT-2 trains through `ds_efficient.initialize`, and resumes exactly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import free_port

pytest.importorskip("transformers", reason="needs the extra ds_efficient[hf]")

SCRIPT = Path(__file__).resolve().parents[2] / "launch/train_hf_gpt2.py"
TINY = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --log-interval 1 --lr 3e-3".split()
ZERO_2 = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 1.0,
}
STEPS, BREAK = 30, 20
FALL = 1.5  # nats; from about ln 256 = 5.5, and English letter frequencies alone give about 3.2


def train(folder: Path, ranks: int, *arguments: str, config: Any = ZERO_2, expect: int = 0) -> str:
    """Run the script, under DeepSpeed's launcher where there are several ranks; return its output."""
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    start = [sys.executable]
    if ranks > 1:
        launcher = f"-m deepspeed.launcher.runner --num_gpus {ranks} --master_port {free_port()}"
        start += launcher.split()
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*start, str(SCRIPT), "--deepspeed_config", str(path), *TINY, *arguments],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == expect, done.stdout[-3000:]
    return done.stdout


def losses(output: str) -> dict[int, float]:
    """Return the training loss of each step."""
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss (\S+)$", output, re.M)}


def validation(output: str) -> list[float]:
    """Return the validation losses: before and after."""
    return [float(loss) for loss in re.findall(r"^step \d+ validation loss (\S+)$", output, re.M)]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks cannot share one GPU under NCCL")
def test_two_ranks_zero_2_learn_and_resume_exactly(tmp_path: Path) -> None:
    save = str(tmp_path / "run")
    unbroken = train(tmp_path, 2, "--train-iters", str(STEPS), "--save", save, "--save-interval", str(BREAK))
    whole = losses(unbroken)
    assert list(whole) == list(range(1, STEPS + 1))
    before, after = validation(unbroken)
    assert after < before - FALL
    assert whole[STEPS] < whole[1] - FALL

    (tmp_path / "run/latest").write_text(f"global_step{BREAK}")
    resumed = train(tmp_path, 2, "--train-iters", str(STEPS), "--load", save)
    assert losses(resumed) == {step: loss for step, loss in whole.items() if step > BREAK}
    assert validation(resumed)[1] == after


@pytest.mark.slow
def test_one_process_without_launcher_gives_the_same_curve(tmp_path: Path) -> None:
    steps = 4
    alone = train(
        tmp_path, 1, "--train-iters", str(steps), config={**ZERO_2, "gradient_accumulation_steps": 4}
    )
    assert list(losses(alone)) == list(range(1, steps + 1))
    two = train(tmp_path, 2, "--train-iters", str(steps)) if torch.cuda.device_count() != 1 else alone
    # The same 16 samples a step, summed in another order.
    assert losses(alone) == pytest.approx(losses(two), abs=2e-5)


def test_users_mistakes_are_one_message(tmp_path: Path) -> None:
    output = train(tmp_path, 1, "--data", str(tmp_path / "none.txt"), expect=2)
    assert f"--data {tmp_path}/none.txt: cannot be read (No such file or directory)" in output
    (tmp_path / "short.txt").write_text("too short")
    output = train(tmp_path, 1, "--data", str(tmp_path / "short.txt"), expect=2)
    assert "--data: 9 bytes, but --seq-length 64 needs at least 1280" in output
    output = train(tmp_path, 1, config={**ZERO_2, "zero_optimisation": {"stage": 9}}, expect=2)
    assert "zero_optimization" in output
    assert "Traceback" not in output
