"""Operators ``torch.ops.ds_efficient.rmm_*``; `ds_efficient.ops.rmm` checks arguments and calls them."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import rmm_reference as reference
from ds_efficient.ops.keyed_random_native import Library as KeyedLibrary
from ds_efficient.ops.rmm_native import HADAMARD_LIMIT, Library
from ds_efficient.ops.rmm_partition import Partition, Segment

_UNSIGNED = 2**64 - 1
_AT_ONCE = 1 << 22  # elements of S that exist at a time in batched products
WAYS = ("gemm", "fused", "generated", "hadamard")


def choose_way(device: str, sketch: str, dtype: torch.dtype, segment: Segment) -> str:
    """How the compiled code projects a segment where the caller leaves it open.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        sketch, dtype, segment: what is projected.

    Returns:
        ``"gemm"`` (S is generated and torch's batched matrix product takes it; for rows torch copies them),
        ``"fused"`` (one kernel makes S and the product), ``"generated"`` (S of some blocks is
        generated and this package's product takes it) or ``"hadamard"`` (the fast transform).
    """
    if device == "cpu":
        if sketch == "srht":
            return "hadamard"
        return "gemm" if dtype == torch.float64 and sketch in ("gaussian", "rademacher") else "fused"
    if sketch == "rows" and dtype != torch.float64:
        return "fused"
    if sketch == "srht" and 2048 < segment.choices(sketch) <= HADAMARD_LIMIT and dtype != torch.float64:
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
    elif way == "generated" and sketch == "rows":
        reason = 'sketch="rows" copies rows'
    elif way == "generated" and segment.block > reference.CHUNK:
        reason = f"blocks have at most {reference.CHUNK} rows for it, here {segment.block}"
    elif way != "gemm" and on_cuda and dtype == torch.float64:
        reason = "float64 has no such kernel on CUDA"
    if reason:
        raise UserError(f'backend="{way}" does not go with these arguments: {reason}; use "auto"')


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
    parts = _partition(x.shape[0], block, projected, last_projected)
    key &= _UNSIGNED
    library = Library.for_device(x.device, "native" if backend in WAYS else backend)
    if library is None:
        return reference.project(x, key, sketch, parts)
    out = x.new_empty(parts.total, x.shape[1])
    if not out.numel():
        return out
    segments = parts.segments()
    for segment in segments:
        way = backend if backend in WAYS else choose_way(x.device.type, sketch, x.dtype, segment)
        _check_way(way, x.device.type, sketch, x.dtype, segment)
        rows, target = x, out
        if len(segments) > 1:
            rows = x[segment.base_row : segment.base_row + segment.blocks * segment.block]
            target = out[segment.first_out : segment.first_out + segment.blocks * segment.projected]
        chosen = _choose(key, sketch, segment, x.device)
        if way == "gemm":
            if sketch == "rows":
                _gather(rows, segment, chosen, target)
            else:
                _by_products(library, rows, key, sketch, segment, chosen, target)
            continue
        if rows.shape[1] > 1 and (rows.stride(1) != 1 or rows.stride(0) < rows.shape[1]):
            rows = rows.contiguous()
        if way == "hadamard":
            library.hadamard(rows, key, segment, chosen, target)
        elif way == "generated":
            _by_own_products(library, rows, key, sketch, segment, chosen, target)
        else:
            library.apply(rows, key, sketch, segment, chosen, target)
    return out


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
    if out.dtype != torch.float64:
        return library.matrix(key, sketch, segment, chosen, first, out)
    narrow = torch.empty_like(out, dtype=torch.float32)
    return out.copy_(library.matrix(key, sketch, segment, chosen, first, narrow))


def _generated(
    library: Library, x: Tensor, key: int, sketch: str, segment: Segment, chosen: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """First block, number of blocks and their unit elements (rows, p), so many that S stays small."""
    some = max(1, _AT_ONCE // (segment.block * segment.projected))
    for first in range(0, segment.blocks, some):
        count = min(some, segment.blocks - first)
        s = x.new_empty(count * segment.block, segment.projected)
        yield first, count, _made(library, key, sketch, segment, chosen, first * segment.block, s)


def _by_own_products(
    library: Library,
    x: Tensor,
    key: int,
    sketch: str,
    segment: Segment,
    chosen: Tensor | None,
    out: Tensor,
) -> None:
    """This package's products with the generated S of some blocks."""
    blocks, targets = x.unflatten(0, (-1, segment.block)), out.unflatten(0, (-1, segment.projected))
    for first, count, s in _generated(library, x, key, sketch, segment, chosen):
        rows, target = (
            blocks[first : first + count].flatten(0, 1),
            targets[first : first + count].flatten(0, 1),
        )
        library.product(rows, s, sketch, replace(segment, blocks=count), target)


def _by_products(
    library: Library,
    x: Tensor,
    key: int,
    sketch: str,
    segment: Segment,
    chosen: Tensor | None,
    out: Tensor,
) -> None:
    """torch's products with the generated S of some blocks, or of chunks of the rows of a long block."""
    p, scale = segment.projected, segment.scale(sketch)
    if segment.block <= reference.CHUNK:
        blocks, targets = x.unflatten(0, (-1, segment.block)), out.unflatten(0, (-1, p))
        for first, count, s in _generated(library, x, key, sketch, segment, chosen):
            target = targets[first : first + count]
            s = s.view(count, segment.block, p).transpose(1, 2)
            torch.baddbmm(target, s, blocks[first : first + count], beta=0, alpha=scale, out=target)
        return
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
    library = Library.for_device(device, backend)
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


def _register() -> torch.library.Library:
    """Define the operators; `torch.library.custom_op` would add 50 microseconds to each call."""
    library = torch.library.Library("ds_efficient", "FRAGMENT")
    cut = "SymInt block, SymInt projected, SymInt last_projected"
    for name, schema, run, fake in (
        ("project", f"(Tensor x, int key, str sketch, {cut}, str backend) -> Tensor", project, _project_fake),
        (
            "matrix",
            f"(int key, str sketch, SymInt rows, {cut}, ScalarType dtype, Device device, str backend)"
            " -> Tensor",
            matrix,
            _matrix_fake,
        ),
    ):
        library.define(f"rmm_{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(f"rmm_{name}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ds_efficient::rmm_{name}", fake, lib=library)
    return library


LIBRARY = _register()
