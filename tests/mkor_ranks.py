"""What the ranks of the tests of MKOR run: a small network through the engine."""

from __future__ import annotations

import hashlib
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from engine_steps import parameter_dtype, step_over
from rank_pool import run_script
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ds_efficient
from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.mkor import signs

LR, ROWS, STEPS, SEED = 1e-2, 64, 6, 5
WIDTHS = {"fc1": (12, 20), "fc2": (20, 16), "free": (16, 16), "head": (16, 4)}
MKOR = {
    "enabled": True,
    "inversion_interval": 2,
    "warmup_steps": 2,
    "stabilizer": {"threshold": 1.1, "zeta": 0.5},
    "exclude": ["head"],
}


class Conv1D(torch.nn.Module):
    """A linear layer whose weight is stored (in, out), as transformers' class of this name."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.nf = linear.out_features
        self.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Net(torch.nn.Module):
    """Four linear layers, one without bias; the mean square distance to a target is the loss."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name, (inputs, outputs) in WIDTHS.items():
                self.add_module(name, torch.nn.Linear(inputs, outputs, bias=name != "free"))
        if transposed:
            self.fc2 = Conv1D(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.fc2(torch.tanh(self.fc1(x))))
        y = self.head(torch.tanh(self.free(y)))
        return (y - x[..., :4].sin()).float().square().mean()


def settings(stage: int = 0, precision: str = "fp32", micro: int = 2, **sections: Any) -> dict[str, Any]:
    """Return a DeepSpeed configuration with MKOR."""
    precisions = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
    return {
        "gradient_accumulation_steps": micro,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "ds_efficient": {"seed": SEED, "evidence_steps": 2},
        **precisions[precision],
        **sections,
        "mkor": {**MKOR, **sections.get("mkor", {})},
    }


def build(*arguments: Any, transposed: bool = False, **sections: Any) -> Any:
    """Return an engine around a `Net`."""
    return ds_efficient.initialize(model=Net(transposed), config=settings(*arguments, **sections))[0]


def data(number: int) -> Tensor:
    """Return the whole batch of a step, over all ranks and micro-batches."""
    return torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(number)) + 0.3


def step(engine: Any, number: int, micro: int = 2) -> float:
    """Run one optimizer step on this rank's part of the batch; return the loss of all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = data(number).to(parameter_dtype(engine)).chunk(size)[rank]
    return step_over(engine, own.chunk(micro))


def weights(engine: Any) -> dict[str, list[float]]:
    """Return all parameters, flat."""
    with compat.whole(engine.module.parameters()):
        return {name: value.flatten().tolist() for name, value in engine.module.named_parameters()}


def digest(engine: Any) -> str:
    """Return a hash of all parameters."""
    hashed = hashlib.sha256()
    for name, values in sorted(weights(engine).items()):
        hashed.update(f"{name} {values}".encode())
    return hashed.hexdigest()


def train(
    stage: int = 0, precision: str = "fp32", micro: int = 2, steps: int = STEPS, **sections: Any
) -> dict[str, Any]:
    """Train; return losses, weights, and what the technique says."""
    engine = build(stage, precision, micro, **sections)
    losses = [step(engine, number, micro) for number in range(steps)]
    technique = engine.ds_efficient.techniques[-1]
    return {
        "losses": losses,
        "weights": weights(engine),
        "norm": float(engine.get_global_grad_norm()),
        "metrics": dict(engine.ds_efficient.metrics["mkor"]),
        "counts": dict(technique.evidence().counts),
        "summary": technique.evidence().summary,
    }


def train_all(cases: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Train one engine after the other."""
    torch.compiler.set_stance("force_eager")  # DeepSpeed's Muon is compiled otherwise
    return {name: train(*arguments, **sections) for name, (arguments, sections) in cases.items()}


