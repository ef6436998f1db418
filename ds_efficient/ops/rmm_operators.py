"""Operators ``torch.ops.ds_efficient.rmm_*``; `ds_efficient.ops.rmm` checks arguments and calls them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import rmm_reference as reference
from ds_efficient.ops.keyed_random_native import Library as KeyedLibrary
from ds_efficient.ops.registration import define_operators
from ds_efficient.ops.rmm_native import HADAMARD_LIMIT, CpuLibrary, Library, Units
from ds_efficient.ops.rmm_partition import Partition, Segment

_UNSIGNED = 2**64 - 1
_AT_ONCE = 1 << 22  # elements of S that exist at a time in batched products
_MANY = 2048  # rows of a projection from which on the fast transform on CUDA is the faster way
WAYS = ("gemm", "fused", "hadamard")


def choose_way(device: str, sketch: str, dtype: torch.dtype, segment: Segment) -> str:
    """How the compiled code projects a segment where the caller leaves it open.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        sketch, dtype, segment: what is projected.

    Returns:
        ``"gemm"`` (S of some blocks is generated and torch's batched matrix product takes it; for rows torch
        copies them), ``"fused"`` (one function does all: for rows a copy; the others only on the CPU) or
        ``"hadamard"`` (the fast transform). The measurements are in docs/internals/rmm.md.
    """
    if device == "cpu":
        if sketch == "srht":
            return "hadamard"
        return "gemm" if dtype == torch.float64 and sketch in ("gaussian", "rademacher") else "fused"
    if dtype == torch.float64:
        return "gemm"
    if sketch == "rows":
        return "fused"
    if sketch == "srht" and segment.projected >= _MANY and segment.choices(sketch) <= HADAMARD_LIMIT:
        return "hadamard"
    return "gemm"


def _check_way(way: str, device: str, sketch: str, dtype: torch.dtype, segment: Segment) -> None:
    """Refuse a way asked for by name that does not exist for these arguments."""
    on_cuda = device == "cuda"
    reason = None
    if way == "hadamard" and sketch != "srht":
        reason = 'only sketch="srht" has it'
    elif way == "hadamard" and on_cuda and segment.choices(sketch) > HADAMARD_LIMIT:
        reason = f"on CUDA blocks have at most {HADAMARD_LIMIT} rows for it, here {segment.block}"
    elif way == "fused" and on_cuda and sketch != "rows":
        reason = 'on CUDA only sketch="rows" has it'
    elif way != "gemm" and on_cuda and dtype == torch.float64:
        reason = "float64 has no such kernel on CUDA"
    if reason:
        raise UserError(f'backend="{way}" does not go with these arguments: {reason}; use "auto"')


class _Batch(NamedTuple):
    """Blocks whose part of S exists at one time."""

    units: Units
    rows: slice | None  # of x, None for all
    out: slice | None  # of the result
    made: torch.dtype  # of S as it is generated
    blocks: int
    block: int
    projected: int
    s_shape: tuple[int, int, int]  # (blocks, p, block): each block's part transposed
    s_stride: tuple[int, int, int]
    scale: float


class _Step(NamedTuple):
    """How one segment is projected: by batched products, or the way named."""

    way: str
    segment: Segment
    rows: slice | None
    out: slice | None
    chooses: bool
    batches: tuple[_Batch, ...]


@functools.lru_cache(maxsize=1024)
def _plan(
    rows: int,
    block: int,
    projected: int,
    last_projected: int,
    sketch: str,
    dtype: torch.dtype,
    on_cuda: bool,
    backend: str,
) -> tuple[int, tuple[_Step, ...]]:
    """Rows of the projection, and the steps to it. Cached: a layer asks with the same sizes in each call."""
    parts, steps = _partition(rows, block, projected, last_projected), []
    device = "cuda" if on_cuda else "cpu"
    for segment in parts.segments():
        way = backend if backend in WAYS else choose_way(device, sketch, dtype, segment)
        _check_way(way, device, sketch, dtype, segment)
        of_x = slice(segment.base_row, segment.base_row + segment.blocks * segment.block)
        of_out = slice(segment.first_out, segment.first_out + segment.blocks * segment.projected)
        whole = segment.blocks * segment.block == rows
        batches: tuple[_Batch, ...] = ()
        if way == "gemm" and sketch != "rows" and segment.block <= reference.CHUNK:
            batches = _batches(rows, sketch, dtype, segment)
        chooses = segment.choices(sketch) > 0
        steps.append(
            _Step(way, segment, None if whole else of_x, None if whole else of_out, chooses, batches)
        )
    return parts.total, tuple(steps)


def _batches(rows: int, sketch: str, dtype: torch.dtype, segment: Segment) -> tuple[_Batch, ...]:
    """The blocks of a segment, so many at a time that S stays small."""
    b, p, found = segment.block, segment.projected, []
    some, made = max(1, _AT_ONCE // (b * p)), torch.float32 if dtype == torch.float64 else dtype
    for first in range(0, segment.blocks, some):
        count = min(some, segment.blocks - first)
        row, out, whole = segment.base_row + first * b, segment.first_out + first * p, count * b == rows
        found.append(
            _Batch(
                Units.of(sketch, segment, first * b, count * b, made),
                None if whole else slice(row, row + count * b),
                None if whole else slice(out, out + count * p),
                made,
                blocks=count,
                block=b,
                projected=p,
                s_shape=(count, p, b),
                s_stride=(b * p, 1, p),
                scale=segment.scale(sketch),
            )
        )
    return tuple(found)


def project(
    x: Tensor,
    key: int,
    sketch: str,
    block: int,
    projected: int,
    last_projected: int,
    backend: str,
) -> Tensor:
    """Run `ds_efficient.ops.rmm.project`, arguments checked."""
    key &= _UNSIGNED
    on_cuda = x.is_cuda
    library = _library(x.device, on_cuda, backend)
    rows, features = x.shape
    if library is None:
        return reference.project(x, key, sketch, _partition(rows, block, projected, last_projected))
    total, steps = _plan(rows, block, projected, last_projected, sketch, x.dtype, on_cuda, backend)
    out = x.new_empty(total, features)
    if not features:
        return out
    for step in steps:
        chosen = _choose(key, sketch, step.segment, x.device) if step.chooses else None
        if step.batches:
            for batch in step.batches:
                _multiply(library, x, key, chosen, batch, out)
        else:
            source = x if step.rows is None else x[step.rows]
            target = out if step.out is None else out[step.out]
            _run(library, source, key, sketch, step, chosen, target)
    return out


def _library(device: torch.device, on_cuda: bool, backend: str) -> Library | None:
    return (Library if on_cuda else CpuLibrary).for_device(device, "native" if backend in WAYS else backend)


def _multiply(
    library: Library, x: Tensor, key: int, chosen: Tensor | None, batch: _Batch, out: Tensor
) -> None:
    """torch's products with the generated S of some blocks. Few calls: each costs a microsecond.

    Sizes are given to views one by one, which takes torch half as long as a tuple.
    """
    if batch.rows is not None:
        x, out = x[batch.rows], out[batch.out]
    s = x.new_empty_strided(batch.s_shape, batch.s_stride, dtype=batch.made)
    library.matrix(key, batch.units, chosen, s)
    if batch.made != x.dtype:
        s = s.to(x.dtype)
    blocks, rows, p = batch.blocks, batch.block, batch.projected
    out.view(blocks, p, -1).baddbmm_(s, x.view(blocks, rows, -1), beta=0, alpha=batch.scale)


def _run(
    library: Library, x: Tensor, key: int, sketch: str, step: _Step, chosen: Tensor | None, out: Tensor
) -> None:
    """What is not done by batched products."""
    if step.way == "gemm":
        if sketch == "rows":
            _gather(x, step.segment, chosen, out)
        else:
            _by_chunks(library, x, key, sketch, step.segment, chosen, out)
        return
    if x.shape[1] > 1 and (x.stride(1) != 1 or x.stride(0) < x.shape[1]):
        x = x.contiguous()
    if step.way == "hadamard":
        assert chosen is not None
        library.hadamard(x, key, step.segment, chosen, out)
    elif sketch == "rows":
        assert chosen is not None
        library.rows(x, step.segment, chosen, out)
    else:
        assert isinstance(library, CpuLibrary)
        library.apply(x, key, sketch, step.segment, chosen, out)


def _choose(key: int, sketch: str, segment: Segment, device: torch.device) -> Tensor | None:
    n = segment.choices(sketch)
    if not n:
        return None
    keyed = KeyedLibrary.for_device(device, "native")
    assert keyed is not None
    out = torch.empty(segment.blocks, segment.projected, dtype=torch.int64, device=device)
    return keyed.choice(key, segment.number, n, out)


def _made(
    library: Library, key: int, sketch: str, segment: Segment, chosen: Tensor | None, first: int, out: Tensor
) -> Tensor:
    """Unit elements in the dtype of ``out``; float64 holds float32 numbers."""
    if out.dtype == torch.float64:
        narrow = torch.empty_like(out, dtype=torch.float32)
        return out.copy_(_made(library, key, sketch, segment, chosen, first, narrow))
    return library.matrix(key, Units.of(sketch, segment, first, out.shape[0], out.dtype), chosen, out)


def _by_chunks(
    library: Library,
    x: Tensor,
    key: int,
    sketch: str,
    segment: Segment,
    chosen: Tensor | None,
    out: Tensor,
) -> None:
    """torch's products with the generated S of chunks of the rows of a long block."""
    p, scale = segment.projected, segment.scale(sketch)
    for block in range(segment.blocks):
        total: Tensor | None = None
        for start in range(0, segment.block, reference.CHUNK):
            count, first = min(reference.CHUNK, segment.block - start), block * segment.block + start
            s = _made(library, key, sketch, segment, chosen, first, x.new_empty(count, p))
            product = _wide_product(s.T, x[first : first + count])
            total = product if total is None else total.add_(product)
        assert total is not None
        torch.mul(total, scale, out=total)
        out[block * p : (block + 1) * p] = total


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 (float64 for float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8 and newer
        return torch.ops.aten.mm.dtype(a, b, torch.float32)
    return a.to(torch.float32) @ b.to(torch.float32)


def _gather(x: Tensor, segment: Segment, chosen: Tensor | None, out: Tensor) -> None:
    assert chosen is not None
    starts = torch.arange(0, x.shape[0], segment.block, device=x.device)
    torch.index_select(x, 0, (chosen + starts[:, None]).flatten(), out=out)
    out.mul_(segment.scale("rows"))


def _project_fake(
    x: Tensor,
    key: int,
    sketch: str,
    block: int,
    projected: int,
    last_projected: int,
    backend: str,
) -> Tensor:
    full = x.shape[0] // block if block else 0
    return x.new_empty(full * projected + last_projected, x.shape[1])


def matrix(
    key: int,
    sketch: str,
    rows: int,
    block: int,
    projected: int,
    last_projected: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Tensor:
    """Run `ds_efficient.ops.rmm.sketch_matrix`, arguments checked."""
    parts = _partition(rows, block, projected, last_projected)
    key &= _UNSIGNED
    if device.type == "meta":
        return torch.empty(rows, parts.total, dtype=dtype, device=device)
    library = _library(device, device.type == "cuda", backend)
    if library is None:
        return reference.matrix(key, sketch, parts, dtype, device)
    made = []
    for segment in parts.segments():
        rows, chosen = segment.blocks * segment.block, _choose(key, sketch, segment, device)
        if sketch == "rows":
            made.append(reference.units(key, sketch, segment, chosen, 0, rows, dtype, device))
            continue
        unit = torch.empty(rows, segment.projected, dtype=dtype, device=device)
        made.append(_made(library, key, sketch, segment, chosen, 0, unit))
    return reference.assemble(made, sketch, parts, dtype, device)


def _matrix_fake(
    key: int,
    sketch: str,
    rows: int,
    block: int,
    projected: int,
    last_projected: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Tensor:
    total = _partition(rows, block, projected, last_projected).total
    return torch.empty(rows, total, dtype=dtype, device=device)


def _partition(rows: int, block: int, projected: int, last_projected: int) -> Partition:
    return Partition(rows, block, projected, rows % block if block else 0, last_projected)


_CUT = "SymInt block, SymInt projected, SymInt last_projected"
LIBRARY = define_operators(
    (
        f"rmm_project(Tensor x, int key, str sketch, {_CUT}, str backend) -> Tensor",
        project,
        _project_fake,
    ),
    (
        f"rmm_matrix(int key, str sketch, SymInt rows, {_CUT}, ScalarType dtype, Device device, str backend)"
        " -> Tensor",
        matrix,
        _matrix_fake,
    ),
)
