"""MKOR for plain torch loops: a preconditioner in front of any torch optimizer.

    optimizer = MKOR(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for x, y in batches:
        loss_function(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

A step reads the statistics of its backward passes (`ds_efficient.mkor.statistics`), updates the inverse
factors where it is their turn, replaces the gradient G of each layer by ``M_L G M_R`` of the same norm, and
lets the inner optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ds_efficient.core.keys import Key
from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.mkor.config import MAX_VECTORS
from ds_efficient.mkor.factored import FactoredInverse
from ds_efficient.mkor.hybrid import HybridSwitch
from ds_efficient.mkor.inverse import (
    DenseInverse,
    InverseFactor,
    check_gamma,
    check_stabilizer,
    precondition,
    vector_weights,
)
from ds_efficient.mkor.signs import RowSketch
from ds_efficient.mkor.statistics import LayerStatistics, preconditioned_layers

SIDES = {"both": ("left", "right"), "left": ("left",), "right": ("right",)}
FORMS = ("dense", "factored")


class _Layer:
    """A layer with its statistics and its inverse factors."""

    def __init__(
        self,
        module: nn.Linear | nn.Conv2d,
        make: Callable[..., InverseFactor],
        sides: str,
        sketch: RowSketch | None,
    ) -> None:
        self.module = module
        self.statistics = LayerStatistics(module, sketch)
        weight = module.weight
        columns = weight[0].numel() + self.statistics.with_bias
        sizes = {"left": weight.shape[0], "right": columns}
        self.factors = {side: make(sizes[side], weight.device) for side in SIDES[sides]}
        self.updates = self.skipped = 0

    def update(self, vectors: dict[str, Tensor], gamma: float, threshold: float, zeta: float) -> None:
        """Stabilise the factors, then take the vectors in: (size,), or (r, size) for several."""
        for side, factor in self.factors.items():
            factor.stabilize(threshold, zeta)
            several = torch.atleast_2d(vectors[side])
            each, weights = vector_weights(gamma, len(several))
            for vector, weight in zip(several, weights, strict=True):
                factor.update(vector * weight, each)
        self.updates += 1

    @torch.no_grad()
    def precondition(self, dtype: torch.dtype) -> None:
        """Replace the gradients of the weight and of the bias."""
        weight, bias = self.module.weight, self.module.bias if self.statistics.with_bias else None
        bias_gradient = bias.grad if bias is not None else None
        if weight.grad is None or not self.updates or (bias is not None and bias_gradient is None):
            return
        gradient = weight.grad.flatten(1).to(dtype)
        columns = gradient.shape[1]
        if bias_gradient is not None:
            gradient = torch.cat([gradient, bias_gradient.to(dtype)[:, None]], 1)
        result = precondition(gradient, self.factors.get("left"), self.factors.get("right"))
        weight.grad.copy_(result[:, :columns].reshape(weight.shape))
        if bias_gradient is not None:
            bias_gradient.copy_(result[:, columns])


class MKOR:
    """Preconditions the gradients of linear layers and convolutions, then steps an optimizer.

    Build it after the model is on its device. One process: with data-parallel ranks the vectors of a rank say
    nothing about the others', and the constructor refuses.

    Gradients may be clipped before `step`: the norm of each layer does not change. With a scaled loss
    (`torch.amp.GradScaler`) unscale the gradients first and pass the scale as `loss_scale`.

    Attributes:
        optimizer: the inner one.
        steps: done so far.

    Args:
        model: its `nn.Linear` and `nn.Conv2d` layers are preconditioned; whatever else it has, tied weights
            and excluded layers go to the inner optimizer as they are.
        optimizer: any torch optimizer over the model's parameters whose step needs no closure.
        gamma: weight of the old statistics at each update, in (0, 1]; 1 is the inner optimizer alone.
        inversion_interval: steps between two updates of the factors.
        warmup_steps: first steps, in which every step updates the factors.
        threshold: largest entry of an inverse factor that is left alone.
        zeta: weight of the factor where it is blended with the identity, in [0, 1) and below gamma: else
            the blend does not outweigh the growth by 1 / gamma at each update.
        sides: factors in use: "left" (output gradients), "right" (inputs) or "both".
        form: "dense", or "factored" for `ds_efficient.mkor.factored`.
        max_rank: most columns of the factored form.
        state_dtype: type of the stored factors; products are made in fp32, with torch.float64 in fp64.
        statistics_rank: vectors that each update takes a side. 1: the mean input row and the gradient of a
            shift of all outputs, as in the paper. More: sums of rows with random signs, whose outer products
            estimate the whole second moments (`ds_efficient.mkor.signs`), at as many times the work of an
            update and of its statistics. Up to 64.
        seed: of those signs; torch's own generator is not used.
        exclude: ends of dotted module names to leave to the inner optimizer.
        hybrid: `HybridSwitch` for MKOR-H; then `step` needs the loss.
        formula: "sherman_morrison", or for studies "printed", the paper's own, which diverges.

    Raises:
        UserError: a value outside of its range, no layer to work on, or several data-parallel ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        gamma: float = 0.95,
        inversion_interval: int = 10,
        warmup_steps: int = 0,
        threshold: float = 10.0,
        zeta: float = 0.9,
        sides: Literal["both", "left", "right"] = "both",
        form: Literal["dense", "factored"] = "dense",
        max_rank: int = 128,
        state_dtype: torch.dtype = torch.float32,
        statistics_rank: int = 1,
        seed: int = 0,
        exclude: Sequence[str] = ("output_layer", "embedding"),
        hybrid: HybridSwitch | None = None,
        formula: Literal["sherman_morrison", "printed"] = "sherman_morrison",
    ) -> None:
        check_gamma(gamma)
        check_stabilizer(threshold, zeta)
        if zeta >= gamma and gamma < 1:
            raise UserError(
                f"zeta={zeta} with gamma={gamma}; allowed: below gamma, or the inverse factors grow without "
                "bound; use for example gamma=0.95 and zeta=0.9"
            )
        _check_choices(optimizer, inversion_interval, warmup_steps, sides, form, state_dtype, formula)
        _check_rank(statistics_rank, formula)
        self.optimizer = optimizer
        self.gamma, self.threshold, self.zeta = gamma, threshold, zeta
        self.inversion_interval, self.warmup_steps = inversion_interval, warmup_steps
        self.hybrid = hybrid
        self.steps = 0
        self._settings: dict[str, str | int] = {
            "sides": sides,
            "form": form,
            "state_dtype": str(state_dtype),
            "formula": formula,
            "statistics_rank": statistics_rank,
            "seed": seed if statistics_rank > 1 else 0,
        }
        self._dtype = torch.float64 if state_dtype == torch.float64 else torch.float32

        def make(size: int, device: torch.device) -> InverseFactor:
            if form == "factored":
                return FactoredInverse(size, max_rank, state_dtype, device)
            return DenseInverse(size, state_dtype, device, formula=formula)

        def sketch(name: str) -> RowSketch | None:
            if statistics_rank == 1:
                return None
            return RowSketch(Key(seed, ("mkor", name)), statistics_rank, lambda: self.steps)

        layers = preconditioned_layers(model, tuple(exclude))
        self._layers = {name: _Layer(module, make, sides, sketch(name)) for name, module in layers.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the inner optimizer, for schedules and gradient scalers."""
        return self.optimizer.param_groups

    @property
    def active(self) -> bool:
        """Whether gradients are preconditioned: until MKOR-H switches."""
        return self.hybrid is None or not self.hybrid.switched

    def step(
        self,
        closure: Callable[[], Tensor | float] | None = None,
        *,
        loss: Tensor | float | None = None,
        loss_scale: float = 1.0,
    ) -> Any:
        """Precondition the gradients in place, and step the inner optimizer.

        Args:
            closure: computes the loss and its gradients, as for any torch optimizer.
            loss: of this step, unscaled; MKOR-H reads it, unless a closure returned it.
            loss_scale: what the loss was multiplied by before the backward passes.

        Returns:
            The loss, from the closure or as given.

        Raises:
            UserError: MKOR-H without a loss, or a loss scale that is not positive.
        """
        if not 0 < loss_scale < float("inf"):
            raise UserError(f"loss_scale={loss_scale}; allowed: a positive number")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.hybrid is not None and self.active:
            if loss is None:
                raise UserError("loss: MKOR-H decides by it; call step(loss=loss) or step(closure)")
            if self.hybrid.observe(float(loss)):
                self._free()
        if self.active:
            if self.steps < self.warmup_steps or self.steps % self.inversion_interval == 0:
                self._update_factors(loss_scale)
            for layer in self._layers.values():
                layer.precondition(self._dtype)
                layer.statistics.clear()
        self.optimizer.step()
        self.steps += 1
        return loss

    @torch.no_grad()
    def _update_factors(self, loss_scale: float) -> None:
        """Update the factors of every layer whose two vectors are finite."""
        found = []
        for layer in self._layers.values():
            vectors = layer.statistics.vectors(loss_scale)
            if vectors is not None:
                found.append((layer, *vectors))
        if not found:
            return
        device = found[0][1].device
        flags = [torch.isfinite(a).all() & torch.isfinite(g).all() for _, a, g in found]
        finite = torch.stack([flag.to(device) for flag in flags]).tolist()  # one wait for all layers
        for (layer, a, g), good in zip(found, finite, strict=True):
            if good:
                layer.update({"right": a, "left": g}, self.gamma, self.threshold, self.zeta)
            else:
                layer.skipped += 1

    def _free(self) -> None:
        """Give the factors back: the inner optimizer goes on alone."""
        for layer in self._layers.values():
            layer.statistics.remove()
        self._layers.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the statistics of backward passes that no step has used."""
        self.optimizer.zero_grad(set_to_none)
        for layer in self._layers.values():
            layer.statistics.clear()

    def inverse_factors(self) -> dict[str, dict[str, InverseFactor]]:
        """Return the inverse factors by layer and side; empty after MKOR-H has switched."""
        return {name: dict(layer.factors) for name, layer in self._layers.items()}

    def skipped_updates(self) -> dict[str, int]:
        """Return by layer how many updates were left out because a vector was not finite."""
        return {name: layer.skipped for name, layer in self._layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps, loadable with ``torch.load(..., weights_only=True)``."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "settings": dict(self._settings),
            "hybrid": self.hybrid.state_dict() if self.hybrid is not None else None,
            "layers": {
                name: {
                    "updates": layer.updates,
                    "skipped": layer.skipped,
                    "factors": {side: factor.state_dict() for side, factor in layer.factors.items()},
                }
                for name, layer in self._layers.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the next steps are bit-identical.

        Raises:
            CheckpointError: of other layers or settings.
        """
        missing = {"optimizer", "steps", "settings", "hybrid", "layers"} - state.keys()
        if missing:
            raise CheckpointError(f"state of MKOR: {', '.join(sorted(missing))} missing")
        saved_with = {"statistics_rank": 1, "seed": 0, **state["settings"]}
        if saved_with != self._settings:
            raise CheckpointError(
                f"state of MKOR: saved with {saved_with}, here {self._settings}; use the same"
            )
        if (state["hybrid"] is None) != (self.hybrid is None):
            raise CheckpointError(
                "state of MKOR: one of the saved run and this one uses hybrid; use the same"
            )
        switched = state["hybrid"] is not None and state["hybrid"]["switched_at"] is not None
        if not switched and state["layers"].keys() != self._layers.keys():
            differing = sorted(state["layers"].keys() ^ self._layers.keys())
            raise CheckpointError(
                f"state of MKOR: layers {', '.join(differing[:5])} are only in the state, or only in the "
                "model; use the model and the exclude that it was saved with"
            )
        for name, saved in state["layers"].items():
            layer = self._layers[name]
            for side, factor in layer.factors.items():
                factor.load_state_dict(saved["factors"][side])
            layer.updates, layer.skipped = saved["updates"], saved["skipped"]
            layer.statistics.clear()
        if self.hybrid is not None:
            self.hybrid.load_state_dict(state["hybrid"])
        if switched:
            self._free()
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


def _check_rank(rank: int, formula: str) -> None:
    """Refuse a number of vectors that cannot be."""
    if type(rank) is not int or not 1 <= rank <= MAX_VECTORS:
        raise UserError(f"statistics_rank={rank}; allowed: 1 to {MAX_VECTORS}, for example 8")
    if rank > 1 and formula != "sherman_morrison":
        raise UserError(f"statistics_rank={rank} with formula={formula!r}; allowed: 1, or sherman_morrison")


def _check_choices(
    optimizer: Optimizer,
    interval: int,
    warmup: int,
    sides: str,
    form: str,
    dtype: torch.dtype,
    formula: str,
) -> None:
    """Refuse what cannot be done."""
    if isinstance(optimizer, LBFGS):
        raise UserError("optimizer: LBFGS evaluates the loss by itself; use one whose step needs no closure")
    if interval < 1:
        raise UserError(f"inversion_interval={interval}; allowed: 1 and more steps")
    if warmup < 0:
        raise UserError(f"warmup_steps={warmup}; allowed: 0 and more")
    if sides not in SIDES:
        raise UserError(f"sides={sides!r}; allowed: {', '.join(SIDES)}")
    if form not in FORMS:
        raise UserError(f"form={form!r}; allowed: {', '.join(FORMS)}")
    if form == "factored" and formula != "sherman_morrison":
        raise UserError(f"formula={formula!r} with the factored form; allowed: sherman_morrison, or dense")
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise UserError(f"state_dtype={dtype}; allowed: torch.float32, float64, bfloat16 or float16")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise UserError(
                f"MKOR in a plain loop on {ranks} ranks: their statistics would differ; use one process"
            )
