"""The sixth technique, plugged in like the five."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_efficient.core.keys import derive_key
from ds_efficient.core.technique import Action, Evidence, StepContext, Technique
from ds_efficient.ops.keyed_random import uniform
from sixth.config import SixthConfig


class SixthTechnique(Technique[SixthConfig]):
    """Scales outputs, counts forward passes, and keeps a keyed random tensor as state."""

    name = "sixth"
    state_version = 2

    def __init__(self, config: SixthConfig, context: Any) -> None:
        super().__init__(config, context)
        self.calls: list[str] = []
        self.passes = 0
        self.noise = torch.zeros(3)

    def plan(self, inventory: Any) -> Sequence[Action]:
        self.calls.append("plan")
        return [
            Action(module.name, "scale", options={"factor": self.config.factor})
            if module.name.split(".")[-1] in self.config.modules
            else Action(module.name, "skip", "not in modules")
            for module in inventory.linears
        ]

    def apply(self, model: torch.nn.Module, actions: Sequence[Action]) -> None:
        self.calls.append("apply")
        for action in actions:
            if not action.skipped:
                model.get_submodule(action.module).register_forward_hook(self._scale)

    def _scale(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return output * self.config.factor

    def attach(self, engine: Any) -> None:
        self.calls.append("attach")

    def before_step(self, context: StepContext) -> None:
        self.calls.append("before_step")

    def on_step(self, context: StepContext) -> Mapping[str, float]:
        self.calls.append("on_step")
        self.noise += uniform(derive_key(self.context.seed, step=context.step, stream="sixth"), [3])
        return {"passes": float(self.passes)}

    def evidence(self) -> Evidence:
        return Evidence(self.passes > 0, f"{self.passes} passes scaled", {"passes": self.passes})

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "noise": self.noise}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.passes = int(state["passes"])
        self.noise = state["noise"].clone()
