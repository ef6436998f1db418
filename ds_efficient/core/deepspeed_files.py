"""Tensors out of DeepSpeed's checkpoint files, without DeepSpeed and without running code from the files.

A checkpoint folder holds for each model-parallel rank R the weights, ``mp_rank_RR_model_states.pt``, and
with ZeRO for each data-parallel rank D a part of the optimizer, ``zero_pp_rank_D_mp_rank_RR_optim_states.pt``
(with bf16: ``bf16_zero...``). What of their content is used here:

- ``module``: names and weights; under ZeRO-3 the weights are empty and only the buffers are there;
- ZeRO 1 and 2, ``single_partition_of_fp32_groups`` and ``param_slice_mappings``: this rank's part of the fp32
  copies, and where in it each parameter's fragment lies; fragments of one parameter follow each other by D;
- ZeRO-3, ``fp32_flat_groups`` and ``param_shapes``: each parameter is cut into as many equal pieces as there
  are data-parallel ranks, the last one padded; pieces follow each other as the shapes do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_efficient.errors import CheckpointError


class _Inert:
    """Stands in for a class of DeepSpeed's: keeps attributes, runs nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def _stand_in(name: str) -> type:
    module, _, short = name.rpartition(".")
    return type(short, (_Inert,), {"__module__": module, "__qualname__": short})


def load_file(path: Path) -> dict[str, Any]:
    """Read one file by memory map, with ``weights_only=True``; objects of DeepSpeed's classes become inert.

    Raises:
        CheckpointError: missing, unreadable, or with objects of other classes.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is not complete")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = sorted(name for name in names if not name.startswith("deepspeed."))
        if foreign:
            raise CheckpointError(
                f"{path}: holds objects of {', '.join(foreign)}, which are not read: only tensors, plain "
                "values and DeepSpeed's own records are"
            )
        with torch.serialization.safe_globals([_stand_in(name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}); use an earlier checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is no checkpoint file of DeepSpeed's")
    return content


class RankTensors:
    """The tensors of one model-parallel rank, put together from its ZeRO partitions when they are asked for.

    Args:
        folder: of the checkpoint.
        rank: model-parallel rank in the file names.
        zero_stage, data_parallel_size: of the run that saved it.
        masters: read the fp32 copies of ZeRO 1 and 2 instead of half-precision weights.

    Attributes:
        has_masters: whether parameters come from fp32 copies.

    Raises:
        CheckpointError: a file is missing, unreadable or of another form.
    """

    def __init__(
        self, folder: Path, rank: int, *, zero_stage: int, data_parallel_size: int, masters: bool
    ) -> None:
        partitioned = zero_stage == 3
        prefix = "zero_pp_rank_0_" if partitioned else ""
        self._path = folder / f"{prefix}mp_rank_{rank:02d}_model_states.pt"
        states = load_file(self._path)
        try:
            module: Mapping[str, Any] = states["module"]
            self._tensors = {name: value for name, value in module.items() if isinstance(value, Tensor)}
            self._buffers = set(states["buffer_names"])
            self._shapes: dict[str, tuple[int, ...]] = {
                name: tuple(value.shape) for name, value in self._tensors.items()
            }
            self._pieces: dict[str, list[Tensor]] = {}
            halves = any(value.dtype in (torch.bfloat16, torch.float16) for value in self._tensors.values())
            if partitioned or (zero_stage > 0 and masters and halves):
                shares = _optimizer_shares(folder, rank, data_parallel_size)
                if partitioned:
                    self._collect_equal_pieces(shares, states["param_shapes"])
                else:
                    self._collect_fragments(shares)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{self._path}: not as DeepSpeed writes it ({type(error).__name__}: {error})"
            ) from error
        self.has_masters = bool(self._pieces)

    def names(self) -> list[str]:
        """Return the names of all tensors, in the model's order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, whole on this model-parallel rank.

        Raises:
            CheckpointError: the partitions do not make up the parameter.
        """
        pieces = self._pieces.get(name)
        if pieces is None:
            found = self._tensors[name]
            if tuple(found.shape) != self._shapes[name] or (not found.numel() and name not in self._buffers):
                raise CheckpointError(
                    f"{self._path}: parameter {name} is partitioned, and no part of it is there"
                )
            return found
        shape = self._shapes[name]
        size = math.prod(shape)
        flat = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if flat.numel() < size:
            raise CheckpointError(
                f"{self._path}: the partitions of {name} hold {flat.numel()} values, its shape {shape} has "
                f"{size}"
            )
        return flat[:size].view(shape)

    def _collect_fragments(self, shares: list[Mapping[str, Any]]) -> None:
        for share in shares:
            groups = share["single_partition_of_fp32_groups"]
            for flat, fragments in zip(groups, share["param_slice_mappings"], strict=True):
                for name, place in fragments.items():
                    piece = flat[place.start : place.start + place.numel]
                    self._pieces.setdefault(name, []).append(piece)
        # A partition's padding is cut off when it is saved, a fragment's end never is.
        for name, pieces in self._pieces.items():
            if sum(piece.numel() for piece in pieces) != math.prod(self._shapes[name]):
                raise ValueError(f"fragments of {name} do not make up its shape {self._shapes[name]}")

    def _collect_equal_pieces(self, shares: list[Mapping[str, Any]], shapes: list[Mapping[str, Any]]) -> None:
        flats = [share["fp32_flat_groups"] for share in shares]
        first = 0
        for group in shapes:
            for name, shape in group.items():
                self._shapes[name] = tuple(shape)
                size = -(-math.prod(shape) // len(shares))
                parts = [part for groups in flats for part in _cut(groups, first, size)]
                self._pieces[name] = parts
                first += size


def _optimizer_shares(folder: Path, rank: int, count: int) -> list[Mapping[str, Any]]:
    """Return ``optimizer_state_dict`` of every data-parallel rank."""
    shares = []
    for share in range(count):
        plain = folder / f"zero_pp_rank_{share}_mp_rank_{rank:02d}_optim_states.pt"
        marked = plain.with_name(f"bf16_{plain.name}")
        shares.append(load_file(marked if marked.is_file() else plain)["optimizer_state_dict"])
    return shares


def _cut(groups: list[Tensor], first: int, size: int) -> list[Tensor]:
    """Return the pieces of `groups`, taken as one flat tensor, from `first` on, `size` values in all."""
    found, passed = [], 0
    for flat in groups:
        start, end = max(first - passed, 0), min(first + size - passed, flat.numel())
        if start < end:
            found.append(flat[start:end])
        passed += flat.numel()
    if sum(piece.numel() for piece in found) != size:
        raise ValueError(f"fp32_flat_groups end before value {first + size}")
    return found
