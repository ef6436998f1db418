"""Sparse inference: an exported model with kept values and masks, in a Hugging Face model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_efficient.core.plain_linears import is_conv1d
from ds_efficient.errors import UserError
from ds_efficient.export import formats
from ds_efficient.slope.linear import SlopeLinear


class AdapterLinear(nn.Module):
    """y = x W^T + (x R^T) L^T + b with a dense W.

    Args:
        weight: W (out, in).
        down, up: R (rank, in), L (out, rank).
        bias: b (out,) or None.
    """

    def __init__(self, weight: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.adapter_down = nn.Parameter(down, requires_grad=False)
        self.adapter_up = nn.Parameter(up, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) of x (..., in)."""
        low = nn.functional.linear(x, self.adapter_down)
        return nn.functional.linear(x, self.weight, self.bias) + nn.functional.linear(low, self.adapter_up)


def load_sparse(model: nn.Module, folder: str | Path, *, backend: str = "auto") -> nn.Module:
    """Put an exported sparse model's weights into a Hugging Face model, for inference.

    Sparse layers are replaced by `SlopeLinear`, which keeps kept values and masks only and multiplies through
    cuSPARSELt where that runs and is faster, else by dense products.

    Args:
        model: made from the folder's config.json, with ``AutoModelForCausalLM.from_config``, on any device;
            on ``meta`` no dense weight is ever allocated, and tensors come to the CPU.
        folder: made by ``ds_efficient export hf --format sparse`` (or ``--separate-adapters``).
        backend: ``"auto"``, ``"cusparselt"`` or ``"dense"``, as of `SlopeLinear`.

    Returns:
        `model`, changed in place, in evaluation mode, in the dtype of the export.

    Raises:
        UserError: not such a folder, damaged, or of another model.
    """
    folder = Path(folder)
    description = formats.read_description(folder)
    layers = description["layers"]
    pending: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for name, tensor in _tensors(folder, description["files"]):
        layer, part = _part_of(name, layers)
        if layer is None:
            _assign(model, name, tensor)
        else:
            pending[layer][part] = tensor
            if len(pending[layer]) == _parts_of(model, layer, layers[layer]):
                _replace(model, layer, layers[layer], pending.pop(layer), backend)
    if pending:
        raise UserError(f"{folder}: tensors of {', '.join(sorted(pending)[:5])} are missing; export again")
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    _make_buffers(model)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise UserError(f"{folder}: has no tensors for {', '.join(left[:5])}; it is of another model")
    return model.eval()


def _tensors(folder: Path, files: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors, one at a time."""
    formats.require_safetensors()
    from safetensors import SafetensorError, safe_open

    for name in files:
        path = folder / Path(name).name
        if not path.is_file():
            raise UserError(f"{path}: missing; export again")
        try:
            with safe_open(path, framework="pt") as stored:
                for key in stored.keys():
                    yield key, stored.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error}); export again") from error


_PARTS = (formats.VALUES, formats.MASK, formats.DOWN, formats.UP, ".weight", ".bias")


def _part_of(name: str, layers: dict[str, Any]) -> tuple[str | None, str]:
    for part in _PARTS:
        if name.endswith(part) and name.removesuffix(part) in layers:
            return name.removesuffix(part), part
    return None, ""


def _parts_of(model: nn.Module, name: str, layer: dict[str, Any]) -> int:
    """Return how many tensors a layer of the description has."""
    biased = getattr(_submodule(model, name), "bias", None) is not None
    return (2 if layer["pattern"] else 1) + (2 if layer["adapter_rank"] else 0) + biased


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"{type(model).__name__} has no layer {name}; make it from the export's config.json"
        ) from None


def _target(model: nn.Module, name: str) -> tuple[nn.Module, str, Tensor]:
    """Return the module, the leaf's name and the old tensor behind a tensor's name."""
    path, _, leaf = name.rpartition(".")
    module = _submodule(model, path)
    old = getattr(module, leaf, None)
    if not isinstance(old, Tensor):
        raise UserError(f"{type(model).__name__} has no {name}; make it from the export's config.json")
    return module, leaf, old


def _place(old: Tensor, tensor: Tensor) -> Tensor:
    return tensor if old.is_meta else tensor.to(old.device)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, leaf, old = _target(model, name)
    if old.shape != tensor.shape:
        raise UserError(
            f"{name}: {tuple(tensor.shape)} in the export, {tuple(old.shape)} in {type(model).__name__}; "
            "make it from the export's config.json"
        )
    setattr(module, leaf, nn.Parameter(_place(old, tensor), requires_grad=False))


def _replace(
    model: nn.Module, name: str, layer: dict[str, Any], parts: dict[str, Tensor], backend: str
) -> None:
    """Put a layer made from `parts` into the place of a dense one."""
    old = _submodule(model, name)
    weight: Any = getattr(old, "weight", None)
    if not (isinstance(old, nn.Linear) or is_conv1d(old)):
        raise UserError(f"{name} is a {type(old).__name__}, expected a linear layer")
    shape = tuple(reversed(weight.shape)) if is_conv1d(old) else tuple(weight.shape)
    if shape != (layer["out_features"], layer["in_features"]):
        raise UserError(
            f"{name}: {layer['out_features']} x {layer['in_features']} in the export, {shape[0]} x "
            f"{shape[1]} in {type(model).__name__}; make it from the export's config.json"
        )
    parts = {part: _place(weight, tensor) for part, tensor in parts.items()}
    bias = parts.get(".bias")
    new: nn.Module
    if layer["pattern"]:
        adapter = (parts[formats.DOWN], parts[formats.UP]) if layer["adapter_rank"] else None
        new = SlopeLinear.from_compact(
            parts[formats.VALUES], parts[formats.MASK], bias,
            pattern=layer["pattern"], adapter=adapter, backend=backend, name=name,
        )  # fmt: skip
    else:
        dense = parts[".weight"].t().contiguous() if is_conv1d(old) else parts[".weight"]
        new = AdapterLinear(dense, parts[formats.DOWN], parts[formats.UP], bias)
    parent, _, leaf = name.rpartition(".")
    setattr(_submodule(model, parent), leaf, new.eval())


def _make_buffers(model: nn.Module) -> None:
    """Compute buffers that are in no file and on meta (rotary frequencies) by making their modules anew."""
    config: Any = getattr(model, "config", None)
    for name, module in model.named_modules():
        lacking = [key for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not lacking:
            continue
        wanted = inspect.signature(type(module).__init__).parameters
        if config is None or not set(wanted) & {"config"}:
            raise UserError(
                f"{name}: its buffers {', '.join(lacking)} are on meta and cannot be made anew; make the "
                "model on a real device"
            )
        more = {key: getattr(module, key) for key in ("layer_idx",) if key in wanted and hasattr(module, key)}
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            fresh = type(module)(config=config, **more)
        for key in lacking:
            setattr(module, key, getattr(fresh, key))
