"""Whole tensors of a GPT out of a checkpoint of ``launch/pretrain_gpt.py``, whatever layout saved it.

ZeRO partitions, tensor-parallel shards and pipeline stages are put together tensor by tensor, when one is
asked for. Names are those of megatron-core's GPTModel on one rank.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_efficient.core import state as files
from ds_efficient.core.deepspeed_files import RankTensors
from ds_efficient.errors import CheckpointError
from ds_efficient.export.arguments import ModelArguments
from ds_efficient.ops import slope as ops

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+(?=\.)")
# Transformer Engine keeps a norm inside the linear layer behind it.
_RENAMED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_COLUMN = ("linear_qkv", "linear_fc1")
_ROW = ("linear_proj", "linear_fc2")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_SPARSE = "slope."


@dataclass(frozen=True)
class Linear:
    """One linear layer, dense or sparse.

    Attributes:
        weight: (out, in), or compact (out, in * N / M) where there is a mask.
        bias: (out,) or None.
        mask: packed forward mask (out, 4 * ceil(in / 32)) or None.
        pattern: ``"N:M"`` or None.
        down, up: R (rank, in) and L (out, rank) of an active adapter, or None.
        in_features: in.
    """

    weight: Tensor
    bias: Tensor | None
    in_features: int
    mask: Tensor | None = None
    pattern: str | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    def rows(self, index: Tensor) -> Linear:
        """Return the layer that computes the outputs `index` of this one, in that order."""

        def chosen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return dataclasses.replace(
            self,
            weight=self.weight[index],
            bias=chosen(self.bias),
            mask=chosen(self.mask),
            up=chosen(self.up),
        )

    def dense(self, *, merge: bool) -> Tensor:
        """Return the weight (out, in), zeros at pruned places; with `merge` L R is added, in fp32."""
        weight = self.weight
        if self.mask is not None:
            kept = ops.unpack_mask(self.mask, self.in_features)
            # Kept values stand in the order of their columns, as masked_scatter takes them.
            weight = weight.new_zeros(kept.shape).masked_scatter_(kept, weight)
        if merge and self.up is not None and self.down is not None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight = weight.to(wide).addmm(self.up.to(wide), self.down.to(wide))
        return weight


class CheckpointReader:
    """Reads whole tensors; files are checked when it is made.

    Args:
        path: folder that ``--save`` named, or one checkpoint in it.
        tag: name of the checkpoint; default: the latest.
        masters: prefer the optimizer's fp32 copies to half-precision weights, where ZeRO keeps them.
        flag: argument by which the user names another checkpoint, for messages.

    Attributes:
        folder: of the checkpoint.
        arguments: of the model.
        facts, about: as in the manifest.
        adapters: ``"none"``, ``"inactive"`` (there, but not part of the outputs) or ``"active"``.

    Raises:
        CheckpointError: no checkpoint, damaged, or of another program.
    """

    def __init__(
        self, path: Path, tag: str | None = None, *, masters: bool = True, flag: str = "--tag"
    ) -> None:
        self.folder = _checkpoint_folder(path, tag, flag)
        manifest = files.read_manifest(self.folder)
        if manifest is None:
            raise CheckpointError(
                f"{self.folder}: has no {files.MANIFEST}: it was not saved to its end, or by another program"
                f"{files.others(self.folder.parent)}"
            )
        files.check_files(self.folder, manifest, flag=flag)
        self.facts: Mapping[str, Any] = manifest.get("facts", {})
        self.about: Mapping[str, Any] = manifest.get("about", {})
        self.arguments = ModelArguments.from_manifest(manifest, self.folder)
        layout = manifest.get("layout", {})
        try:
            self._tensor_size = int(layout["tensor_parallel_size"])
            self._stages = int(layout["pipeline_parallel_size"])
            sizes = {name: int(layout[name]) for name in ("zero_stage", "data_parallel_size")}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder / files.MANIFEST}: no layout ({error})") from error
        self._ranks = [
            RankTensors(
                self.folder, rank, masters=masters,
                zero_stage=sizes["zero_stage"], data_parallel_size=sizes["data_parallel_size"],
            )
            for rank in range(self._tensor_size * self._stages)
        ]  # fmt: skip
        self.has_masters = self._ranks[0].has_masters
        self._places = self._find_places()
        self.adapters = self._adapter_state()

    def _find_places(self) -> dict[str, tuple[int, str]]:
        """Return (pipeline stage, name there) of every tensor by its global name."""
        places: dict[str, tuple[int, str]] = {}
        offset = 0
        tied = not self.arguments.untie_embeddings_and_output_weights
        for stage in range(self._stages):
            names = self._ranks[stage * self._tensor_size].names()
            numbers = {int(found.group()) for name in names if (found := _LAYER.search(name))}
            for name in names:
                if name.endswith("_extra_state") or (tied and name == "output_layer.weight"):
                    continue
                places[plain_name(_renumbered(name, offset))] = (stage, name)
            offset += len(numbers)
        if offset != self.arguments.num_layers:
            raise CheckpointError(
                f"{self.folder}: holds {offset} layers, its manifest says {self.arguments.num_layers}"
            )
        return places

    def _adapter_state(self) -> str:
        if not any(name.endswith("slope.adapter_up") for name in self._places):
            return "none"
        path = self.folder / "ds_efficient_mp_00.pt"
        states = files.load_tensors(path).get("states", {})
        try:
            return "active" if states["slope"]["state"]["adapters_active"] else "inactive"
        except KeyError as error:
            raise CheckpointError(f"{path}: does not tell whether the adapters take part") from error

    def names(self) -> list[str]:
        """Return the global names of all tensors."""
        return list(self._places)

    @property
    def sparse(self) -> bool:
        """Whether any layer is sparse."""
        return any(name.endswith(f"{_SPARSE}mask") for name in self._places)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as one rank would hold it; a copy, or a view into the memory-mapped file.

        Raises:
            CheckpointError: the checkpoint has none of that name.
        """
        if name not in self._places:
            raise CheckpointError(f"{self.folder}: has no tensor {name}")
        stage, local = self._places[name]
        first = stage * self._tensor_size
        parts = [rank.tensor(local) for rank in self._ranks[first : first + self._tensor_size]]
        axis, stride = self._cut(name)
        if axis is None or len(parts) == 1:
            return parts[0]
        if name.endswith(f"{_SPARSE}mask") and axis == 1:
            width = self._in_features(name) // len(parts)
            return ops.pack_mask(torch.cat([ops.unpack_mask(part, width) for part in parts], dim=1))
        pieces = [part.chunk(stride, dim=axis) for part in parts]
        return torch.cat([piece[number] for number in range(stride) for piece in pieces], dim=axis)

    def _cut(self, name: str) -> tuple[int | None, int]:
        """Return the axis along which tensor parallelism cuts a tensor, and how many matrices it stacks."""
        if name in _VOCABULARY:
            return 0, 1
        parts = name.split(".")
        layer = next((part for part in parts if part in (*_COLUMN, *_ROW)), None)
        leaf = parts[-1]
        if layer in _COLUMN:
            stride = 2 if layer == "linear_fc1" and self.arguments.swiglu else 1
            return (None if leaf == "adapter_down" else 0), stride
        if layer in _ROW:
            return (None if leaf in ("bias", "adapter_up") else 1), 1
        return None, 1

    def _in_features(self, name: str) -> int:
        arguments = self.arguments
        if "linear_proj" in name:
            return arguments.num_attention_heads * arguments.kv_channels
        return arguments.ffn_hidden_size if "linear_fc2" in name else arguments.hidden_size

    def linear(self, name: str) -> Linear:
        """Return a linear layer of the decoder.

        Args:
            name: ``decoder.layers.0.mlp.linear_fc1`` and the like.

        Raises:
            CheckpointError: the layer is not there, or its mask keeps another number of values than it has.
        """
        weight = self.tensor(f"{name}.weight")
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self._places else None
        inputs = self._in_features(name)
        if f"{name}.{_SPARSE}mask" not in self._places:
            return Linear(weight, bias, inputs)
        mask = self.tensor(f"{name}.{_SPARSE}mask")
        down = up = None
        if self.adapters == "active" and f"{name}.{_SPARSE}adapter_up" in self._places:
            down = self.tensor(f"{name}.{_SPARSE}adapter_down")
            up = self.tensor(f"{name}.{_SPARSE}adapter_up")
        pattern = _pattern_of(mask, weight.shape[1], inputs)
        if pattern is None:
            raise CheckpointError(
                f"{self.folder}: {name}: its mask keeps no fixed number of every M inputs, or not as many as "
                f"its weight {tuple(weight.shape)} has"
            )
        return Linear(weight, bias, inputs, mask, pattern, down, up)


