"""The optimizers that MKOR is compared with, and MKOR around them, by name.

Weight decay applies to matrices, under AdamW, LAMB and Muon; SGD has none (torch's is part of its gradient,
so that one value would mean something else for it). `LR_GRID` is the grid of learning rates for all: half
decades.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from measuring import ROOT
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from first_order_references import Float32Muon, Lamb
from kfac_reference import KFAC

from ds_efficient.mkor import MKOR, HybridSwitch

LR_GRID = tuple(float(f"{10 ** (k / 2):.1g}") for k in range(-10, 5))  # 1e-05, 3e-05 ... 30, 100


@dataclass(frozen=True)
class Contestant:
    """An optimizer.

    Attributes:
        inner: "sgd", "adamw", "lamb" or "muon".
        second: "", "mkor", "mkor_h" or "kfac" in front of it.
        settings: of the second-order part, where they are not its defaults.
    """

    inner: str
    second: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


_RIGHT, _LEFT = {"sides": "right"}, {"sides": "left"}
_EVERY_STEP = {"sides": "right", "inversion_interval": 1}
_EIGHT = {"sides": "right", "statistics_rank": 8}
_EIGHT_WARM = {**_EIGHT, "gamma": 0.5, "zeta": 0.45, "warmup_steps": 30}
_WARM = {"sides": "right", "gamma": 0.5, "zeta": 0.45, "warmup_steps": 30}
CONTESTANTS = {
    "sgd": Contestant("sgd"),
    "adamw": Contestant("adamw"),
    "lamb": Contestant("lamb"),
    "muon": Contestant("muon"),
    "kfac": Contestant("sgd", "kfac", {"rescale": "kl"}),
    "kfac_adamw": Contestant("adamw", "kfac"),
    "mkor": Contestant("adamw", "mkor"),
    "mkor_right": Contestant("adamw", "mkor", _RIGHT),
    "mkor_right_f1": Contestant("adamw", "mkor", _EVERY_STEP),
    "mkor_right_warm": Contestant("adamw", "mkor", _WARM),
    "mkor_right_gamma": Contestant("adamw", "mkor", {**_WARM, "warmup_steps": 0}),
    "mkor_right_first": Contestant("adamw", "mkor", {**_RIGHT, "warmup_steps": 30}),
    "mkor_right_r8": Contestant("adamw", "mkor", _EIGHT),
    "mkor_right_r8_warm": Contestant("adamw", "mkor", _EIGHT_WARM),
    "mkor_r8": Contestant("adamw", "mkor", {"statistics_rank": 8}),
    "mkor_left": Contestant("adamw", "mkor", _LEFT),
    "mkor_sgd": Contestant("sgd", "mkor"),
    "mkor_right_sgd": Contestant("sgd", "mkor", _RIGHT),
    "mkor_lamb": Contestant("lamb", "mkor"),
    "mkor_muon": Contestant("muon", "mkor"),
    "mkor_right_muon": Contestant("muon", "mkor", _RIGHT),
    "mkor_right_muon_f1": Contestant("muon", "mkor", _EVERY_STEP),
    "mkor_right_muon_warm": Contestant("muon", "mkor", _WARM),
    "mkor_right_r8_muon": Contestant("muon", "mkor", _EIGHT),
    "mkor_right_r8_muon_warm": Contestant("muon", "mkor", _EIGHT_WARM),
    "mkor_h": Contestant("adamw", "mkor_h"),
    "mkor_right_h": Contestant("adamw", "mkor_h", _RIGHT),
}
# Where the search for a learning rate begins.
FIRST_LR = {"sgd": 0.1, "adamw": 3e-3, "lamb": 1e-2, "muon": 1e-2, "kfac": 0.1}


class Together:
    """Several optimizers as one, each over parameters of its own."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Step all."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def inner_optimizer(name: str, model: nn.Module, lr: float, decay: float) -> Any:
    """One of the first order.

    Muon takes the weights of linear layers, AdamW its other parameters, with one learning rate for both:
    Muon's updates are scaled to the size of AdamW's. On the CPU it is Muon in fp32: torch's has bf16
    products, which would take most of the time there.
    """
    parameters = list(model.parameters())
    fused = parameters[0].is_cuda
    matrices = [p for p in parameters if p.dim() == 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    if name == "lamb":
        return Lamb(groups, lr=lr)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    owned = {id(weight) for weight in linear}
    rest = [
        {"params": [p for p in group["params"] if id(p) not in owned], "weight_decay": group["weight_decay"]}
        for group in groups
    ]
    rest = [group for group in rest if group["params"]]
    muon: torch.optim.Optimizer = Float32Muon(linear, lr=lr, weight_decay=decay)
    if fused:
        muon = torch.optim.Muon(linear, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return Together(muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), fused=fused)) if rest else muon


def new_optimizer(
    name: str, model: nn.Module, *, lr: float, steps: int, decay: float = 0.0, **settings: Any
) -> Any:
    """A contestant over a model.

    Args:
        name: of `CONTESTANTS`.
        model: on its device.
        lr: its learning rate.
        steps: of the run; MKOR-H watches the mean of a fifth of them, and may switch after two fifths.
        decay: weight decay of matrices.
        settings: of the second-order part, in place of the contestant's.
    """
    contestant = CONTESTANTS[name]
    inner = inner_optimizer(contestant.inner, model, lr, decay)
    settings = {**contestant.settings, **settings}
    if contestant.second == "kfac":
        return KFAC(model, inner, **settings)
    if contestant.second == "mkor_h":
        settings["hybrid"] = HybridSwitch(ema=max(1, steps // 5), min_steps=2 * steps // 5)
    return MKOR(model, inner, **settings) if contestant.second else inner


def step(optimizer: Any, loss: Tensor) -> None:
    """Step a contestant; MKOR-H needs the loss."""
    if isinstance(optimizer, MKOR) and optimizer.hybrid is not None:
        optimizer.step(loss=loss.detach())
    else:
        optimizer.step()


def switched_at(optimizer: Any) -> int | str:
    """The step at which MKOR-H left the second order, or nothing."""
    hybrid = getattr(optimizer, "hybrid", None)
    return "" if hybrid is None or hybrid.switched_at is None else hybrid.switched_at
