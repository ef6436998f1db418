"""Floating-point operations of training: those of the model, and those a run executes.

Convention, one for the whole project:

- A product of (m, k) with (k, n) is 2*m*k*n FLOPs; only matrix products count.
- *Model FLOPs* are what one forward and one backward pass of the dense model need: each linear layer three
  products of the size of its forward one, the output layer included, embedding look-ups not. The products of
  attention count half, since a causal model needs only the lower triangle (``causal=False``: all of it).
  Model FLOPs know nothing of recomputation or of the techniques: they stay the yardstick, and MFU is theirs.
  Per token: 6 * (weights of the linear layers) + 6 * layers * seq_length * query width (12 if not causal).
- *Executed FLOPs* add what is done again (recomputation; the fifth product of fused attention's backward
  pass) and leave out what a technique does not do (`Action.options`, see `MatmulShare`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ds_efficient.core.inventory import Inventory, ModuleInfo
from ds_efficient.core.shape import ModelShape, Recompute
from ds_efficient.core.technique import Action

# Matrix products of the attention core: scores and context forward; two gradients of each backward, and with
# fused (flash) attention the scores once more.
_ATTENTION_FORWARD = 2
_ATTENTION_BACKWARD = {"fused": 5, "unfused": 4}


@dataclass(frozen=True)
class MatmulShare:
    """Share of a linear layer's three products that is still computed, 1 for the dense layer.

    A technique states it in ``Action.options["matmul_share"]`` as a mapping with these keys, and the share of
    the tokens that reach a module in ``Action.options["token_share"]`` (the module may be a whole layer).
    """

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0

    def times(self, other: MatmulShare) -> MatmulShare:
        """Return both shares together."""
        return MatmulShare(
            self.forward * other.forward,
            self.input_gradient * other.input_gradient,
            self.weight_gradient * other.weight_gradient,
        )


@dataclass(frozen=True)
class FlopCount:
    """FLOPs per token, forward and backward.

    Attributes:
        projections: linear layers of the attention.
        attention: scores and context.
        mlp: linear layers of the MLP and all other linear layers.
        logits: the output layer.
    """

    projections: float
    attention: float
    mlp: float
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.projections + self.attention + self.mlp + self.logits

    def to_json(self) -> dict[str, float]:
        """Return plain numbers."""
        return {
            "projections": self.projections,
            "attention": self.attention,
            "mlp": self.mlp,
            "logits": self.logits,
            "total": self.total,
        }


def _inventory_of(model: ModelShape | Inventory) -> Inventory:
    return Inventory.from_shape(model) if isinstance(model, ModelShape) else model


def _group(module: ModuleInfo) -> str:
    if module.kind == "output":
        return "logits"
    return "projections" if "attn" in module.name or "attention" in module.name else "mlp"


def model_flops_per_token(
    model: ModelShape | Inventory, *, causal: bool = True, seq_length: int | None = None
) -> FlopCount:
    """Return the model FLOPs of one token, forward and backward.

    Args:
        model: a shape or an inventory; without a known shape the attention core counts 0.
        causal: count half of the attention matrix.
        seq_length: another length than the shape's.
    """
    inventory = _inventory_of(model)
    sums = {"projections": 0.0, "mlp": 0.0, "logits": 0.0}
    for module in inventory.linears:
        sums[_group(module)] += 6.0 * module.in_features * module.out_features
    attention = 0.0
    if inventory.model is not None:
        product = _attention_product(inventory.model, causal, seq_length)
        attention = inventory.model.num_layers * 3 * _ATTENTION_FORWARD * product
    return FlopCount(sums["projections"], attention, sums["mlp"], sums["logits"])


def _attention_product(shape: ModelShape, causal: bool, seq_length: int | None) -> float:
    """Return the FLOPs per token of one of the products of one layer's attention core."""
    length = shape.seq_length if seq_length is None else seq_length
    return 2.0 * shape.query_size * length * (0.5 if causal else 1.0)


