"""N:M sparse matrices: compact values, packed masks, the column pass, and operands of 2:4 sparse products.

A weight (out, in) keeps n of every m consecutive inputs; m divides 32 and ``in``. Formats:

- *mask*: uint8 (out, 4 * ceil(in / 32)); bit j of byte b of a row is column 8 b + j; bits beyond the last
  column are 0. A forward mask keeps exactly n of every m columns, on which the functions rely; `check_mask`
  makes sure of it.
- *values*: (out, in * n / m), the kept values of each row in ascending column order.
- *operand*: (rows, columns / 2), the values of a matrix with at most two kept in every group of 4 of a row,
  as cuSPARSELt stores them before the metadata: every group has two slots, its kept positions completed by
  the smallest others, in ascending order; completed slots hold 0.

Tensors are contiguous and on one device. Each function is also an operator,
``torch.ops.ds_efficient.slope_*`` (`ds_efficient.ops.slope_operators`), with a fake implementation, so that
FakeTensor and ``torch.compile`` see it. None is differentiable; an autograd function calls them. The formats
are defined in ``csrc/slope/slope_common.h``, the readable form is `ds_efficient.ops.slope_reference`. Source:
SLoPe, arXiv 2405.16325.

``backend`` of every function: ``"auto"`` (the CUDA kernels; on the CPU the C++ code, or the plain torch code
where no compiler is found, which is logged once), ``"native"`` (compiled code or an error), ``"reference"``
(plain torch code). All give the same bits.
"""

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import slope_operators as operators
from ds_efficient.ops import slope_reference as reference
from ds_efficient.ops.native import is_plain

BACKENDS = ("auto", "native", "reference")
GROUP_SIZES = (2, 4, 8, 16, 32)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPERAND_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

OPERATORS = operators.LIBRARY  # the operators exist as long as this object
expected_extra_zeros = reference.expected_extra_zeros
index_bits = reference.index_bits


def fits_operand(n: int, m: int) -> bool:
    """Whether n of every m is at most 2 of every 4, as the hardware's sparse products take it."""
    return (n, m) == (1, 2) or (n <= 2 and m % 4 == 0)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask to bits.

    Args:
        mask: (rows, columns) bool.

    Returns:
        (rows, 4 * ceil(columns / 32)) uint8.

    Raises:
        UserError: ``mask`` is not a bool matrix.
    """
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise UserError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; expected a bool matrix (rows, columns)"
        )
    return torch.ops.ds_efficient.slope_pack_mask(mask.contiguous())


def unpack_mask(packed: Tensor, cols: int) -> Tensor:
    """Unpack the bits of a mask; the inverse of `pack_mask`.

    Args:
        packed: (rows, 4 * ceil(cols / 32)) uint8.
        cols: columns.

    Returns:
        (rows, cols) bool.

    Raises:
        UserError: ``packed`` is not a packed mask of that many columns.
    """
    _check_mask_shape("packed", packed, packed.shape[0] if packed.dim() else 0, cols, packed.device)
    return torch.ops.ds_efficient.slope_unpack_mask(packed, cols)


def check_mask(mask: Tensor, in_features: int, *, n: int, m: int) -> None:
    """Make sure that a packed mask keeps exactly n of every m columns; for masks that come from a file.

    Args:
        mask: packed, (out, 4 * ceil(in / 32)).
        in_features: columns, a multiple of m.
        n, m: pattern.

    Raises:
        UserError: shape or dtype are wrong, a group keeps another number, or a bit beyond the columns is set.
    """
    _check_pattern(n, m, in_features)
    _check_mask_shape("mask", mask, mask.shape[0] if mask.dim() else 0, in_features, mask.device)
    full = reference.unpack_mask(mask, in_features)
    wrong = full.view(full.shape[0], in_features // m, m).sum(dim=2) != n
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        raise UserError(
            f"mask keeps {int(full[row, group * m : group * m + m].sum())} of columns {group * m} to "
            f"{group * m + m - 1} in row {row}; the pattern {n}:{m} keeps {n} in every group"
        )
    if not torch.equal(reference.pack_mask(full), mask):
        raise UserError(f"mask has bits set beyond column {in_features - 1}; they must be 0")


def decompress(
    values: Tensor,
    forward_mask: Tensor,
    in_features: int,
    *,
    n: int,
    m: int,
    backward_mask: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The dense weight with zeros: as in the forward pass, or what the column pass leaves of it.

    Args:
        values: (out, in * n / m), any dtype of 2, 4 or 8 bytes; bits are moved.
        forward_mask: packed, (out, 4 * ceil(in / 32)).
        in_features: in, a multiple of m.
        n, m: pattern, n of every m; m is 2, 4, 8, 16 or 32.
        backward_mask: packed like ``forward_mask`` and a subset of it; None for the forward pass's weight.
        out: (out, in) to write to; on the CPU fresh memory costs several times what the rest does.
        backend: see the module.

    Returns:
        (out, in) of the dtype of ``values``: ``out`` where given.

    Raises:
        UserError: a shape, dtype or device does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    _check_values(values, forward_mask, backward_mask, in_features, n, m, backend)
    if out is None:
        run = operators.decompress if is_plain(values) else torch.ops.ds_efficient.slope_decompress
        return run(values, forward_mask, backward_mask, in_features, n, m, backend)
    _check_out(out, values)
    if tuple(out.shape) != (values.shape[0], in_features):
        raise UserError(f"out has shape {tuple(out.shape)}; expected {(values.shape[0], in_features)}")
    into = operators.decompress_into if is_plain(values) else torch.ops.ds_efficient.slope_decompress_into
    into(values, forward_mask, backward_mask, out, n, m, backend)
    return out


def compress(dense: Tensor, forward_mask: Tensor, *, n: int, m: int, backend: str = "auto") -> Tensor:
    """The elements of a dense (out, in) matrix at the kept positions: the inverse of `decompress`.

    Args:
        dense: (out, in), any dtype of 2, 4 or 8 bytes, for example the weight's gradient.
        forward_mask, n, m, backend: as in `decompress`.

    Returns:
        (out, in * n / m) of the dtype of ``dense``.

    Raises:
        UserError: a shape, dtype or device does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    _check_matrix("dense", dense, backend)
    out, columns = dense.shape
    _check_pattern(n, m, columns)
    _check_mask_shape("forward_mask", forward_mask, out, columns, dense.device)
    run = operators.compress if is_plain(dense) else torch.ops.ds_efficient.slope_compress
    return run(dense, forward_mask, n, m, backend)


