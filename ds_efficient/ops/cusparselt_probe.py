"""Whether cuSPARSELt runs here, and lays its compressed matrices out as this package expects."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import OpBuildError
from ds_efficient.ops import cusparselt_library as lt
from ds_efficient.ops import keyed_random
from ds_efficient.ops.cusparselt_multiply import multiply
from ds_efficient.ops.cusparselt_operand import SparseOperand, with_index

OLDEST_CAPABILITY = (8, 0)
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, in the Frobenius norm
_SHAPES = ((64, 128, 1), (128, 128, 1), (256, 128, 2))  # rows, k, tiles
_TOKENS = 40
_KEY = Key(0).fold("cusparselt")
_BLOCK = (1 << 20) + 7  # numbers drawn; longer tensors repeat them
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def unavailable(device: torch.device | str) -> str | None:
    """Why the sparse product does not run on a device, or None where it does.

    The first call for a device loads the library and runs `probe`; later ones answer from memory.
    """
    place = torch.device(device)
    if place.type != "cuda":
        return f"cuSPARSELt runs on CUDA devices, not on {str(place)!r}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _unavailable(with_index(place))


@functools.cache
def _unavailable(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "cuSPARSELt runs on NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
            f"sparse tensor cores need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer"
        )
    try:
        lt.load()
    except OpBuildError as error:
        return str(error)
    return probe(device)


@torch.no_grad()
def probe(device: torch.device | str) -> str | None:
    """Check with small matrices that overwriting the value region of a compressed matrix works.

    For both dtypes, with fewer rows than columns, as many, and two tiles: the value region of a compressed
    random matrix equals the kept values row by row, and after new values (some exactly zero) are written into
    it, the product equals the dense one.

    Returns:
        What is wrong, or None.
    """
    version = lt.load().version_text
    for dtype in TOLERANCES:
        for rows, k, tiles in _SHAPES:
            try:
                wrong = _probe_one(rows, k, tiles, dtype, with_index(device))
            except RuntimeError as error:
                wrong = str(error)
            if wrong is not None:
                name = str(dtype).removeprefix("torch.")
                return (
                    f"the start-up check of cuSPARSELt {version} failed ({rows}x{k}, {tiles} tile(s), "
                    f"{name}): {wrong}"
                )
    return None


def _probe_one(rows: int, k: int, tiles: int, dtype: torch.dtype, device: torch.device) -> str | None:
    operand = SparseOperand(rows, k, dtype=dtype, device=device, tiles=tiles)
    pattern = random_pattern(rows, k, dtype=dtype, device=device)
    operand.set_pattern(pattern)
    mask = pattern != 0
    kept = pattern[mask].view(rows, k // 2)
    values = random_normal("values", (rows, k // 2), dtype=dtype, device=device)
    values.view(-1)[::7] = 0
    for first, view in operand.tile_values:
        if not torch.equal(view, kept[first : first + len(view)]):
            return "compressed values are not the kept values in row-major order"
        view.copy_(values[first : first + len(view)])
    dense = torch.zeros_like(pattern).masked_scatter(mask, values)
    x = random_normal("x", (_TOKENS, k), dtype=dtype, device=device)
    error = relative_error(multiply(operand, x), x.double() @ dense.double().t())
    if not error <= TOLERANCES[dtype]:
        return f"the product with overwritten values differs from the dense one by {error:.1e} (relative)"
    return None


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    reference = reference.double()
    return ((result.double() - reference).norm() / reference.norm()).item()


def random_normal(
    name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Normal numbers for checks and measurements, drawn by key: no zeros, and repeating after a million."""
    count = torch.Size(shape).numel()
    # The plain torch code: checks and measurements need no compiler, and the bits are the same.
    block = keyed_random.normal(
        _KEY.fold(name), min(count, _BLOCK), dtype=dtype, device=device, backend="reference"
    )
    block = torch.where(block == 0, torch.ones_like(block), block)
    return block.repeat(-(-count // len(block)))[:count].view(shape)


def random_pattern(rows: int, k: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A matrix (rows, k) with exactly two nonzero elements, at random places, in every group of four."""
    groups = rows * k // 4
    words = keyed_random.random_bits(
        _KEY.fold("pattern"), min(groups, _BLOCK), device=device, backend="reference"
    )
    lookup = torch.zeros(len(_PAIRS), 4, dtype=torch.bool)
    for row, pair in enumerate(_PAIRS):
        lookup[row, list(pair)] = True
    choice = (words.to(torch.int64) & 0xFFFFFFFF) % len(_PAIRS)
    mask = lookup.to(device)[choice].repeat(-(-groups // len(words)), 1)[:groups].view(rows, k)
    values = random_normal("weight", (rows, k), dtype=dtype, device=device)
    return torch.where(mask, values, torch.zeros_like(values))