def _pattern_of(mask: Tensor, kept: int, inputs: int) -> str | None:
    """Return N:M with the smallest M that the mask keeps to."""
    full = ops.unpack_mask(mask, inputs)
    for m in ops.GROUP_SIZES:
        if inputs % m == 0 and kept * m % inputs == 0:
            n = kept * m // inputs
            if bool((full.view(full.shape[0], -1, m).sum(dim=2) == n).all()):
                return f"{n}:{m}"
    return None


def _renumbered(name: str, offset: int) -> str:
    return _LAYER.sub(lambda found: str(int(found.group()) + offset), name)


def plain_name(name: str) -> str:
    """Return a tensor's name as with megatron-core's local layers, where Transformer Engine's has another."""
    for inside, outside in _RENAMED.items():
        name = name.replace(inside, outside)
    return name


def _checkpoint_folder(path: Path, tag: str | None, flag: str) -> Path:
    """Return the folder of the checkpoint that is meant."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; name the folder that --save named, or a checkpoint in it"
        )
    if tag is None and (path / files.MANIFEST).is_file():
        return path
    chosen = tag if tag is not None else files.latest_tag(path, flag=flag)
    if chosen is None:
        raise CheckpointError(f"{path}: holds no checkpoint (no file {files.LATEST}){files.others(path)}")
    if not (path / chosen).is_dir():
        raise CheckpointError(f"{path / chosen}: no such checkpoint{files.others(path)}")
    return path / chosen