def select_columns(
    values: Tensor, forward_mask: Tensor, in_features: int, *, n: int, m: int, backend: str = "auto"
) -> Tensor:
    """The column pass: keep the n largest magnitudes in every group of m outputs of each column.

    Magnitudes are the bits of abs(x) read as integers: NaN counts as the largest. Of equal ones the lower
    output index is kept. A group with at most n kept values loses nothing.

    Args:
        values: (out, in * n / m), float16, bfloat16, float32 or float64; out is a multiple of m.
        forward_mask, in_features, n, m, backend: as in `decompress`.

    Returns:
        packed mask (out, 4 * ceil(in / 32)), a subset of ``forward_mask``.

    Raises:
        UserError: a shape, dtype or device does not fit.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    _check_values(values, forward_mask, None, in_features, n, m, backend)
    _check_dtype("values", values.dtype, FLOATS)
    if values.shape[0] % m:
        raise UserError(
            f"values has {values.shape[0]} rows; the column pass needs a multiple of m={m}: leave the layer "
            "dense or switch the column pass off"
        )
    return torch.ops.ds_efficient.slope_select_columns(values, forward_mask, in_features, n, m, backend)


def write_operand(
    values: Tensor,
    forward_mask: Tensor,
    out: Tensor,
    in_features: int,
    *,
    n: int,
    m: int,
    backward_mask: Tensor | None = None,
    first_row: int = 0,
    backend: str = "auto",
) -> None:
    """Write rows of the values of a 2:4 operand: of the weight, or of its twice pruned transpose.

    Args:
        values: (out_features, in * n / m), a dtype of 2 or 4 bytes.
        forward_mask, in_features, n, m, backend: as in `decompress`; a pattern that `fits_operand`.
        out: rows ``first_row ..`` of the operand, of the dtype of ``values``: (rows, in / 2) of the weight
            without a backward mask, (rows, out_features / 2) of its transpose with one. Contiguous; may be a
            view into a larger buffer. Written in place.
        backward_mask: from `select_columns`; selects the transposed operand.
        first_row: row of the operand that the first row of ``out`` is.

    Raises:
        UserError: a shape, dtype or device does not fit, or the pattern does not fit 2:4.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    _check_values(values, forward_mask, backward_mask, in_features, n, m, backend)
    if not fits_operand(n, m):
        raise UserError(
            f"pattern {n}:{m} can keep more than 2 of 4, which no 2:4 operand holds; allowed: 1:2 and n <= 2 "
            "with m a multiple of 4"
        )
    rows, columns = values.shape[0], in_features
    if backward_mask is not None:
        rows, columns = columns, rows
        if columns % max(4, m):
            raise UserError(
                f"values has {columns} rows; the transposed operand needs a multiple of {max(4, m)}"
            )
    elif columns % 4:
        raise UserError(f"in_features={columns}; a 2:4 operand needs a multiple of 4")
    _check_out(out, values)
    if values.element_size() == 8:
        raise UserError(f"values: {values.dtype} is not supported; allowed: elements of 2 or 4 bytes")
    if out.shape[1] != columns // 2 or not 0 <= first_row <= rows - out.shape[0]:
        raise UserError(
            f"out has shape {tuple(out.shape)} with first_row={first_row}; expected (rows, {columns // 2}) "
            f"with first_row >= 0 and first_row + rows <= {rows}"
        )
    run = operators.write_operand if is_plain(values) else torch.ops.ds_efficient.slope_write_operand
    run(values, forward_mask, backward_mask, out, in_features, n, m, first_row, backend)


