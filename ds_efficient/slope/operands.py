"""The compressed operands of a sparse layer: built once, their values renewed from the compact weight.

The metadata of an operand (which positions are kept) follow its mask alone. After an optimizer step only the
value regions are written again, straight from the compact weight (`ds_efficient.ops.slope.write_operand`);
the metadata only after a new column mask.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_efficient.errors import UserError
from ds_efficient.ops import cusparselt
from ds_efficient.ops import slope as ops

logger = logging.getLogger(__name__)

_TUNED_TOKENS = 1 << 14  # the most tokens that a choice is measured with


@dataclass(frozen=True)
class LayerShape:
    """Sizes and pattern of one sparse layer (of this rank's shard).

    Attributes:
        out_features, in_features: sizes of the dense weight.
        n, m: N of every M are kept.
    """

    out_features: int
    in_features: int
    n: int
    m: int

    @property
    def kept(self) -> int:
        """Width of the compact weight: kept values of each output."""
        return self.in_features * self.n // self.m

    @property
    def fits_hardware(self) -> bool:
        """Whether every four consecutive values hold at most two kept ones, as sparse tensor cores need."""
        return (self.n, self.m) == (1, 2) or (self.m % 4 == 0 and self.n <= 2)


@dataclass
class _Built:
    """One operand, or between uses its metadata alone, and which versions it holds."""

    place: tuple[torch.device, torch.dtype]
    held: cusparselt.SparseOperand | None
    metadata: Tensor | None = None
    pattern: tuple[int, ...] | None = None
    values: tuple[int, ...] | None = None

    @property
    def operand(self) -> cusparselt.SparseOperand:
        """The operand, which is there while the layer runs."""
        assert self.held is not None
        return self.held

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        if self.held is not None:
            return self.held.nbytes
        return 0 if self.metadata is None else self.metadata.nbytes


class Operands:
    """Forward and backward operand of one layer, and the choice between sparse and dense products.

    Args:
        shape: the layer.
        backend: ``"auto"``, ``"cusparselt"`` or ``"dense"``, as in the configuration.
        name: of the layer, for messages.

    Attributes:
        managed: `weight_changed` is called after every change of the weight.
        rewritten: keep the metadata alone between products, 1/16 of the dense weight in place of 9/16, and
            write the values for each product.
        choices: what was chosen, by direction, tokens, dtype and device.
    """

    def __init__(self, shape: LayerShape, backend: str, name: str) -> None:
        self.shape = shape
        self.backend = backend
        self.name = name
        self.managed = False
        self.rewritten = False
        self.choices: dict[tuple[object, ...], str] = {}
        self._built: dict[bool, _Built] = {}
        self._weight_version = 0
        self._pattern_version = 0

    def weight_changed(self) -> None:
        """Have the values written again before the next product."""
        self._weight_version += 1

    def column_mask_changed(self) -> None:
        """Have the backward operand's metadata and values written again before the next product."""
        self._pattern_version += 1

    def clear(self) -> None:
        """Give the memory back; the next product builds anew."""
        self._built.clear()

    def nbytes(self) -> int:
        """Bytes of the operands that are held now."""
        return sum(built.nbytes for built in self._built.values())

    def uses_sparse_product(self, x: Tensor, *, transposed: bool) -> bool:
        """Choose for one product; remembered by its shape.

        Args:
            x: (tokens, features), the dense side.
            transposed: the backward product.

        Raises:
            UserError: backend ``"cusparselt"`` where it cannot run, with the reason.
        """
        key = (transposed, x.shape[0], x.dtype, x.device)
        chosen = self.choices.get(key)
        if chosen is None:
            chosen = self.choices[key] = self._choose(x, transposed)
        return chosen == "cusparselt"

    def _choose(self, x: Tensor, transposed: bool) -> str:
        if self.backend == "dense":
            return "dense"
        rows, inner = self.sizes(transposed)
        problem = self._obstacle(x, rows, inner)
        if problem is None and self.backend == "cusparselt":
            return "cusparselt"
        if self.backend == "cusparselt":
            raise UserError(
                f'slope.backend "cusparselt": {self.name or "a layer"} ({rows} x {inner}): {problem}; '
                'use "backend": "auto" or "dense"'
            )
        if problem is None:
            found = self._tune(x, rows, inner)
            problem = f"cuSPARSELt is {found.speedup:.2f} times as fast" if found.backend == "dense" else None
        if problem is not None and x.is_cuda:
            direction = "input gradient" if transposed else "forward"
            logger.info(
                "slope: %s, %s with %d tokens: dense product of the sparse weight, because %s",
                self.name or "layer",
                direction,
                x.shape[0],
                problem,
            )
        return "cusparselt" if problem is None else "dense"

    @staticmethod
    def _tune(x: Tensor, rows: int, inner: int) -> cusparselt.Choice:
        """Choose for the next power of two of tokens, so that changing lengths share a choice.

        From some number on more tokens only repeat the same work, and take memory that the run has taken.
        """
        tokens = min(1 << max(x.shape[0] - 1, 1).bit_length(), _TUNED_TOKENS)
        return cusparselt.tune(rows, inner, tokens, x.dtype, x.device)

    def _obstacle(self, x: Tensor, rows: int, inner: int) -> str | None:
        """Return why the sparse product cannot run, or None."""
        if not x.is_cuda:
            return f"the device is {x.device.type}, not cuda"
        if not x.shape[0]:
            return "there are no tokens"
        if not self.shape.fits_hardware:
            return f"pattern {self.shape.n}:{self.shape.m} keeps more than 2 of some 4 values"
        return cusparselt.shape_problem(rows, inner, x.dtype) or cusparselt.unavailable(x.device)

    def sizes(self, transposed: bool) -> tuple[int, int]:
        """Return (rows, reduction length) of an operand."""
        full = (self.shape.out_features, self.shape.in_features)
        return full[::-1] if transposed else full

    def multiply(self, x: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor | None) -> Tensor:
        """Return x times the sparse weight, transposed (forward) or not (`column_mask` given: backward).

        Args:
            x: (tokens, in), or (tokens, out) in the backward pass.
            weight: compact weight (out, in * N // M) of x's dtype.
            mask: packed forward mask.
            column_mask: packed mask of the double-pruned weight for the backward product.
        """
        transposed = column_mask is not None
        built = self._built.get(transposed)
        chosen = mask if column_mask is None else column_mask
        pattern = (self._pattern_version if transposed else 0, *_identity(chosen))
        version = (self._weight_version, *_identity(weight))
        if built is None or not self._is_current(built, x, weight, pattern, version, transposed):
            # What is built here outlives the call, and tensors of inference mode cannot be trained.
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                built = self._renewed(x, weight, chosen, pattern, transposed)
                if transposed or not _is_shared(built.operand, weight):
                    self._write_values(built.operand, weight, mask, column_mask)
                    built.values = version
                    if not transposed and self._can_share(built.operand, weight):
                        weight.data = built.operand.tile_values[0][1]
        result = cusparselt.multiply(built.operand, x)
        if self._is_transient(weight):
            if built.metadata is None:
                built.metadata = built.operand.packed_metadata()
            built.held, built.values = None, None
        return result

    def _is_transient(self, weight: Tensor) -> bool:
        """Whether operands are dropped after each product.

        Under ZeRO-3 always: the weight is whole only while the layer runs, and so are they.
        """
        return self.rewritten or hasattr(weight, "ds_id")

    def _is_current(
        self,
        built: _Built,
        x: Tensor,
        weight: Tensor,
        pattern: tuple[int, ...],
        version: tuple[int, ...],
        transposed: bool,
    ) -> bool:
        """Whether an operand can be used as it is."""
        if built.held is None or built.place != (x.device, x.dtype) or built.pattern != pattern:
            return False
        if not transposed and _is_shared(built.held, weight):
            return True
        return built.values == version and self._sees_changes(weight)

    def _renewed(
        self, x: Tensor, weight: Tensor, chosen: Tensor, pattern: tuple[int, ...], transposed: bool
    ) -> _Built:
        """Return the operand for this dtype and device, with the metadata of the mask `chosen`."""
        rows, inner = self.sizes(transposed)
        place = (x.device, x.dtype)
        built = self._built.get(transposed)
        if built is None or built.place != place:
            tiles = self._tune(x, rows, inner).tiles if self.backend == "auto" else 1
            operand = cusparselt.SparseOperand(rows, inner, dtype=x.dtype, device=x.device, tiles=tiles)
            built = self._built[transposed] = _Built(place, operand)
        elif built.held is None:
            assert built.metadata is not None
            built.held = cusparselt.SparseOperand.from_metadata(built.metadata, rows, inner, dtype=x.dtype)
        if built.pattern != pattern:
            # Setting a pattern overwrites the values, which may be the weight itself.
            kept = weight.clone() if not transposed and _is_shared(built.operand, weight) else None
            built.operand.set_pattern(
                ops.operand_pattern(chosen, self.shape.in_features, dtype=x.dtype, transposed=transposed)
            )
            if kept is not None:
                weight.copy_(kept)
            built.pattern, built.values, built.metadata = pattern, None, None
        return built

    def _can_share(self, operand: cusparselt.SparseOperand, weight: Tensor) -> bool:
        """Whether the forward operand's value region can be the weight's own memory.

        The compact weight is that region, element for element. A weight in a buffer of DeepSpeed must stay
        there; one that stands alone moves, so that it is held once and needs no copy after a step.
        """
        return (
            isinstance(weight, nn.Parameter)
            and operand.tiles == 1
            and (self.shape.n, self.shape.m) in ((1, 2), (2, 4))
            and _stands_alone(weight)
            and not self._is_transient(weight)
        )

    def _sees_changes(self, weight: Tensor) -> bool:
        """Whether a change of the weight shows: the technique tells of it, or torch's version counter.

        A weight inside a flat buffer changes with the buffer, whose counter is another one; a cast one is a
        new tensor each time, maybe at the place of the last.
        """
        followed = self.managed or _stands_alone(weight) or self._holds(weight)
        return followed and isinstance(weight, nn.Parameter)

    def _holds(self, weight: Tensor) -> bool:
        """Whether the weight lives in the forward operand."""
        built = self._built.get(False)
        return built is not None and built.held is not None and _is_shared(built.held, weight)

    def __getstate__(self) -> dict[str, object]:
        """Leave out what the next product builds anew: operands of a copy are its own."""
        return {**vars(self), "_built": {}, "choices": {}}

    def _write_values(
        self, operand: cusparselt.SparseOperand, weight: Tensor, mask: Tensor, column_mask: Tensor | None
    ) -> None:
        for first_row, values in operand.tile_values:
            ops.write_operand(
                weight.detach(),
                mask,
                values,
                self.shape.in_features,
                n=self.shape.n,
                m=self.shape.m,
                backward_mask=column_mask,
                first_row=first_row,
            )


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written to or replaced."""
    return (-1 if tensor.is_inference() else tensor._version, tensor.data_ptr())


def _stands_alone(weight: Tensor) -> bool:
    return weight.untyped_storage().nbytes() == weight.nbytes


def _is_shared(operand: cusparselt.SparseOperand, weight: Tensor) -> bool:
    return operand.tiles == 1 and weight.data_ptr() == operand.buffer.data_ptr()