def executed_flops_per_token(
    model: ModelShape | Inventory,
    *,
    recompute: Recompute | None = None,
    pipeline_parallel: int = 1,
    actions: Iterable[Action] = (),
    attention: str = "fused",
    causal: bool = True,
    seq_length: int | None = None,
) -> FlopCount:
    """Return the FLOPs of one token that a run executes, forward and backward.

    Args:
        model: a shape or an inventory.
        recompute: activation recomputation.
        pipeline_parallel: stages; ``"block"`` recomputation counts layers of each stage.
        actions: what the techniques do; see `MatmulShare`.
        attention: ``"fused"`` (torch's scaled_dot_product_attention, flash) or ``"unfused"``.
        causal: whether the attention kernel leaves out the upper triangle. Unfused attention computes all of
            it, so there it must be False.
        seq_length: another length than the shape's.

    Raises:
        ValueError: `attention` is unknown, or unfused and causal.
    """
    if attention not in _ATTENTION_BACKWARD:
        raise ValueError(f"attention {attention!r}: 'fused' or 'unfused' is needed")
    if attention == "unfused" and causal:
        raise ValueError("unfused attention computes the whole matrix: causal must be False")
    inventory = _inventory_of(model)
    again = recompute or Recompute()
    shares, tokens = collect_shares(actions)
    whole = recomputed_layers(again, inventory.num_layers, pipeline_parallel)
    sums = {"projections": 0.0, "mlp": 0.0, "logits": 0.0}
    for module in inventory.linears:
        group = _group(module)
        share = shares.get(module.name, MatmulShare())
        inside = module.layer is not None
        repeats = inside and (module.layer in whole or (group == "mlp" and again.selects("mlp")))
        products = share.forward * (2 if repeats else 1) + share.input_gradient + share.weight_gradient
        size = 2.0 * module.in_features * module.out_features
        sums[group] += size * products * token_share(module.name, tokens)
    core = 0.0
    if inventory.model is not None:
        product = _attention_product(inventory.model, causal, seq_length)
        for layer in range(inventory.model.num_layers):
            forward = 2 if layer in whole or again.selects("core_attn") else 1
            products = _ATTENTION_FORWARD * forward + _ATTENTION_BACKWARD[attention]
            # Dropped tokens leave both the queries and the keys: the square of the share.
            core += product * products * token_share(_layer_name(inventory, layer), tokens) ** 2
    return FlopCount(sums["projections"], core, sums["mlp"], sums["logits"])


def _layer_name(inventory: Inventory, layer: int) -> str:
    """Return the dotted name of a layer's attention, so that shares given for the layer or for it apply."""
    for module in inventory:
        if module.layer == layer and _group(module) == "projections":
            return module.name.rpartition(".")[0]
    return ""


def collect_shares(actions: Iterable[Action]) -> tuple[dict[str, MatmulShare], dict[str, float]]:
    """Return what actions say of products by module, and of tokens by module or layer."""
    shares: dict[str, MatmulShare] = {}
    tokens: dict[str, float] = {}
    for action in actions:
        stated: Mapping[str, float] | None = action.options.get("matmul_share")
        if stated is not None and not action.skipped:
            share = MatmulShare(**stated)
            shares[action.module] = shares[action.module].times(share) if action.module in shares else share
        kept = action.options.get("token_share")
        if kept is not None and not action.skipped:
            tokens[action.module] = tokens.get(action.module, 1.0) * float(kept)
    return shares, tokens


def token_share(name: str, tokens: Mapping[str, float]) -> float:
    """Return the share of tokens reaching `name`: the product over it and the modules around it."""
    if not tokens:
        return 1.0
    share, parts = 1.0, name.split(".")
    for end in range(1, len(parts) + 1):
        share *= tokens.get(".".join(parts[:end]), 1.0)
    return share


def recomputed_layers(recompute: Recompute, num_layers: int, pipeline_parallel: int = 1) -> frozenset[int]:
    """Return the layers (from 0, over the whole model) that are recomputed whole."""
    per_stage = num_layers // pipeline_parallel or num_layers
    count = recompute.full_layers(per_stage)
    return frozenset(layer for layer in range(num_layers) if layer % per_stage < count)


def tflops(flops_per_token: FlopCount | float, tokens_per_second: float, devices: int = 1) -> float:
    """Return TFLOP/s of one device."""
    per_token = flops_per_token.total if isinstance(flops_per_token, FlopCount) else flops_per_token
    return per_token * tokens_per_second / devices / 1e12