def operand_pattern(
    mask: Tensor, in_features: int, *, dtype: torch.dtype, transposed: bool, backend: str = "auto"
) -> Tensor:
    """Ones at the slots of a 2:4 operand, from which its metadata are made; not for every step.

    Args:
        mask: packed (out, 4 * ceil(in / 32)): a forward mask, or a backward mask where transposed.
        in_features: in.
        dtype: float16, bfloat16 or float32.
        transposed: make the operand of the transposed matrix.
        backend: see the module.

    Returns:
        dense (out, in), or (in, out) where transposed: exactly two ones in every group of 4 of a row.

    Raises:
        UserError: a shape or dtype does not fit, or a group of 4 keeps more than two positions.
        OpBuildError: the compiled code is asked for and cannot be built.
    """
    _check_backend(backend)
    _check_dtype("dtype", dtype, OPERAND_DTYPES)
    _check_mask_shape("mask", mask, mask.shape[0] if mask.dim() else 0, in_features, mask.device)
    name, length = ("rows of mask", mask.shape[0]) if transposed else ("in_features", in_features)
    if length % 4:
        raise UserError(f"{name}={length}; a 2:4 operand needs a multiple of 4")
    return torch.ops.ds_efficient.slope_operand_pattern(mask, in_features, dtype, transposed, backend)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")


def _check_dtype(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype not in allowed:
        raise UserError(f"{name}: {dtype} is not supported; allowed: {', '.join(map(str, allowed))}")


def _check_pattern(n: int, m: int, columns: int) -> None:
    if m not in GROUP_SIZES or not 0 < n < m:
        allowed = ", ".join(map(str, GROUP_SIZES))
        raise UserError(f"pattern n={n}, m={m} is not known; allowed: m one of {allowed} and 0 < n < m")
    if columns < 0 or columns % m:
        raise UserError(f"in_features={columns} is not a multiple of m={m}")


def _check_matrix(name: str, matrix: Tensor, backend: str) -> None:
    _check_backend(backend)
    if matrix.dim() != 2 or not matrix.is_contiguous():
        raise UserError(f"{name} of shape {tuple(matrix.shape)} is not a contiguous matrix")
    if matrix.element_size() not in (2, 4, 8):
        raise UserError(f"{name}: {matrix.dtype} is not supported; allowed: elements of 2, 4 or 8 bytes")


def _check_out(out: Tensor, values: Tensor) -> None:
    if out.dim() != 2 or not out.is_contiguous():
        raise UserError(f"out of shape {tuple(out.shape)} is not a contiguous matrix")
    if out.dtype != values.dtype or out.device != values.device:
        raise UserError(
            f"out is {out.dtype} on {out.device}; expected {values.dtype} on {values.device}, as values"
        )


def _check_mask_shape(name: str, mask: Tensor, rows: int, columns: int, device: torch.device) -> None:
    width = reference.mask_bytes(columns)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, width) or not mask.is_contiguous():
        raise UserError(
            f"{name} is {mask.dtype} of shape {tuple(mask.shape)}; expected a contiguous packed mask: uint8 "
            f"({rows}, {width}) for {columns} columns"
        )
    if mask.device != device:
        raise UserError(f"{name} is on {mask.device}; expected {device}, as the matrix")


def _check_values(
    values: Tensor, forward: Tensor, backward: Tensor | None, columns: int, n: int, m: int, backend: str
) -> None:
    _check_matrix("values", values, backend)
    _check_pattern(n, m, columns)
    if values.shape[1] != columns // m * n:
        raise UserError(
            f"values has {values.shape[1]} columns; {n}:{m} of in_features={columns} gives {columns // m * n}"
        )
    _check_mask_shape("forward_mask", forward, values.shape[0], columns, values.device)
    if backward is not None:
        _check_mask_shape("backward_mask", backward, values.shape[0], columns, values.device)