def save_and_resume(folder: str, cases: dict[str, tuple[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return for each case an unbroken run, and those resumed from two of its checkpoints."""

    def finish(engine: Any, where: str, first: int) -> dict[str, Any]:
        losses = []
        for number in range(first, STEPS):
            losses.append(step(engine, number))
            if first == 0 and engine.global_steps in (1, 4):
                engine.save_checkpoint(where)
        return {"losses": losses, "digest": digest(engine)}

    found: dict[str, dict[str, Any]] = {}
    for name, (stage, sections) in cases.items():
        where = f"{folder}/{name}"
        found[name] = {"0": finish(build(stage, **sections), where, 0)}
        for first in (1, 4):
            engine = build(stage, **sections)
            step(engine, 77)  # what the engine did before must not matter
            engine.load_checkpoint(where, tag=f"global_step{first}")
            found[name][str(first)] = finish(engine, where, first)
    return found


def resume_elsewhere(folder: str, first: int) -> list[float]:
    """Go on from a checkpoint of another number of ranks, without ZeRO."""
    engine = build(0)
    engine.load_checkpoint(folder, tag=f"global_step{first}")
    return [step(engine, number) for number in range(first, STEPS)]


def hybrid(folder: str) -> dict[str, Any]:
    """Train with MKOR-H until it switches; go on from a checkpoint of after that, then into one before."""
    sections = {"mkor": {"hybrid": {"enabled": True, "beta": 0.9, "ema": 2, "min_steps": 3}}}
    engine = build(1, **sections)
    at = []
    losses = [step(engine, 0)]
    engine.save_checkpoint(folder, tag="before")
    for number in range(1, 12):
        losses.append(step(engine, number))
        at.append(engine.ds_efficient.metrics["mkor"]["switched_at"])
        if number == 9:
            engine.save_checkpoint(folder, tag="after")
    technique = engine.ds_efficient.techniques[-1]
    again = build(1, **sections)
    again.load_checkpoint(folder, tag="after")
    found = {
        "losses": losses,
        "at": at,
        "shards": list(technique.shard_names()),
        "summary": technique.evidence().summary,
        "resumed": [step(again, number) for number in (10, 11)],
        "resumed at": again.ds_efficient.metrics["mkor"]["switched_at"],
    }
    try:
        again.load_checkpoint(folder, tag="before")
    except ds_efficient.CheckpointError as error:
        found["refused"] = str(error)
    return found


def second_moments(vectors: int, steps: int) -> dict[str, list[list[float]]]:
    """Return by block and side the mean outer product of all vectors of some steps on one batch."""
    optimizer = {"type": "SGD", "params": {"lr": 0.0}}
    engine = build(1, mkor={"statistics_rank": vectors, "inversion_interval": 1}, optimizer=optimizer)
    bank = engine.ds_efficient.techniques[-1].owners.bank
    found: dict[str, Tensor] = {}
    update = bank.update

    def note(given: dict[str, dict[str, list[Tensor]]], good: Tensor | None) -> None:
        for name, pair in given.items():
            for side, pieces in pair.items():
                rows = torch.cat(pieces, -1)
                outer = rows.T @ rows / (vectors * steps)
                found[f"{name} {side}"] = found.get(f"{name} {side}", 0.0) + outer
        update(given, good)

    with mock.patch.object(bank, "update", note):
        for _ in range(steps):
            step(engine, 0)
    return {name: value.tolist() for name, value in found.items()}


class NoWaiting(TorchDispatchMode):
    """Refuses calls that on a GPU make the host wait: for a number, a size, or memory that is copied."""

    REFUSED = ("_local_scalar_dense", "lift_fresh", "nonzero", "equal", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.REFUSED, f"{func} in a step"
        self.calls += 1
        return func(*args, **(kwargs or {}))


def steps_without_waiting(cases: list[dict[str, Any]]) -> list[dict[bool, int]]:
    """Return the calls of MKOR's part of a step, by whether it updates, after the first one."""
    found: list[dict[bool, int]] = []
    for case in cases:
        engine = build(1, mkor={**case, "warmup_steps": 0, "inversion_interval": 2})
        technique, calls = engine.ds_efficient.techniques[-1], {}

        def watched(
            original: Any,
            also: bool,
            technique: Any = technique,
            calls: dict[bool, int] = calls,
            engine: Any = engine,
        ) -> Any:
            def run(context: Any) -> Any:
                updates = technique._updated
                if not engine.global_steps or (updates and not also):
                    return original(context)  # the first step finds out what lies where
                with NoWaiting() as mode, mock.patch.object(Tensor, "tolist", side_effect=AssertionError):
                    result = original(context)
                calls[updates] = calls.get(updates, 0) + mode.calls
                return result

            return run

        # an update's numbers are read once it is done, after the optimizer's step
        technique.before_step = watched(technique.before_step, also=True)
        technique.on_step = watched(technique.on_step, also=False)
        for number in range(3):
            step(engine, number)
        found.append(calls)
    return found


def run_script_with_equal_signs(argv: list[str]) -> int:
    """Train with the sign 1 for every row, so that sums do not depend on how rows are spread over ranks."""

    def ones(key: int, rows: int, vectors: int, **how: Any) -> Tensor:
        return torch.ones(rows, vectors, dtype=how["dtype"], device=how["device"])

    with mock.patch.object(signs, "random_signs", ones):
        return run_script(argv)


def factors(engine: Any) -> dict[str, Any]:
    """Return all that this rank's factors hold, as lists."""
    shards = engine.ds_efficient.techniques[-1].shard_state_dict()
    return {
        f"{name} {side}": value["m"].tolist()
        for name, shard in shards.items()
        for side, value in shard["factors"].items()
    }


def scaled(scale: float) -> dict[str, Any]:
    """Train on a scaled loss, as fp16 does, with a rate that takes it out again."""
    optimizer = {"type": "SGD", "params": {"lr": LR / scale}}
    engine = build(0, "fp32", 1, optimizer=optimizer, gradient_clipping=0.0)
    with mock.patch.object(compat, "loss_scale", lambda _: scale):
        for number in range(3):
            part = data(number).chunk(dist.get_world_size())[dist.get_rank()]
            engine.backward(engine(part) * scale)
            engine.step()
    return {"weights": weights(engine), "factors": factors(engine)}


def poisoned(layer: str, scale: float | None) -> list[str]:
    """Return whose factors a step changed in which rank 1 had an infinite gradient of one layer."""
    engine = build(0)
    step(engine, 0)
    before = factors(engine)
    if dist.get_rank() == 1:
        engine.module.get_submodule(layer).bias.register_hook(lambda gradient: gradient * torch.inf)
    with mock.patch.object(compat, "loss_scale", lambda _: scale):
        step(engine, 1)
    after = factors(engine)
    return sorted(name for name in after if after[name] != before[name])


def idle() -> str:
    """Train layers that no input reaches; return the refusal."""
    engine = build(0, mkor={"exclude": ["fc1", "fc2", "head"]})
    engine.module.free.forward = lambda x: x * 1.0
    try:
        for number in range(3):
            step(engine, number)
    except ds_efficient.InactiveTechnique as error:
        return str(error)
    return ""
