"""Which way a random sketch is projected, and what a call costs the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_efficient.errors import UserError
from ds_efficient.ops import rmm, rmm_operators


@pytest.mark.parametrize(
    ("device", "sketch", "dtype", "rows", "block_size", "way"),
    [
        ("cuda", "gaussian", torch.bfloat16, 16384, 512, "gemm"),
        ("cuda", "rademacher", torch.bfloat16, 8192, 512, "gemm"),
        ("cuda", "count", torch.bfloat16, 16384, 512, "gemm"),
        ("cuda", "rows", torch.bfloat16, 16384, 512, "fused"),
        ("cuda", "rows", torch.float64, 16384, 512, "gemm"),
        ("cuda", "srht", torch.bfloat16, 16384, 2048, "gemm"),
        ("cuda", "srht", torch.bfloat16, 16384, 0, "hadamard"),
        ("cuda", "srht", torch.bfloat16, 32768, 0, "gemm"),
        ("cuda", "srht", torch.float64, 16384, 0, "gemm"),
        ("cpu", "gaussian", torch.bfloat16, 16384, 512, "fused"),
        ("cpu", "rademacher", torch.float64, 16384, 512, "gemm"),
        ("cpu", "srht", torch.float32, 16384, 512, "hadamard"),
    ],
)
def test_ways_are_those_that_were_measured_to_be_faster(
    device: str, sketch: str, dtype: torch.dtype, rows: int, block_size: int, way: str
) -> None:
    (segment,) = rmm.partition(rows, 1 / 8, block_size=block_size).segments()
    assert rmm_operators.choose_way(device, sketch, dtype, segment) == way


@pytest.mark.parametrize(
    ("way", "sketch", "dtype", "rows", "reason"),
    [
        ("fused", "gaussian", torch.bfloat16, 4096, 'only sketch="rows"'),
        ("fused", "rows", torch.float64, 4096, "float64"),
        ("hadamard", "srht", torch.bfloat16, 16385, "at most 16384 rows.*16385"),
        ("hadamard", "count", torch.bfloat16, 4096, 'only sketch="srht"'),
    ],
)
def test_ways_without_a_kernel_on_cuda_are_refused_by_name(
    way: str, sketch: str, dtype: torch.dtype, rows: int, reason: str
) -> None:
    parts = rmm.partition(rows, 1 / 8, block_size=0)
    sizes = (rows, parts.block, parts.projected, parts.last_projected)
    with pytest.raises(UserError, match=f'backend="{way}".*{reason}'):
        rmm_operators._plan(*sizes, sketch, dtype, True, way)


class Calls(TorchDispatchMode):
    """Names of torch's operators as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sketch", ["gaussian", "rademacher", "count"])
def test_one_batch_of_blocks_takes_five_calls_of_torch(sketch: str) -> None:
    # Each costs a microsecond of the host, as much as a small layer's kernels take.
    x = torch.ones(96, 4)
    with Calls() as calls:
        rmm_operators.project(x, 1, sketch, 32, 8, 0, "gemm")
    assert calls.names == ["new_empty", "new_empty_strided", "view", "view", "baddbmm_"]
