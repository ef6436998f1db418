"""Operators ``torch.ops.ds_efficient.slope_*``; `ds_efficient.ops.slope` checks arguments and calls them."""

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import slope_reference as reference
from ds_efficient.ops.registration import define_operators
from ds_efficient.ops.slope_native import Library


def _pack_mask_fake(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], reference.mask_bytes(mask.shape[1]), dtype=torch.uint8)


def _unpack_mask_fake(packed: Tensor, columns: int) -> Tensor:
    return packed.new_empty(packed.shape[0], columns, dtype=torch.bool)


def decompress(
    values: Tensor, forward: Tensor, backward: Tensor | None, columns: int, n: int, m: int, backend: str
) -> Tensor:
    """Run `ds_efficient.ops.slope.decompress`, arguments checked."""
    library = Library.for_device(values.device, backend)
    if library is None:
        return reference.decompress(values, forward, columns, backward)
    return library.decompress(values, forward, backward, values.new_empty(values.shape[0], columns), n, m)


def _decompress_fake(
    values: Tensor, forward: Tensor, backward: Tensor | None, columns: int, n: int, m: int, backend: str
) -> Tensor:
    return values.new_empty(values.shape[0], columns)


def decompress_into(
    values: Tensor, forward: Tensor, backward: Tensor | None, out: Tensor, n: int, m: int, backend: str
) -> None:
    """The same into a given tensor."""
    library = Library.for_device(values.device, backend)
    if library is None:
        out.copy_(reference.decompress(values, forward, out.shape[1], backward))
    else:
        library.decompress(values, forward, backward, out, n, m)


def _decompress_into_fake(
    values: Tensor, forward: Tensor, backward: Tensor | None, out: Tensor, n: int, m: int, backend: str
) -> None:
    return None


def compress(dense: Tensor, forward: Tensor, n: int, m: int, backend: str) -> Tensor:
    """Run `ds_efficient.ops.slope.compress`, arguments checked."""
    library = Library.for_device(dense.device, backend)
    if library is None:
        return reference.compress(dense, forward, n, m)
    return library.compress(dense, forward, _compress_fake(dense, forward, n, m, backend), n, m)


def _compress_fake(dense: Tensor, forward: Tensor, n: int, m: int, backend: str) -> Tensor:
    return dense.new_empty(dense.shape[0], dense.shape[1] // m * n)


def _select_columns(values: Tensor, forward: Tensor, columns: int, n: int, m: int, backend: str) -> Tensor:
    library = Library.for_device(values.device, backend)
    if library is None:
        return reference.select_columns(values, forward, columns, n, m)
    return library.select(values, forward, torch.empty_like(forward), columns, n, m)


def _select_columns_fake(
    values: Tensor, forward: Tensor, columns: int, n: int, m: int, backend: str
) -> Tensor:
    return torch.empty_like(forward)


def write_operand(
    values: Tensor,
    forward: Tensor,
    backward: Tensor | None,
    out: Tensor,
    columns: int,
    n: int,
    m: int,
    first_row: int,
    backend: str,
) -> None:
    """Run `ds_efficient.ops.slope.write_operand`, arguments checked."""
    library = Library.for_device(values.device, backend)
    if library is None:
        out.copy_(reference.operand(values, forward, columns, backward, first_row, out.shape[0]))
    else:
        library.operand(values, forward, backward, out, columns, n, m, first_row)


def _write_operand_fake(
    values: Tensor,
    forward: Tensor,
    backward: Tensor | None,
    out: Tensor,
    columns: int,
    n: int,
    m: int,
    first_row: int,
    backend: str,
) -> None:
    return None


def _operand_pattern(
    mask: Tensor, columns: int, dtype: torch.dtype, transposed: bool, backend: str
) -> Tensor:
    if reference.crowded(mask, transposed):
        raise UserError(
            f"mask keeps more than two positions in a group of 4 of a {'column' if transposed else 'row'}; "
            "a 2:4 operand holds two"
        )
    library = Library.for_device(mask.device, backend)
    if library is None:
        return reference.operand_pattern(mask, columns, dtype, transposed)
    out = _operand_pattern_fake(mask, columns, dtype, transposed, backend)
    return library.pattern(mask, out, columns, transposed)


def _operand_pattern_fake(
    mask: Tensor, columns: int, dtype: torch.dtype, transposed: bool, backend: str
) -> Tensor:
    shape = (columns, mask.shape[0]) if transposed else (mask.shape[0], columns)
    return mask.new_empty(shape, dtype=dtype)


_MASKS, _PATTERN = "Tensor forward_mask, Tensor? backward_mask", "int n, int m"
LIBRARY = define_operators(
    ("slope_pack_mask(Tensor mask) -> Tensor", reference.pack_mask, _pack_mask_fake),
    ("slope_unpack_mask(Tensor packed, SymInt columns) -> Tensor", reference.unpack_mask, _unpack_mask_fake),
    (
        f"slope_decompress(Tensor values, {_MASKS}, SymInt in_features, {_PATTERN}, str backend) -> Tensor",
        decompress,
        _decompress_fake,
    ),
    (
        f"slope_decompress_into(Tensor values, {_MASKS}, Tensor(a!) out, {_PATTERN}, str backend) -> ()",
        decompress_into,
        _decompress_into_fake,
    ),
    (
        f"slope_compress(Tensor dense, Tensor forward_mask, {_PATTERN}, str backend) -> Tensor",
        compress,
        _compress_fake,
    ),
    (
        f"slope_select_columns(Tensor values, Tensor forward_mask, SymInt in_features, {_PATTERN}, "
        "str backend) -> Tensor",
        _select_columns,
        _select_columns_fake,
    ),
    (
        f"slope_write_operand(Tensor values, {_MASKS}, Tensor(a!) out, SymInt in_features, {_PATTERN}, "
        "SymInt first_row, str backend) -> ()",
        write_operand,
        _write_operand_fake,
    ),
    (
        "slope_operand_pattern(Tensor mask, SymInt in_features, ScalarType dtype, bool transposed, "
        "str backend) -> Tensor",
        _operand_pattern,
        _operand_pattern_fake,
    ),
)
