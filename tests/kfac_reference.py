"""A small K-FAC for linear layers: what MKOR's rank-1 statistics are compared with in tests and measurements.

Martens and Grosse, arXiv 1503.05671: the Fisher matrix of a layer is taken as the Kronecker product of
``A = E[a a^T]``, a the inputs with a trailing 1 where there is a bias, and ``G = E[g g^T]``, g the output
gradients of single rows. Running means of both are kept, damped (factored Tikhonov), inverted in fp64 every
`interval` steps, and the gradient becomes ``inv(G) (dW | db) inv(A)``. It keeps whole covariances, where MKOR
keeps the outer products of the means, and it pays with an inversion of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class _Layer:
    """A linear layer, the covariances of a step, their running means and inverses."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.step: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.inverse: dict[str, Tensor] = {}
        module.register_forward_hook(self._forward)

    @torch.no_grad()
    def _forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        a = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        if self.module.bias is not None:
            a = torch.cat([a, a.new_ones(a.shape[0], 1)], 1)

        def backward(gradient: Tensor) -> None:
            # Of a mean over the rows: rows times the gradient is the gradient of one row's loss.
            g = gradient.detach().reshape(-1, gradient.shape[-1]).float() * a.shape[0]
            self.step = {"A": a.T @ a / a.shape[0], "G": g.T @ g / a.shape[0]}

        output.register_hook(backward)

    def gather(self, decay: float) -> None:
        """Take the step's covariances into the running means; the first ones as they are."""
        for name, now in self.step.items():
            old = self.mean.get(name)
            self.mean[name] = now if old is None else decay * old + (1 - decay) * now

    def invert(self, damping: float) -> None:
        """Invert the damped means; the damping is split by their mean eigenvalues."""
        a, g = (self.mean[name].double() for name in ("A", "G"))
        traces = float(a.trace() / a.shape[0]), float(g.trace() / g.shape[0])
        share = math.sqrt(traces[0] / traces[1]) if min(traces) > 0 else 1.0
        for name, matrix, part in (("A", a, share), ("G", g, 1 / share)):
            damped = matrix + math.sqrt(damping) * part * torch.eye(matrix.shape[0], device=matrix.device)
            self.inverse[name] = torch.linalg.inv(damped).float()

    def gradient(self) -> Tensor:
        """(dW | db), (out, in) or (out, in + 1)."""
        weight, bias = self.module.weight.grad, self.module.bias
        assert weight is not None
        if bias is None:
            return weight
        assert bias.grad is not None
        return torch.cat([weight, bias.grad[:, None]], 1)

    def replace(self, result: Tensor) -> None:
        """Write weight's and bias's gradients."""
        columns, weight, bias = self.module.in_features, self.module.weight.grad, self.module.bias
        assert weight is not None
        weight.copy_(result[:, :columns])
        if bias is not None and bias.grad is not None:
            bias.grad.copy_(result[:, columns])


class KFAC:
    """Preconditions the gradients of `nn.Linear` layers, then steps an optimizer; one batch a step.

    Args:
        model: its linear layers are preconditioned.
        optimizer: over the model's parameters.
        decay: weight of the old covariances at each update.
        interval: steps between two updates of covariances and inverses.
        damping: what is added to the Fisher matrix's diagonal.
        rescale: "norm" keeps the norm of each layer's gradient as MKOR does; "kl" multiplies all layers by
            ``min(1, sqrt(clip / sum lr^2 <P, gradient>))``, the trust region of the paper's follow-ups.
        clip: that bound.
        exclude: whether to leave a layer of this name out.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        decay: float = 0.95,
        interval: int = 10,
        damping: float = 1e-3,
        rescale: str = "norm",
        clip: float = 1e-3,
        exclude: Callable[[str], bool] = lambda name: False,
    ) -> None:
        assert rescale in ("norm", "kl")
        self.optimizer, self.decay, self.interval, self.damping = optimizer, decay, interval, damping
        self.rescale, self.clip, self.steps = rescale, clip, 0
        self.layers = {
            name: _Layer(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not exclude(name)
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the inner optimizer."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self) -> None:
        """Precondition the gradients in place, and step the inner optimizer."""
        products = {}
        for name, layer in self.layers.items():
            if self.steps % self.interval == 0:
                layer.gather(self.decay)
                layer.invert(self.damping)
            gradient = layer.gradient()
            products[name] = gradient, layer.inverse["G"] @ gradient @ layer.inverse["A"]
        scales = self._scales(products)
        for name, (_, product) in products.items():
            self.layers[name].replace(product * scales[name])
        self.optimizer.step()
        self.steps += 1

    def _scales(self, products: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        if self.rescale == "norm":
            return {
                name: gradient.norm() / product.norm().clamp_min(1e-30)
                for name, (gradient, product) in products.items()
            }
        lr = self.param_groups[0]["lr"]
        total = sum((gradient * product).sum() for gradient, product in products.values()) * lr**2
        scale = (self.clip / torch.as_tensor(total).clamp_min(1e-30)).sqrt().clamp_max(1.0)
        return dict.fromkeys(products, scale)
