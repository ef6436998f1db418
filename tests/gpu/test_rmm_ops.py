"""Random sketches on a GPU: S has the bits of plain torch on the CPU, products are as exact as torch's own.

``-k small`` selects a subset that is quick under compute-sanitizer: few tests, compared on the CPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.ops import keyed_random, rmm
from ds_efficient.ops import rmm_reference as reference
from ds_efficient.ops.rmm_partition import SKETCHES, Partition, Segment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTEGER = {2: torch.int16, 4: torch.int32}
KEY = Key(11).fold("rmm")
DEVICE = torch.device("cuda")


def draw(rows: int, features: int, dtype: torch.dtype, gap: int = 0, offset: int = 0) -> Tensor:
    """Normal numbers on the GPU; ``gap`` elements between the rows and ``offset`` before them are NaN."""
    stride = features + gap
    buffer = torch.full((offset + rows * stride + 64,), math.nan, dtype=dtype, device=DEVICE)
    x = torch.as_strided(buffer, (rows, features), (stride, 1), offset)
    return x.copy_(keyed_random.normal(KEY.fold("x"), (rows, features), device=DEVICE))


def units(sketch: str, segment: Segment, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Unit elements of S of a whole segment by the definition, computed on the device."""
    chosen = reference.chosen(KEY.value, sketch, segment, device)
    rows = segment.blocks * segment.block
    return reference.units(KEY.value, sketch, segment, chosen, 0, rows, dtype, device)


def check(made: Tensor, x: Tensor, sketch: str, segment: Segment) -> None:
    """Error against double precision at most twice that of torch's batched product and scaling in this dtype.

    The floor is what sums in float32 and one rounding may lose: torch is exact by chance where there are few
    rows.
    """
    if x.numel() < 1 << 16:
        made, x = made.cpu(), x.cpu()
    s = units(sketch, segment, x.dtype, x.device).view(segment.blocks, segment.block, -1).transpose(1, 2)
    blocks, scale = x.contiguous().view(segment.blocks, segment.block, -1), segment.scale(sketch)
    expected = (scale * (s.double() @ blocks.double())).flatten(0, 1)
    most = (scale * (s.double().abs() @ blocks.double().abs())).flatten(0, 1)
    plain = ((s @ blocks) * scale).flatten(0, 1)
    floor = 2.0**-22 * most.max() + torch.finfo(x.dtype).eps / 2 * expected.abs().max()
    error, allowed = (made.double() - expected).abs().max(), 2 * (plain.double() - expected).abs().max()
    assert made.shape == expected.shape and error <= max(allowed, floor), (float(error), float(allowed))


def check_project(
    rows: int, features: int, sketch: str, dtype: torch.dtype, way: str, parts: Partition, **layout: int
) -> None:
    x = draw(rows, features, dtype, **layout)
    made = rmm.project(x, KEY, sketch, parts, backend=way)
    assert torch.equal(made, rmm.project(x, KEY, sketch, parts, backend=way))
    for segment in parts.segments():
        first, last = segment.first_out, segment.first_out + segment.blocks * segment.projected
        part = x[segment.base_row : segment.base_row + segment.blocks * segment.block]
        check(made[first:last], part, sketch, segment)


