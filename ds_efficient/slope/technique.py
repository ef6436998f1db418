"""SLoPe as a technique: makes layers sparse, renews masks and operands, starts the adapters."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_efficient.config.fields import parse_pattern
from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.core.keys import Key
from ds_efficient.core.linear_seam import Cut, LinearSeam
from ds_efficient.core.plain_linears import is_conv1d, replace_everywhere
from ds_efficient.core.technique import Action, Evidence, RunContext, StepContext, Technique
from ds_efficient.errors import UserError
from ds_efficient.slope.config import SlopeConfig
from ds_efficient.slope.layers import plan_layers, rewrites_operands
from ds_efficient.slope.linear import SlopeLinear, dense_weight_of
from ds_efficient.slope.masks import magnitude_mask, random_mask
from ds_efficient.slope.operands import LayerShape
from ds_efficient.slope.product import SparseProduct

if TYPE_CHECKING:
    from ds_efficient.core.inventory import Inventory

logger = logging.getLogger(__name__)

ADAPTER_GROUP = "slope_adapters"


class SlopeTechnique(Technique[SlopeConfig]):
    """Double-pruned N:M sparse weights with lazy low-rank adapters.

    Attributes:
        layers: (name, layer, product) of every sparse layer on this rank.
        adapters_active: whether the adapters take part.
    """

    name = "slope"

    def __init__(self, config: SlopeConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.layers: list[tuple[str, Any, SparseProduct]] = []
        self.adapters_active = False
        self._engine: Any = None
        self._start: float = math.inf
        self._column_loss = 0.0
        self._total_linears = 0

    def plan(self, inventory: Inventory) -> Sequence[Action]:
        """Say for every linear layer whether and how it becomes sparse."""
        return plan_layers(self.config, self.context, inventory)

    def apply(self, model: nn.Module, actions: Sequence[Action]) -> None:
        """Replace the weights by compact ones, in place.

        Raises:
            UserError: no layer is left to make sparse, or one is of a kind that takes no product.
        """
        self._total_linears = len(actions)
        self._start = self._adapter_start()
        chosen = [action for action in actions if not action.skipped]
        if not chosen and self.context.pipeline_parallel_size == 1:
            known = sorted({action.module.rpartition(".")[2] for action in actions})
            reasons = sorted({action.reason for action in actions})
            raise UserError(
                f"slope.modules {list(self.config.modules)}: no linear layer becomes sparse "
                f"({'; '.join(reasons) or 'the model has none'}); the model's linear layers are called "
                f"{', '.join(known) or '-'}"
            )
        for action in chosen:  # all of them before the first is changed
            _check_kind(action.module, model.get_submodule(action.module))
        for action in chosen:
            module = model.get_submodule(action.module)
            if isinstance(module, LinearSeam):
                product = self._install(module, action)
            else:
                module, product = self._replace(model, module, action)
            product.operands.managed = True
            product.operands.rewritten = rewrites_operands(self.config, self.context)
            self.layers.append((action.module, module, product))
        self._column_loss = self._measure_column_loss()

    def _replace(
        self, model: nn.Module, linear: nn.Module, action: Action
    ) -> tuple[SlopeLinear, SparseProduct]:
        """Put a SlopeLinear in the place of a plain linear layer."""
        config = self.config
        layer = SlopeLinear.from_linear(
            linear,
            pattern=action.options["pattern"],
            mask=config.mask,
            double_prune=config.double_prune,
            adapter_rank=config.adapter.rank,
            key=self._key(action),
            backend=config.backend,
        )
        layer.slope.operands.name = action.module
        replace_everywhere(model, linear, layer)
        return layer, layer.slope

    def _install(self, layer: Any, action: Action) -> SparseProduct:
        """Hand a product and a compact weight to a tensor-parallel layer."""
        config, key = self.config, self._key(action)
        weight = layer.weight.detach()
        n, m = parse_pattern(action.options["pattern"])
        cut: Cut | None = layer.tensor_parallel_cut
        rows, columns = shard_ranges(
            action.options["full_out"], action.options["full_in"], cut,
            layer.tensor_parallel_rank, layer.tensor_parallel_size, layer.weight_stride,
        )  # fmt: skip
        if config.double_prune and any((end - first) % m for first, end in rows):
            raise UserError(
                f"slope: {action.module}: each of its {len(rows)} stacked matrices has "
                f"{rows[0][1] - rows[0][0]} outputs a rank, not a multiple of M={m}; exclude it, or set "
                "slope.double_prune to false"
            )
        if config.mask == "random":
            mask = random_mask(
                key.fold("mask"), action.options["full_in"], n, m,
                rows=rows, columns=columns, device=weight.device,
            )  # fmt: skip
        else:
            mask = magnitude_mask(weight, n, m)
        product = SparseProduct(
            LayerShape(weight.shape[0], weight.shape[1], n, m),
            mask,
            double_prune=config.double_prune,
            backend=config.backend,
            cut=cut,
            name=action.module,
        )
        compact = product.compress(weight)
        product.select_columns(compact)
        if config.adapter.rank:
            product.add_adapter(
                config.adapter.rank, key.fold("adapter"), weight,
                in_features=action.options["full_in"], first_input=columns[0],
            )  # fmt: skip
        layer.install_product(product, compact)
        return product

    def _key(self, action: Action) -> Key:
        return Key(self.context.seed, ("slope", action.options["global_name"]))

    def _adapter_start(self) -> float:
        """Return the step from which the adapters take part: steps done by then.

        Raises:
            UserError: last_fraction is given but the length of the run is not known.
        """
        adapter = self.config.adapter
        if not adapter.rank:
            return math.inf
        if adapter.start_step is not None:
            return adapter.start_step
        total = self.context.total_steps
        if total is None:
            raise UserError(
                "slope.adapter.last_fraction needs the length of the run: give total_steps to "
                "ds_efficient.initialize, or slope.adapter.start_step, or slope.adapter.rank 0"
            )
        assert adapter.last_fraction is not None
        return total - max(1, round(total * adapter.last_fraction))

    def attach(self, engine: Any) -> None:
        """Start adapters that are due from the first step on."""
        self._engine = engine
        if self._start <= 0:
            self._activate(0)

    def loaded(self, step: int) -> None:
        """Follow the checkpoint's masks and weights, and adapters that were trained."""
        self._renew_operands()
        self._follow_adapters()

    def _renew_operands(self) -> None:
        for _, _, product in self.layers:
            product.operands.weight_changed()
            product.operands.column_mask_changed()

    def _follow_adapters(self) -> None:
        """Let adapters that were trained take part, also where their weights alone were loaded."""
        for _, _, product in self.layers:
            with compat.whole([product.adapter_up] if product.adapter_up is not None else []):
                product.adapter_active |= product.adapter_is_trained()
        self.adapters_active |= any(product.adapter_active for _, _, product in self.layers)
        for _, _, product in self.layers:
            product.adapter_active = self.adapters_active and product.adapter_down is not None

    def on_step(self, context: StepContext) -> Mapping[str, float]:
        """Renew values, on schedule the column masks, and start the adapters."""
        for _, _, product in self.layers:
            product.operands.weight_changed()
        if self.config.double_prune and context.step % self.config.column_mask_interval == 0:
            self._column_loss = self._measure_column_loss(renew=True)
        if not self.adapters_active and context.step >= self._start:
            self._activate(context.step)
        kept, whole = self._sizes()
        return {
            "sparse_layers": float(len(self.layers)),
            "density": kept / whole if whole else 1.0,
            "column_loss": self._column_loss,
            "adapters_active": float(self.adapters_active),
            "saved_bytes": float(self._saved_bytes()),
        }

    def _activate(self, step: int) -> None:
        """Let the adapters take part; the outputs stay, since their second factor is zero."""
        self.adapters_active = True
        for _, _, product in self.layers:
            product.adapter_active = product.adapter_down is not None
        if self._engine is not None:
            compat.restart_adam(self._engine, ADAPTER_GROUP)
        logger.info(
            "slope: adapters of rank %d take part from step %d on", self.config.adapter.rank, step + 1
        )

    def _measure_column_loss(self, *, renew: bool = False) -> float:
        """Return the share of the squared norm of W^R that the column pass takes away, over all layers.

        Args:
            renew: choose the column masks anew first.
        """
        if not self.config.double_prune:
            return 0.0
        left = total = 0.0
        for _, layer, product in self.layers:
            with compat.whole([layer.weight]):  # one by one: all together may not fit into memory
                if renew:
                    product.select_columns(layer.weight)
                dense = product.dense_weight(layer.weight, backward=True)
                left += float(torch.linalg.vector_norm(dense, dtype=torch.float32)) ** 2
                total += float(torch.linalg.vector_norm(layer.weight.detach(), dtype=torch.float32)) ** 2
        return 1.0 - left / total if total else 0.0

    def _sizes(self) -> tuple[int, int]:
        """Return (kept, dense) elements of the sparse layers' weights on this rank."""
        shapes = [product.shape for _, _, product in self.layers]
        kept = sum(shape.out_features * shape.kept for shape in shapes)
        return kept, sum(shape.out_features * shape.in_features for shape in shapes)

    def _saved_bytes(self) -> int:
        """Return the weight bytes that the sparse layers save on this rank, masks and operands deducted."""
        saved = 0
        for _, layer, product in self.layers:
            shape = product.shape
            dropped = shape.out_features * (shape.in_features - shape.kept) * layer.weight.element_size()
            held = sum(buffer.nbytes for buffer in product.buffers()) + product.operands.nbytes()
            saved += dropped - held
        return saved

    def evidence(self) -> Evidence:
        """Count the layers whose sparse products ran, and how they were computed."""
        ran = sum(product.forward_products > 0 for _, _, product in self.layers)
        kept, whole = self._sizes()
        chosen = [choice for _, _, product in self.layers for choice in product.operands.choices.values()]
        sparse = chosen.count("cusparselt")
        adapters = "active" if self.adapters_active else "waiting" if self.config.adapter.rank else "off"
        density = kept / whole if whole else 1.0
        summary = (
            f"{len(self.layers)} of {self._total_linears} linear layers sparse, {ran} ran, density "
            f"{density:.4f}, column pass takes {self._column_loss:.2%} of the squared norm, "
            f"{sparse} of {len(chosen)} kinds of product on cuSPARSELt, adapters {adapters}, "
            f"weights with masks and operands {_difference(self._saved_bytes())}"
        )
        counts = {
            "layers": len(self.layers),
            "layers_ran": ran,
            "layers_total": self._total_linears,
            "density": density,
            "column_loss": self._column_loss,
            "sparse_kinds": sparse,
            "dense_kinds": chosen.count("dense"),
            "adapters_active": int(self.adapters_active),
            "saved_bytes": self._saved_bytes(),
            "input_gradients": sum(product.input_gradients for _, _, product in self.layers),
        }
        return Evidence(ran > 0, summary, counts)

    def weights_fact(self) -> str:
        """Return patterns, masks and adapters: the shapes and the meaning of what a checkpoint holds."""
        config = self.config
        parts = [config.pattern, *(f"{entry.pattern} in layers {entry.layers}" for entry in config.patterns)]
        parts.append("double-pruned" if config.double_prune else "not double-pruned")
        parts.append(f"adapters of rank {config.adapter.rank}")
        return ", ".join(parts)

    def state_dict(self) -> dict[str, Any]:
        """Return whether the adapters take part; masks are buffers of the model."""
        return {"adapters_active": self.adapters_active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; adapters that took part go on doing so."""
        self.adapters_active = bool(state["adapters_active"])
        for _, _, product in self.layers:
            product.adapter_active = self.adapters_active and product.adapter_down is not None
        self._renew_operands()


def _difference(saved: int) -> str:
    """Say how many bytes less or more than dense weights are held."""
    if saved >= 0:
        return f"{saved / 2**20:,.1f} MiB smaller than dense"
    return f"{-saved / 2**20:,.1f} MiB larger than dense, gradients and optimizer states smaller"


def _check_kind(name: str, module: nn.Module) -> None:
    """Raise UserError unless the module takes a product or can be replaced."""
    if isinstance(module, LinearSeam):
        return
    if not (type(module) is nn.Linear or is_conv1d(module)):
        raise UserError(
            f"slope: {name} is a {type(module).__name__}, which takes no sparse product; add it to "
            "slope.exclude, or build the model with megatron_patches.layer_spec(config) "
            "(--transformer-impl local)"
        )
    try:
        dense_weight_of(module)
    except UserError as error:
        raise UserError(f"{name}: {error}; add it to slope.exclude") from None


def shard_ranges(
    full_out: int, full_in: int, cut: Cut | None, rank: int, size: int, stride: int
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Return the ranges of outputs, and the range of inputs, of the full matrix that a rank holds.

    Args:
        full_out, full_in: sizes of the full matrix.
        cut: dimension that tensor parallelism cuts.
        rank, size: place among the tensor-parallel ranks.
        stride: stacked matrices that are cut one by one (2: gate and up of a gated layer).
    """
    if cut == "in":
        width = full_in // size
        return [(0, full_out)], (rank * width, (rank + 1) * width)
    if cut == "out":
        part = full_out // stride
        height = part // size
        starts = [piece * part + rank * height for piece in range(stride)]
        return [(start, start + height) for start in starts], (0, full_in)
    return [(0, full_out)], (0, full_in)
