"""What the ranks of ``integration/test_slope_engine.py`` run: a small network with SLoPe."""

from __future__ import annotations

import hashlib
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from engine_steps import parameter_dtype, step_over

import ds_efficient
from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.slope.linear import SlopeLinear

LR, DECAY, CLIP = 1e-2, 0.1, 0.05
INTERVAL, START, STEPS, MICRO_BATCHES, BATCH = 2, 3, 6, 2, 8
LAYERS = ("fc1", "fc2")


class Net(torch.nn.Module):
    """Two layers that become sparse and a dense one; the mean square distance to a target is the loss."""

    def __init__(self, *, idle: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc1 = torch.nn.Linear(16, 32)
            self.fc2 = torch.nn.Linear(32, 16)
            self.head = torch.nn.Linear(16, 4)
        self.idle = idle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x if self.idle else self.fc2(torch.tanh(self.fc1(x)))
        y = self.head(torch.tanh(hidden))
        return (y - x[..., :4].sin()).float().square().mean()


def settings(stage: int, precision: str = "fp32", seed: int = 5, **sections: Any) -> dict[str, Any]:
    """Return a DeepSpeed configuration with SLoPe."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    precisions = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
    slope = {
        "enabled": True,
        "modules": list(LAYERS),
        "column_mask_interval": INTERVAL,
        "adapter": {"rank": 2, "start_step": START},
    }
    return {
        "train_micro_batch_size_per_gpu": BATCH // world,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "steps_per_print": 10**9,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "weight_decay": DECAY, "torch_adam": True},
        },
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": CLIP,
        "ds_efficient": {"seed": seed, "evidence_steps": 2},
        **precisions[precision],
        **sections,
        "slope": {**slope, **sections.get("slope", {})},
    }


def build(stage: int, precision: str = "fp32", *, idle: bool = False, **more: Any) -> Any:
    """Return an engine around a `Net`; `more` are sections and arguments of `initialize`."""
    arguments = {name: more.pop(name) for name in ("optimizer", "model_parameters") if name in more}
    config = settings(stage, precision, **more)
    if "optimizer" in arguments:
        config.pop("optimizer")
    return ds_efficient.initialize(model=Net(idle=idle), config=config, **arguments)[0]


def batch(number: int, micro: int) -> torch.Tensor:
    """Return the data of all ranks for one micro-batch."""
    return torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(100 * number + micro))


def step(engine: Any, number: int) -> float:
    """Run one optimizer step on this rank's rows; return the loss of all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dtype = parameter_dtype(engine)
    own = (batch(number, micro).chunk(world)[rank].to(dtype) for micro in range(MICRO_BATCHES))
    return step_over(engine, own)


def snapshot(engine: Any) -> dict[str, np.ndarray]:
    """Return every parameter and buffer, whole, as fp32 or uint8 arrays."""
    with compat.whole(engine.module.parameters()):
        return {
            name: (value.float() if value.is_floating_point() else value).detach().clone().numpy()
            for name, value in engine.module.state_dict().items()
        }


def digest(engine: Any) -> str:
    """Return a hash of all parameters and buffers."""
    hashed = hashlib.sha256()
    for name, value in sorted(snapshot(engine).items()):
        hashed.update(name.encode() + value.tobytes())
    return hashed.hexdigest()


def start_of(engine: Any) -> dict[str, np.ndarray]:
    """Return the initial weights: dense W^R and bool masks of the sparse layers, and all others."""
    found = snapshot(engine)
    with compat.whole(engine.module.parameters()):
        for name in LAYERS:
            layer: SlopeLinear = getattr(engine.module, name)
            found[f"{name}.dense"] = layer.dense_weight().float().numpy()
            found[f"{name}.kept"] = layer.forward_mask().numpy()
    return found


def train(stage: int, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    """Train `STEPS` steps; return losses, all weights after each step, and what the technique says."""
    counted: list[int] = []
    restart = compat.restart_adam

    def counting(*arguments: Any) -> int:
        counted.append(restart(*arguments))
        return counted[-1]

    with mock.patch.object(compat, "restart_adam", counting):
        engine = build(stage, precision, **more)
        start, losses, weights = start_of(engine), [], []
        for number in range(STEPS):
            losses.append(step(engine, number))
            weights.append(snapshot(engine))
    attachment = engine.ds_efficient
    groups = [(group.get("name"), group["weight_decay"]) for group in engine.optimizer.param_groups]
    return {
        "start": start,
        "losses": losses,
        "weights": weights,
        "restarted": counted,
        "groups": groups,
        "metrics": dict(attachment.metrics["slope"]),
        "counts": dict(attachment.evidence()["slope"].counts),
    }


def train_all(cases: list[tuple[int, str]]) -> dict[tuple[int, str], dict[str, Any]]:
    """Train one engine after the other."""
    return {(stage, precision): train(stage, precision) for stage, precision in cases}


def own_optimizer(stage: int) -> list[float]:
    """Train with an optimizer that the caller makes."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY)

    return train(stage, optimizer=make)["losses"]


def generator_groups(stage: int) -> list[float]:
    """Train with a parameter group whose parameters come from a generator."""
    return train(stage, model_parameters=lambda model: [{"params": model.parameters()}])["losses"]


def idle() -> str:
    """Train a network that never calls its sparse layers; return the refusal."""
    engine = build(1, idle=True)
    try:
        for number in range(4):
            step(engine, number)
    except ds_efficient.InactiveTechnique as error:
        return f"{engine.global_steps}: {error}"
    return ""


def save(folder: str, stage: int, precision: str = "fp32") -> dict[str, Any]:
    """Train all steps, saving before, at and after the adapters' start."""
    engine = build(stage, precision)
    losses = []
    for number in range(STEPS):
        losses.append(step(engine, number))
        if engine.global_steps in (START - 1, START, START + 1):
            engine.save_checkpoint(folder)
    return {"losses": losses, "digest": digest(engine)}


def resume(folder: str, stage: int, first: int, precision: str = "fp32") -> dict[str, Any]:
    """Go on from step `first` with an engine whose own seed gives other masks."""
    engine = build(stage, precision, seed=99)
    before = digest(engine)
    engine.load_checkpoint(folder, tag=f"global_step{first}")
    losses = [step(engine, number) for number in range(first, STEPS)]
    return {"losses": losses, "digest": digest(engine), "changed": before != digest(engine)}


def save_and_resume(folder: str, stage: int, precision: str = "fp32") -> dict[str, Any]:
    """Return the unbroken run and those resumed from each of its checkpoints, by their step."""
    unbroken = save(folder, stage, precision)
    steps = (START - 1, START, START + 1)
    return {"unbroken": unbroken, **{str(n): resume(folder, stage, n, precision) for n in steps}}


def loaded_weights_with(folder: str, stage: int, first: int, how: dict[str, bool]) -> dict[str, Any]:
    """Load weights without the optimizer; return the loss that they give and what the technique believes."""
    engine = build(stage, seed=99)
    engine.load_checkpoint(folder, tag=f"global_step{first}", **how)
    with torch.no_grad():
        loss = float(engine(batch(first, 0)))
    technique = engine.ds_efficient.techniques[0]
    flags = [product.adapter_active for _, _, product in technique.layers]
    after = step(engine, first)
    metrics = engine.ds_efficient.metrics["slope"]
    return {"loss": loss, "active": [technique.adapters_active, *flags], "after": after, "metrics": metrics}


def loss_at(folder: str, stage: int, first: int) -> float:
    """Return the loss of a checkpoint that is loaded whole."""
    engine = build(stage)
    engine.load_checkpoint(folder, tag=f"global_step{first}")
    with torch.no_grad():
        return float(engine(batch(first, 0)))


def overflow(stage: int) -> dict[str, Any]:
    """Train in fp16 from a loss scale that overflows at first, past the adapters' start."""
    scale = {"enabled": True, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 1000}
    # DeepSpeed refuses fp16 on a CPU, where it is slow but right.
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
        engine = build(stage, fp16=scale)
    found: dict[str, Any] = {"weights": [snapshot(engine)], "applied": [], "losses": []}
    for number in range(2 * STEPS):
        found["losses"].append(step(engine, number))
        found["applied"].append(bool(engine.was_step_applied()))
        found["weights"].append(snapshot(engine))
    return {**found, "metrics": dict(engine.ds_efficient.metrics["slope"])}


def refusals(folder: str) -> list[str]:
    """Return what loading says of a sparse state with SLoPe off or another pattern, and of a dense one."""
    build(1).save_checkpoint(folder, tag="sparse")
    dense = build(1, slope={"enabled": False})
    dense.save_checkpoint(folder, tag="dense")
    found = []
    for engine, tag in (
        (dense, "sparse"),
        (build(1, slope={"pattern": "1:4"}), "sparse"),
        (build(1), "dense"),
    ):
        try:
            engine.load_checkpoint(folder, tag=tag)
        except ds_efficient.CheckpointError as error:
            found.append(str(error))
    return found