def ways(sketch: str) -> tuple[str, ...]:
    return {"rows": ("gemm", "fused"), "srht": ("gemm", "hadamard")}.get(sketch, ("gemm",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sketch", SKETCHES)
def test_small_odd_shapes(sketch, dtype):
    for rows, block, ratio, features in ((40, 16, 0.5, 1), (77, 24, 0.4, 33), (200, 96, 0.7, 130)):
        parts = rmm.partition(rows, ratio, block_size=block)
        for way in ways(sketch):
            check_project(rows, features, sketch, dtype, way, parts)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_small_views_at_odd_addresses(sketch):
    parts = rmm.partition(100, 0.3, block_size=48)
    for gap, offset, dtype in ((8, 8, torch.bfloat16), (1, 0, torch.float32), (3, 2, torch.bfloat16)):
        for way in ways(sketch):
            check_project(100, 72, sketch, dtype, way, parts, gap=gap, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sketch", ("gaussian", "rademacher", "srht", "count"))
def test_small_generated_sketches_have_the_bits_of_the_cpu(sketch, dtype):
    for rows, block, ratio in ((77, 24, 0.4), (300, 0, 0.5), (1300, 512, 0.125)):
        parts = rmm.partition(rows, ratio, block_size=block)
        made = rmm.sketch_matrix(KEY, sketch, parts, dtype=dtype, device="cuda").cpu()
        expected = rmm.sketch_matrix(KEY, sketch, parts, dtype=dtype, backend="reference")
        assert torch.equal(made.view(INTEGER[dtype.itemsize]), expected.view(INTEGER[dtype.itemsize]))


def test_small_empty_matrices_give_empty_results():
    for sketch in SKETCHES:
        x = draw(64, 0, torch.bfloat16)
        parts = rmm.partition(64, 0.25, block_size=32)
        for way in ways(sketch):
            assert rmm.project(x, KEY, sketch, parts, backend=way).shape == (16, 0)


@pytest.mark.parametrize("ratio", (1 / 16, 1 / 8, 1 / 4, 1 / 2))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sketch", SKETCHES)
def test_blocks_of_512_rows_with_a_ragged_end(sketch, dtype, ratio):
    parts = rmm.partition(4096 + 100, ratio, block_size=512)
    for way in ways(sketch):
        check_project(4096 + 100, 1032, sketch, dtype, way, parts)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_one_block_of_all_rows(sketch):
    for rows in (1000, 5000):
        parts = rmm.partition(rows, 1 / 8, block_size=0)
        for way in ways(sketch):
            check_project(rows, 136, sketch, torch.bfloat16, way, parts)


@pytest.mark.parametrize("rows", (64, 1024, 2048, 4096, 8192, 16384))
@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_transforms_of_every_length(rows, dtype):
    parts = rmm.partition(2 * rows, 1 / 8, block_size=rows)
    check_project(2 * rows, 37, "srht", dtype, "hadamard", parts)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_any_stream_and_a_cuda_graph_give_the_same(sketch):
    x, parts = draw(1024, 512, torch.bfloat16), rmm.partition(1024, 1 / 8)
    expected = rmm.project(x, KEY, sketch, parts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(rmm.project(x, KEY, sketch, parts), expected)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rmm.project(x, KEY, sketch, parts)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)  # a library may sum in another order while it is captured


@pytest.mark.parametrize("sketch", ("rademacher", "count", "rows"))
def test_more_than_two_to_the_31_elements(sketch):
    rows, features = 1 << 16, (1 << 15) + 64
    if torch.cuda.mem_get_info()[0] < 3 * rows * features:
        pytest.skip("needs 7 GB of free GPU memory")
    x = draw(512, features, torch.bfloat16).repeat(rows // 512, 1)
    parts = rmm.partition(rows, 1 / 64)
    made = rmm.project(x, KEY, sketch, parts)
    tail = Segment(rows - 512, 1, 512, 8, 127, 0, rows - 512, 8)
    check(made[-8:], x[-512:], sketch, tail)


def test_ways_without_a_kernel_are_refused():
    x, parts = draw(64, 8, torch.bfloat16), rmm.partition(64, 0.25, block_size=32)
    with pytest.raises(UserError, match=r'"fused".*only sketch="rows"'):
        rmm.project(x, KEY, "gaussian", parts, backend="fused")
    with pytest.raises(UserError, match=r'"fused".*float64'):
        rmm.project(x.double(), KEY, "rows", parts, backend="fused")
    with pytest.raises(UserError, match=r'"hadamard".*16384'):
        whole = rmm.partition(16385, 1 / 8, block_size=0)
        rmm.project(draw(16385, 1, torch.bfloat16), KEY, "srht", whole, backend="hadamard")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_is_used_and_the_current_one_kept():
    x, parts = draw(1024, 64, torch.bfloat16), rmm.partition(1024, 1 / 8)
    made = rmm.project(x.to("cuda:1"), KEY, "rademacher", parts)
    assert made.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(made.to("cuda:0"), rmm.project(x, KEY, "rademacher", parts))
