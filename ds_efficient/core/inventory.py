"""What a model consists of: its linear layers, embeddings and norms, with full (unsharded) sizes.

An inventory comes from a module (`Inventory.from_model`) or from the shape of a GPT alone
(`Inventory.from_shape`); for megatron-core's GPTModel both give the same entries. Torch is imported only
when a module is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from ds_efficient.core.shape import ModelShape, Recompute, padded_vocab_size
from ds_efficient.errors import UserError

if TYPE_CHECKING:
    import torch

    from ds_efficient.core.technique import Action

__all__ = ["Inventory", "ModelShape", "ModuleInfo", "Recompute", "padded_vocab_size"]

Kind = Literal["linear", "column_parallel", "row_parallel", "embedding", "output", "norm", "other"]
LINEAR_KINDS = frozenset({"linear", "column_parallel", "row_parallel", "output"})


@dataclass(frozen=True)
class ModuleInfo:
    """One module that holds parameters, or a linear layer that borrows them.

    Attributes:
        name: dotted name in the model (under pipeline parallelism: in the stage's model).
        kind: ``"output"`` is the projection onto the vocabulary.
        layer: transformer layer, from 0, counted over the whole model; None outside the layers.
        in_features, out_features: full sizes; an embedding has (rows, width), a norm (width, width).
        bias: whether it has a bias.
        parameters: full number of parameters; shared ones count at their first holder only.
        tensor_parallel: dimension of the weight that tensor parallelism cuts: ``"out"``, ``"in"`` or None. An
            embedding cut along the vocabulary has ``"in"``.
        tied_to: name of the module whose weight this one uses, or None.
        class_name: the module's class; empty when planned from a shape.
        whole_parameters: parameters that each tensor-parallel rank holds whole, after a technique has changed
            the module; None: those of the dense module.
        buffer_bytes: full bytes of techniques' buffers; tensor parallelism cuts them with the weight.
    """

    name: str
    kind: Kind
    layer: int | None
    in_features: int
    out_features: int
    bias: bool
    parameters: int
    tensor_parallel: Literal["in", "out"] | None = None
    tied_to: str | None = None
    class_name: str = field(default="", compare=False)
    whole_parameters: int | None = None
    buffer_bytes: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether it multiplies its input with a weight matrix."""
        return self.kind in LINEAR_KINDS

    @property
    def leaf(self) -> str:
        """Last part of the name (``"linear_qkv"``)."""
        return self.name.rpartition(".")[2]

    def matches(self, names: Sequence[str]) -> bool:
        """Return whether one of a section's names (`ds_efficient.config.fields.Names`) means this module.

        A name means the modules whose dotted name it is or ends (``"linear_fc1"``, ``"mlp.linear_fc1"``); one
        with ``*`` or ``?`` is a pattern (`fnmatch`) for the whole dotted name or an end of it
        (``"layers.0.*"``), where ``*`` also stands for dots. Upper and lower case differ.
        """
        parts = self.name.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts))]
        return any(
            any(fnmatchcase(end, name) for end in ends) if "*" in name or "?" in name else name in ends
            for name in names
        )

    @property
    def _rest(self) -> int:
        """Parameters of a dense layer beside its own weight: the bias. Other modules are all weight."""
        if not self.is_linear and self.kind != "embedding":
            return 0
        weight = self.in_features * self.out_features
        return self.parameters if weight > self.parameters else self.parameters - weight

    def rank_parameters(self, tensor_parallel: int) -> int:
        """Return the parameters one tensor-parallel rank holds."""
        if self.tensor_parallel is None or tensor_parallel == 1:
            return self.parameters
        whole = self.whole_parameters
        if whole is None:
            whole = 0 if self.tensor_parallel == "out" else self._rest  # "out" cuts the bias too
        return (self.parameters - whole) // tensor_parallel + whole

    def rank_buffer_bytes(self, tensor_parallel: int) -> int:
        """Return the bytes of techniques' buffers that one tensor-parallel rank holds."""
        return self.buffer_bytes if self.tensor_parallel is None else self.buffer_bytes // tensor_parallel

    def with_action(self, action: Action) -> ModuleInfo:
        """Return the dense module as `action`, which states `parameters`, leaves it.

        Raises:
            ValueError: `action` leaves less than the bias, or changes a weight that two modules share.
        """
        assert action.parameters is not None
        cut, whole = action.extra_parameters
        weight = action.parameters - self._rest - cut - whole
        if weight < 0:
            raise ValueError(
                f"{self.name}: parameters = {action.parameters} do not hold the bias ({self._rest}) and "
                f"extra_parameters = {action.extra_parameters}"
            )
        if self.tied_to is not None and weight != 0:
            raise ValueError(f"{self.name}: its weight is that of {self.tied_to}; it cannot be changed")
        if self.tensor_parallel == "in":
            whole += self._rest
        return replace(self, parameters=action.parameters, whole_parameters=whole)


