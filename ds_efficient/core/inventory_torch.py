"""Reads torch modules into inventory entries. megatron-core's classes are known by name and attributes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from ds_efficient.core.inventory import Kind, ModuleInfo
from ds_efficient.core.shape import NORMALIZATIONS, POSITION_EMBEDDINGS, ModelShape
from ds_efficient.errors import UserError

_LAYER_LISTS = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)(?:\.|$)")
_OUTPUT_NAMES = frozenset({"output_layer", "lm_head", "embed_out"})
_NORM_CLASSES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _class_names(module: nn.Module) -> frozenset[str]:
    return frozenset(cls.__name__ for cls in type(module).__mro__)


def _full_numel(parameter: torch.Tensor) -> int:
    """Return the elements of a parameter before ZeRO-3 partitioned it (tensor parallelism left aside)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class _Reader:
    """Walks a model once; counts each parameter at its first holder."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.owner: dict[int, str] = {}
        self.embedding_rows: set[int] = set()
        self.layer_numbers: list[tuple[str, int]] = [
            (f"{name}.", int(module.layer_number) - 1)
            for name, module in model.named_modules()
            if "TransformerLayer" in _class_names(module) and isinstance(_layer_number(module), int)
        ]
        self.word_embedding: str | None = None

    def read(self) -> Iterator[ModuleInfo]:
        output = _output_module(self.model)
        for name, module in self.model.named_modules():
            info = self._entry(name, module, module is output)
            if info is not None:
                yield info

    def layer_of(self, name: str) -> int | None:
        """Return the global layer: megatron-core's own number, else the index in the list of layers."""
        dotted = f"{name}."
        for prefix, number in self.layer_numbers:
            if dotted.startswith(prefix):
                return number
        found = _LAYER_LISTS.search(name)
        return int(found.group(1)) if found else None

    def _entry(self, name: str, module: nn.Module, is_output: bool) -> ModuleInfo | None:
        direct = dict(module.named_parameters(recurse=False))
        sizes = _sizes(module, direct)
        if sizes is None and not direct:
            return None
        kind, inputs, outputs, cut = sizes if sizes is not None else ("other", 0, 0, None)
        counted, tied_to = self._count(name, direct, inputs * outputs if cut else 0, outputs)
        if kind == "embedding" and self.word_embedding is None:
            self.word_embedding = name
        if kind in ("linear", "column_parallel"):
            # megatron-core hands the embedding's weight in
            borrowed = kind == "column_parallel" and direct.get("weight") is None
            tied_to = tied_to or (self.word_embedding if borrowed else None)
            if is_output or tied_to is not None or name.rpartition(".")[2] in _OUTPUT_NAMES:
                kind = "output"
        return ModuleInfo(
            name=name,
            kind=kind,
            layer=self.layer_of(name),
            in_features=inputs,
            out_features=outputs,
            bias=direct.get("bias") is not None,
            parameters=counted,
            tensor_parallel=cut,
            tied_to=tied_to,
            class_name=type(module).__name__,
        )

    def _count(
        self, name: str, direct: dict[str, nn.Parameter], full_weight: int, full_bias: int
    ) -> tuple[int, str | None]:
        """Return the full parameters new with this module, and the module an already counted weight is of.

        A parameter that tensor parallelism cuts has its full size in the module's attributes.
        """
        counted, tied_to = 0, None
        for key, parameter in direct.items():
            if id(parameter) in self.owner:
                if key == "weight":
                    tied_to = self.owner[id(parameter)]
                continue
            self.owner[id(parameter)] = name
            numel = _full_numel(parameter)
            if getattr(parameter, "tensor_model_parallel", False):
                if key == "weight" and full_weight:
                    numel = full_weight
                elif key == "bias" and full_bias:
                    numel = full_bias
            counted += numel
        return counted, tied_to


def _layer_number(module: nn.Module) -> Any:
    return getattr(module, "layer_number", None)


def _output_module(model: nn.Module) -> nn.Module | None:
    """Return what a Hugging Face model names as its output embedding."""
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        return getter()
    except NotImplementedError:
        return None


