"""What the ranks of ``integration/test_engine.py`` run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import ds_efficient
from ds_efficient.registry import TECHNIQUES, TechniqueRow

SIXTH = TechniqueRow(
    "sixth", ("sixth",), "sixth.config:SixthConfig", "sixth.technique:SixthTechnique", "for tests"
)


class Net(torch.nn.Module):
    """Two linear layers with the mean square as loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(4, 8)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.fc(x))).square().mean()


def settings(stage: int = 0, *, sixth: dict[str, Any] | None = None, **sections: Any) -> Any:
    """Return a loaded configuration that knows the sixth technique."""
    raw = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        **({} if sixth is None else {"sixth": {"enabled": True, **sixth}}),
        **sections,
    }
    return ds_efficient.load_config(raw, rows=(*TECHNIQUES, SIXTH))


def build(config: Any, **arguments: Any) -> Any:
    """Return an engine around a `Net`."""
    return ds_efficient.initialize(model=Net(), config=config, **arguments)[0]


def step(engine: Any, number: int) -> float:
    """Run one optimizer step on data that depends on `number` only; return the loss."""
    data = torch.randn(4, 4, generator=torch.Generator().manual_seed(number))
    loss = engine(data)
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def train(stage: int, sixth: dict[str, Any] | None, steps: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Train; return losses, norms, and what the techniques did."""
    engine = build(settings(stage, sixth=sixth, **sections))
    losses = [step(engine, number) for number in range(steps)]
    attachment = engine.ds_efficient
    return {
        "losses": losses,
        "norm": float(engine.get_global_grad_norm()),
        "calls": [list(technique.calls) for technique in attachment.techniques],
        "metrics": dict(attachment.metrics),
        "evidence": {name: proof.summary for name, proof in attachment.evidence().items()},
        "actions": {name: [a.action for a in found] for name, found in attachment.actions.items()},
        "context": vars(attachment.context),
    }


def refuse(stage: int, sixth: dict[str, Any], steps: int, sections: dict[str, Any]) -> str:
    """Train into an InactiveTechnique; return its message."""
    try:
        train(stage, sixth, steps, sections)
    except ds_efficient.InactiveTechnique as error:
        return str(error)
    return ""


def save(folder: str, stage: int) -> dict[str, Any]:
    """Train three steps, save, and return the state then and the losses of two more steps."""
    engine = build(settings(stage, sixth={}))
    for number in range(3):
        step(engine, number)
    engine.save_checkpoint(folder)
    technique = engine.ds_efficient.techniques[0]
    state = {"passes": technique.passes, "noise": technique.noise.tolist()}
    return {"state": state, "losses": [step(engine, number) for number in (3, 4)]}


def load(folder: str, stage: int) -> dict[str, Any]:
    """Load what `save` saved; return the state and the losses of two more steps, or the refusal."""
    engine = build(settings(stage, sixth={}))
    try:
        engine.load_checkpoint(folder)
    except ds_efficient.CheckpointError as error:
        return {"error": str(error)}
    technique = engine.ds_efficient.techniques[0]
    state = {"passes": technique.passes, "noise": technique.noise.tolist()}
    return {"state": state, "losses": [step(engine, number) for number in (3, 4)]}


def load_without_the_technique(folder: str) -> str:
    """Load a checkpoint of a run without the technique into a run with it; return the refusal."""
    plain = build(settings(0))
    step(plain, 0)
    plain.save_checkpoint(folder)
    return str(load(folder, 0).get("error"))


def norms(stage: int) -> tuple[float, float]:
    """Return the engine's gradient norm of one step and the one computed here from the averaged gradients."""
    engine = build(settings(stage, gradient_clipping=1e-3))
    reference = Net()
    data = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    reference(data).backward()
    own = torch.cat([p.grad.flatten() for p in reference.parameters()]).double().norm()  # type: ignore[union-attr]
    step(engine, 0)
    return float(engine.get_global_grad_norm()), float(own)


def stale_parameters() -> str:
    """Give parameters that are not the model's; return the refusal."""
    try:
        build(settings(0), model_parameters=list(Net().parameters()))
    except ds_efficient.UserError as error:
        return str(error)
    return ""


def monitor_file(folder: str) -> list[str]:
    """Train with DeepSpeed's CSV monitor; return the names of the files it wrote."""
    monitor = {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"}}
    train(0, {}, 3, monitor)
    return sorted(path.name for path in Path(folder).rglob("*.csv"))