@dataclass(frozen=True)
class Inventory:
    """Modules of a model in the model's order.

    Attributes:
        modules: the entries.
        model: the GPT's sizes, or None where the model is not a known GPT.
    """

    modules: tuple[ModuleInfo, ...]
    model: ModelShape | None = None

    @property
    def total_parameters(self) -> int:
        """Parameters of the model, shared ones once."""
        return sum(module.parameters for module in self.modules)

    @property
    def linears(self) -> tuple[ModuleInfo, ...]:
        """Linear layers, the output layer included."""
        return tuple(module for module in self.modules if module.is_linear)

    @property
    def num_layers(self) -> int:
        """Transformer layers: of the shape where it is known, else the highest layer number seen."""
        if self.model is not None:
            return self.model.num_layers
        return 1 + max((module.layer for module in self.modules if module.layer is not None), default=-1)

    def find(self, name: str) -> ModuleInfo:
        """Return the entry called `name`.

        Raises:
            KeyError: there is none.
        """
        for module in self.modules:
            if module.name == name:
                return module
        raise KeyError(name)

    def with_actions(self, actions: Iterable[Action]) -> Inventory:
        """Return this inventory of the dense model after the techniques: with their parameters and buffers.

        `in_features` and `out_features` stay, so FLOPs are counted from either.

        Raises:
            UserError: two techniques change the parameters of one module.
            ValueError: an action's sizes contradict the module, or it has sizes and no module of that name.
        """
        modules = {module.name: module for module in self.modules}
        shared = {module.tied_to for module in self.modules}
        changed: dict[str, Action] = {}
        for action in actions:
            if action.skipped or (action.parameters is None and not action.buffer_bytes):
                continue
            module = modules.get(action.module)
            if module is None:
                raise ValueError(f"{action.module}: an action states sizes of a module without parameters")
            if action.parameters is not None:
                if action.module in changed:
                    both = f'"{changed[action.module].action}" and "{action.action}"'
                    raise UserError(
                        f"{action.module}: {both} both change its parameters; exclude the module from one of "
                        "the two techniques"
                    )
                if action.module in shared and action.parameters != module.parameters:
                    raise ValueError(f"{action.module}: another module uses its weight; it cannot be changed")
                changed[action.module] = action
                module = module.with_action(action)
            modules[action.module] = replace(module, buffer_bytes=module.buffer_bytes + action.buffer_bytes)
        return replace(self, modules=tuple(modules.values()))

    def __iter__(self) -> Iterator[ModuleInfo]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    @classmethod
    def from_model(cls, model: torch.nn.Module) -> Inventory:
        """Read any torch module: plain, Hugging Face, megatron-core (any tensor-parallel size), ZeRO-3, meta.

        A pipeline stage gives the entries of that stage.
        """
        from ds_efficient.core.inventory_torch import read_model

        modules, shape = read_model(model)
        return cls(tuple(modules), shape)

    @classmethod
    def from_shape(cls, shape: ModelShape) -> Inventory:
        """Return the entries that megatron-core's GPTModel (local layers) of this shape has."""
        return cls(tuple(_shape_modules(shape)), shape)


def _norm(name: str, layer: int | None, width: int, shape: ModelShape) -> ModuleInfo:
    bias = shape.normalization == "LayerNorm"
    return ModuleInfo(name, "norm", layer, width, width, bias, width * (2 if bias else 1))


def _linear(
    name: str, kind: Kind, layer: int | None, sizes: tuple[int, int], bias: bool, cut: Literal["in", "out"]
) -> ModuleInfo:
    inputs, outputs = sizes
    parameters = inputs * outputs + (outputs if bias else 0)
    return ModuleInfo(name, kind, layer, inputs, outputs, bias, parameters, cut)


def _layer_modules(shape: ModelShape, layer: int) -> Iterator[ModuleInfo]:
    """Yield one transformer layer in the order of megatron-core's ``named_modules``."""
    prefix = f"decoder.layers.{layer}"
    hidden, bias = shape.hidden_size, shape.add_bias_linear
    yield _norm(f"{prefix}.input_layernorm", layer, hidden, shape)
    attention = f"{prefix}.self_attention"
    yield _linear(f"{attention}.linear_proj", "row_parallel", layer, (shape.query_size, hidden), bias, "in")
    qkv = (hidden, shape.query_size + 2 * shape.kv_size)
    yield _linear(f"{attention}.linear_qkv", "column_parallel", layer, qkv, bias or shape.add_qkv_bias, "out")
    if shape.qk_layernorm:
        yield _norm(f"{attention}.q_layernorm", layer, shape.head_dim, shape)
        yield _norm(f"{attention}.k_layernorm", layer, shape.head_dim, shape)
    yield _norm(f"{prefix}.pre_mlp_layernorm", layer, hidden, shape)
    fc1 = (hidden, shape.ffn * (2 if shape.swiglu else 1))
    yield _linear(f"{prefix}.mlp.linear_fc1", "column_parallel", layer, fc1, bias, "out")
    yield _linear(f"{prefix}.mlp.linear_fc2", "row_parallel", layer, (shape.ffn, hidden), bias, "in")


def _shape_modules(shape: ModelShape) -> Iterator[ModuleInfo]:
    hidden, vocab = shape.hidden_size, shape.vocab_size
    words = "embedding.word_embeddings"
    yield ModuleInfo(words, "embedding", None, vocab, hidden, False, vocab * hidden, "in")
    if shape.positions:
        rows = shape.positions
        yield ModuleInfo(
            "embedding.position_embeddings", "embedding", None, rows, hidden, False, rows * hidden
        )
    for layer in range(shape.num_layers):
        yield from _layer_modules(shape, layer)
    yield _norm("decoder.final_layernorm", None, hidden, shape)
    tied = not shape.untie_embeddings
    yield ModuleInfo(
        "output_layer",
        "output",
        None,
        hidden,
        vocab,
        False,
        0 if tied else hidden * vocab,
        "out",
        words if tied else None,
    )
