"""2:4 sparse operands in cuSPARSELt's compressed form.

The compressed form of S (rows, k) is its kept values, (rows, k/2) row-major, followed by metadata with the
positions: 9/16 of the dense bytes. Compressing is slow (27 times its bandwidth floor on an H100), so it is
done once for each pattern, and for new values of the same pattern only the value region is overwritten. That
this is the layout is checked at start-up (`ds_efficient.ops.cusparselt_probe`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.ops import cusparselt_library as lt
from ds_efficient.ops import cusparselt_plans as plans
from ds_efficient.ops.cusparselt_plans import PlanShape

ROW_MULTIPLE, K_MULTIPLE = 16, 32
_TILE_ALIGNMENT = 256


def shape_problem(rows: int, k: int, dtype: torch.dtype, tiles: int = 1) -> str | None:
    """Why a sparse matrix (rows, k) cannot be an operand, or None where it can.

    The sparse tensor cores take 16 rows of 32 columns at a time (16-bit elements), and the library refuses
    anything else.
    """
    if dtype not in lt.DATA_TYPES:
        return f"dtype {dtype} is not supported by the sparse product; allowed: torch.bfloat16, torch.float16"
    if k < K_MULTIPLE or k % K_MULTIPLE:
        return f"k={k} is not a multiple of {K_MULTIPLE}, the width of a sparse tensor-core operation"
    if tiles < 1 or rows % tiles:
        return f"rows={rows} cannot be split into tiles={tiles} equal tiles"
    if rows < tiles or rows // tiles % ROW_MULTIPLE:
        return (
            f"rows={rows}{f' / tiles={tiles}' if tiles > 1 else ''} is not a multiple of {ROW_MULTIPLE}, the "
            "height of a sparse tensor-core operation"
        )
    return None


class Layout:
    """Where the parts of an operand lie. Use `find_layout`.

    Attributes:
        tile_rows: rows of each tile.
        values_bytes, metadata_bytes: sizes of a tile's regions; values first.
        scratch_bytes: what compressing a tile needs besides.
        stride: bytes from one tile to the next.
        nbytes: of the whole operand.
        products: how each number of tokens is multiplied; filled by `cusparselt_multiply`.
    """

    def __init__(self, rows: int, k: int, dtype: torch.dtype, device: torch.device, tiles: int) -> None:
        self.rows, self.k, self.dtype, self.device, self.tiles = rows, k, dtype, device, tiles
        self.index = device.index or 0
        self.tile_rows = rows // tiles
        self.values_bytes = self.tile_rows * k  # k/2 elements of 2 bytes
        library = lt.load()
        compressed, scratch = ctypes.c_size_t(0), ctypes.c_size_t(0)
        with on_device(self.index), self.descriptor() as (handle, descriptor):
            library.call(
                "cusparseLtSpMMACompressedSize2", self.tile_shape(0).text, handle, descriptor,
                ctypes.addressof(compressed), ctypes.addressof(scratch),
            )  # fmt: skip
        self.metadata_bytes, self.scratch_bytes = compressed.value - self.values_bytes, scratch.value
        if self.metadata_bytes <= 0:
            raise OpBuildError(
                f"cuSPARSELt {library.version_text} compresses a {self.tile_rows}x{k} matrix to "
                f"{compressed.value} bytes, no more than its {self.values_bytes} bytes of values: this "
                f"layout is not known here; {lt.remedy()}"
            )
        self.stride = -(-compressed.value // _TILE_ALIGNMENT) * _TILE_ALIGNMENT
        self.nbytes = tiles * self.stride
        self.products: dict[int, Any] = {}

    def tile_shape(self, tokens: int) -> PlanShape:
        """What the plan of one tile is made for."""
        return PlanShape(self.index, self.dtype, self.tile_rows, self.k, self.rows, tokens)

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[tuple[int, int]]:
        """The addresses of the library's handle and of a tile's descriptor."""
        library = lt.load()
        handle = library.handle(self.index)
        descriptor = plans.sparse_descriptor(library, handle, self.tile_shape(0))
        try:
            yield handle, descriptor.address
        finally:
            library.call("cusparseLtMatDescriptorDestroy", "a tile", descriptor.address)


@functools.cache
def find_layout(rows: int, k: int, dtype: torch.dtype, device: torch.device, tiles: int) -> Layout:
    """The layout of an operand, one object for each set of arguments.

    Args:
        rows, k: shape of the sparse matrix.
        dtype: float16 or bfloat16.
        device: with index.
        tiles: equal parts of the rows.

    Raises:
        UserError: the shape or dtype is not possible; says why.
        OpBuildError: the library is missing or not supported.
    """
    problem = shape_problem(rows, k, dtype, tiles)
    if problem is not None:
        raise UserError(f'{problem}; use "backend": "dense" for this layer')
    return Layout(rows, k, dtype, device, tiles)


def with_index(device: torch.device | str) -> torch.device:
    """The device with its index."""
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


_get_device = getattr(torch._C, "_cuda_getDevice", None)


def is_current(index: int) -> bool:
    """Whether a CUDA device is the current one; False where this torch cannot say it quickly."""
    return _get_device is not None and _get_device() == index


def on_device(index: int) -> contextlib.AbstractContextManager[object]:
    """Context in which a CUDA device is the current one; costs next to nothing where it is already."""
    return contextlib.nullcontext() if is_current(index) else lt.device_guard(index)


class SparseOperand:
    """The left matrix S (rows, k) of a product x S^T, 2:4 sparse.

    Give it a pattern with `set_pattern` or `from_metadata`; then overwrite `tile_values` whenever the values
    change. Kept values may be exactly zero.

    To hold only the metadata between uses (1/16 of the dense bytes), keep `packed_metadata` and build the
    operand for a moment with `from_metadata`, which copies the metadata and leaves the values undefined.

    Args:
        rows, k: shape of S; rows / tiles a multiple of 16, k of 32.
        dtype: float16 or bfloat16.
        device: a CUDA device.
        tiles: equal parts of the rows, each compressed by itself and multiplied by a call of its own.

    Raises:
        UserError: the shape or dtype is not possible.
        OpBuildError: the library is missing or not supported.

    Attributes:
        buffer: uint8, the values and the metadata of each tile.
        rows, k, tiles, dtype, device, nbytes: as given or implied.
    """

    def __init__(
        self, rows: int, k: int, *, dtype: torch.dtype, device: torch.device | str, tiles: int = 1
    ) -> None:
        self.layout = find_layout(rows, k, dtype, with_index(device), tiles)
        self.rows, self.k, self.tiles, self.dtype = rows, k, tiles, dtype
        self.device, self.nbytes = self.layout.device, self.layout.nbytes
        self.buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        self.has_pattern = False

    @property
    def tile_values(self) -> list[tuple[int, Tensor]]:
        """First row and values, (rows / tiles, k / 2) of `dtype`, of each tile: views to write into.

        Each row holds the kept values of a row of S in ascending column order.
        """
        layout = self.layout
        return [
            (
                tile * layout.tile_rows,
                self.buffer[start : start + layout.values_bytes].view(self.dtype).view(layout.tile_rows, -1),
            )
            for tile, start in enumerate(range(0, self.nbytes, layout.stride))
        ]

    def metadata(self) -> list[Tensor]:
        """The metadata of each tile: uint8 views."""
        first, size = self.layout.values_bytes, self.layout.metadata_bytes
        return [
            self.buffer[start + first : start + first + size]
            for start in range(0, self.nbytes, self.layout.stride)
        ]

    def packed_metadata(self) -> Tensor:
        """A copy of the metadata, (tiles, bytes of a tile) uint8, to keep instead of the operand."""
        return torch.stack(self.metadata())

    @classmethod
    def from_metadata(
        cls, metadata: Tensor | Sequence[Tensor], rows: int, k: int, *, dtype: torch.dtype
    ) -> SparseOperand:
        """An operand with this metadata and undefined values.

        Args:
            metadata: what `packed_metadata` or `metadata` of an operand of the same shape and dtype gave; its
                device and number of tiles are taken over.
            rows, k, dtype: as of that operand.

        Raises:
            UserError: the sizes do not fit.
        """
        operand = cls(rows, k, dtype=dtype, device=metadata[0].device, tiles=len(metadata))
        for target, source in zip(operand.metadata(), metadata, strict=True):
            if source.shape != target.shape or source.dtype != torch.uint8:
                raise UserError(
                    f"metadata of shape {tuple(source.shape)}, {source.dtype}, does not fit a {rows}x{k} "
                    f"matrix in {operand.tiles} tile(s); expected {tuple(target.shape)}, torch.uint8"
                )
            target.copy_(source)
        operand.has_pattern = True
        return operand

    @torch.no_grad()
    def set_pattern(self, pattern: Tensor) -> None:
        """Take the positions of the nonzero elements, and the values with them. Waits for the GPU.

        Args:
            pattern: (rows, k) of `dtype` on `device`, exactly two nonzero elements in each aligned group of
                four of a row. With fewer the library would choose positions of its own.

        Raises:
            UserError: it is something else.
        """
        self._check_pattern(pattern)
        layout, library = self.layout, lt.load()
        dense = pattern.contiguous()
        if dense.data_ptr() % plans.ALIGNMENT:
            dense = dense.clone()
        scratch = torch.empty(max(layout.scratch_bytes, 1), dtype=torch.uint8, device=self.device)
        step = layout.tile_rows * self.k * dense.element_size()
        with on_device(layout.index), layout.descriptor() as (handle, descriptor):
            stream = plans.current_stream(layout.index)
            for tile in range(self.tiles):
                library.call(
                    "cusparseLtSpMMACompress2", layout.tile_shape(0).text, handle, descriptor, 1,
                    lt.NON_TRANSPOSE, dense.data_ptr() + tile * step,
                    self.buffer.data_ptr() + tile * layout.stride, scratch.data_ptr(), stream,
                )  # fmt: skip
        self.has_pattern = True

    def _check_pattern(self, pattern: Tensor) -> None:
        if pattern.shape != (self.rows, self.k) or pattern.dtype != self.dtype:
            raise UserError(
                f"pattern of shape {tuple(pattern.shape)}, {pattern.dtype}: expected {(self.rows, self.k)}, "
                f"{self.dtype}"
            )
        if pattern.device != self.device:
            raise UserError(f"pattern is on {pattern.device}, the operand on {self.device}")
        counts = (pattern.reshape(self.rows, self.k // 4, 4) != 0).sum(dim=2, dtype=torch.uint8)
        if not bool((counts == 2).all()):
            row, group = (counts != 2).nonzero()[0].tolist()
            raise UserError(
                f"pattern has {counts[row, group].item()} nonzero elements in row {row}, columns {4 * group} "
                f"to {4 * group + 3}; exactly 2 are needed"
            )