def _sizes(
    module: nn.Module, direct: dict[str, nn.Parameter]
) -> tuple[Kind, int, int, Literal["in", "out"] | None] | None:
    """Return (kind, in_features, out_features, cut dimension) with full sizes, or None for other modules."""
    names = _class_names(module)
    attributes: Any = module
    if any("ColumnParallelLinear" in name for name in names) and hasattr(module, "output_size_per_partition"):
        return "column_parallel", int(attributes.input_size), int(attributes.output_size), "out"
    if any("RowParallelLinear" in name for name in names) and hasattr(module, "input_size_per_partition"):
        return "row_parallel", int(attributes.input_size), int(attributes.output_size), "in"
    if "VocabParallelEmbedding" in names and hasattr(module, "num_embeddings_per_partition"):
        return "embedding", int(attributes.num_embeddings), int(attributes.embedding_dim), "in"
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim, None
    if isinstance(module, nn.Linear):
        return "linear", module.in_features, module.out_features, None
    weight = direct.get("weight")
    if weight is None:
        return None
    shape = _full_shape(weight)
    if "Conv1D" in names and len(shape) == 2:  # transformers' GPT-2: weight (in, out)
        return "linear", shape[0], shape[1], None
    if isinstance(module, _NORM_CLASSES) or (type(module).__name__.endswith("Norm") and len(shape) == 1):
        width = _full_numel(weight)
        return "norm", width, width, None
    return None


def read_model(model: nn.Module) -> tuple[list[ModuleInfo], ModelShape | None]:
    """Return the entries of `model` and, where it is a GPT of a known kind, its shape."""
    modules = list(_Reader(model).read())
    return modules, _read_shape(model, modules)


def _read_shape(model: nn.Module, modules: list[ModuleInfo]) -> ModelShape | None:
    config = getattr(model, "config", None)
    if config is None:
        return None
    try:
        if hasattr(config, "num_layers") and hasattr(model, "share_embeddings_and_output_weights"):
            return _megatron_shape(model, config)
        if hasattr(config, "num_hidden_layers") and hasattr(config, "vocab_size"):
            return _hugging_face_shape(config, modules)
    except UserError:
        return None  # sizes outside what a ModelShape describes: the plan goes by the modules alone
    return None


def _megatron_shape(model: Any, config: Any) -> ModelShape | None:
    position = getattr(model, "position_embedding_type", "none")
    if getattr(config, "num_moe_experts", None) or position not in POSITION_EMBEDDINGS:
        return None
    if config.normalization not in NORMALIZATIONS:
        return None
    table = getattr(getattr(model, "embedding", None), "position_embeddings", None)
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        vocab_size=model.vocab_size,
        seq_length=model.max_sequence_length,
        ffn_hidden_size=config.ffn_hidden_size,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        swiglu=bool(config.gated_linear_unit),
        untie_embeddings=not model.share_embeddings_and_output_weights,
        add_bias_linear=bool(config.add_bias_linear),
        add_qkv_bias=bool(config.add_qkv_bias),
        normalization=config.normalization,
        qk_layernorm=bool(config.qk_layernorm),
        position_embedding_type=position,
        max_position_embeddings=None if table is None else table.num_embeddings,
    )


def _hugging_face_shape(config: Any, modules: list[ModuleInfo]) -> ModelShape | None:
    """Return the shape of a decoder-only Hugging Face model (GPT-2's and Llama's attribute names)."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "num_local_experts", None):
        return None
    heads = config.num_attention_heads
    gated = any(module.leaf == "gate_proj" for module in modules)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    learned = any(module.leaf in ("wpe", "embed_positions") for module in modules)
    output = next((module for module in modules if module.kind == "output"), None)
    linears = [module for module in modules if module.is_linear and module.kind != "output"]
    norms = [module for module in modules if module.kind == "norm"]
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        vocab_size=config.vocab_size,
        seq_length=config.max_position_embeddings,
        ffn_hidden_size=inner or 4 * config.hidden_size,
        num_query_groups=getattr(config, "num_key_value_heads", None) or heads,
        kv_channels=getattr(config, "head_dim", None),
        swiglu=gated,
        untie_embeddings=output is not None and output.tied_to is None,
        add_bias_linear=any(module.bias for module in linears),
        normalization="LayerNorm" if any(norm.bias for norm in norms) else "RMSNorm",
        position_embedding_type="learned_absolute" if learned else "rope",
    )
