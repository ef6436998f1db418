"""N:M sparse matrices on a GPU: the same bits as plain torch on the CPU, on any stream, shape and alignment.

``-k small`` selects a subset that is quick under compute-sanitizer.
"""

from __future__ import annotations

import math

import pytest
import torch

from ds_efficient.core.keys import Key
from ds_efficient.ops import keyed_random, slope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PATTERNS = ((1, 2), (2, 4), (1, 4), (2, 8), (4, 8), (2, 16), (3, 32), (1, 32))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KEY = Key(7).fold("slope")


def draw(
    rows: int, columns: int, n: int, m: int, dtype: torch.dtype, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and packed mask on the CPU; the values start ``offset`` elements into their memory."""
    groups = rows * columns // m
    order = keyed_random.uniform(KEY.fold("mask"), (groups, m)).argsort(dim=1)
    mask = torch.zeros(groups, m, dtype=torch.bool).scatter_(1, order[:, :n], True).view(rows, columns)
    values = keyed_random.normal(KEY.fold("values"), rows * (columns // m) * n + offset).to(dtype)
    return values[offset:].view(rows, columns // m * n), slope.pack_mask(mask)


def to_gpu(x: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """A copy that starts ``offset`` elements into its memory."""
    buffer = torch.empty(x.numel() + offset, dtype=x.dtype, device="cuda")
    return buffer[offset:].view(x.shape).copy_(x)


def empty(like: torch.Tensor, shape: tuple[int, int], offset: int) -> torch.Tensor:
    return like.new_full((math.prod(shape) + offset,), 3)[offset:].view(shape)


def everything(
    values: torch.Tensor, mask: torch.Tensor, columns: int, n: int, m: int, offset: int, backend: str
) -> dict[str, torch.Tensor]:
    """The results of all functions that fit; what is written in place starts at ``offset``."""
    rows, pattern = values.shape[0], {"n": n, "m": m}
    results = {
        "decompress": slope.decompress(values, mask, columns, **pattern, backend=backend),
        "into": slope.decompress(
            values, mask, columns, **pattern, out=empty(values, (rows, columns), offset), backend=backend
        ),
    }
    other = empty(values, (rows, columns), offset).copy_(results["decompress"] + 1)
    results["compress"] = slope.compress(other, mask, **pattern, backend=backend)
    if rows % m:
        return results
    chosen = slope.select_columns(values, mask, columns, **pattern, backend=backend)
    results["select"] = chosen
    results["twice"] = slope.decompress(
        values, mask, columns, **pattern, backward_mask=chosen, backend=backend
    )
    if not slope.fits_operand(n, m) or values.element_size() == 8:
        return results
    for name, kept, length, width in (("forward", None, rows, columns), ("backward", chosen, columns, rows)):
        if width % 4:
            continue
        for first in (0, length // 3):
            out = empty(values, (length - first, width // 2), offset)
            slope.write_operand(
                values, mask, out, columns, **pattern, backward_mask=kept, first_row=first, backend=backend
            )
            results[f"{name} from {first}"] = out
        results[f"{name} pattern"] = slope.operand_pattern(
            mask if kept is None else kept, columns, dtype=values.dtype, transposed=kept is not None,
            backend=backend,
        )  # fmt: skip
    return results


def check(rows: int, columns: int, n: int, m: int, dtype: torch.dtype, offset: int = 0) -> None:
    values, mask = draw(rows, columns, n, m, dtype, offset)
    ours = everything(to_gpu(values, offset), to_gpu(mask), columns, n, m, offset, "native")
    expected = everything(values, mask, columns, n, m, offset, "reference")
    assert ours.keys() == expected.keys()
    for name, cpu in expected.items():
        view = INTEGER[cpu.element_size()]
        assert ours[name].is_cuda and ours[name].dtype == cpu.dtype
        assert torch.equal(ours[name].cpu().view(view), cpu.view(view)), (name, rows, columns, n, m, dtype)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_odd_shapes_equal_the_reference(n, m, dtype):
    for rows, columns in ((1, m), (3, 5 * m), (m, 3 * m), (4 * m, 32), (4 * m, 33 * m)):
        check(rows, columns, n, m, dtype)


@pytest.mark.parametrize("offset", (1, 3, 8))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_small_matrices_at_odd_addresses_equal_the_reference(dtype, offset):
    for n, m in ((2, 4), (1, 2), (2, 8)):
        check(64, 128, n, m, dtype, offset)
        check(136, 168, n, m, dtype, offset)


def test_small_empty_matrices_give_empty_results():
    for rows, columns in ((0, 32), (4, 0), (0, 0)):
        check(rows, columns, 2, 4, torch.bfloat16)


def test_small_ties_zeros_and_nan_are_ordered_as_in_the_reference():
    few = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), float("nan"), -float("nan")])
    for dtype in DTYPES:
        values, mask = draw(64, 96, 4, 8, dtype)
        index = keyed_random.random_bits(KEY.fold("few"), values.shape).to(torch.int64) & 7
        values = few.to(dtype)[index]
        ours = slope.select_columns(values.cuda(), mask.cuda(), 96, n=4, m=8)
        assert torch.equal(ours.cpu(), slope.select_columns(values, mask, 96, n=4, m=8, backend="reference"))


@pytest.mark.parametrize(
    ("rows", "columns", "n", "m", "dtype"),
    [
        (1024, 1024, 2, 4, torch.bfloat16),
        (4096, 4096, 2, 4, torch.bfloat16),
        (1000, 2056, 2, 4, torch.float16),
        (2064, 1040, 2, 8, torch.bfloat16),
        (1036, 1028, 1, 4, torch.float32),
        (1024, 2080, 1, 2, torch.float32),
        (992, 2080, 2, 32, torch.bfloat16),
        (1024, 1024, 16, 32, torch.bfloat16),
    ],
)
def test_large_matrices_equal_the_reference(rows, columns, n, m, dtype):
    check(rows, columns, n, m, dtype)


def test_reference_on_the_gpu_gives_the_same_bits():
    values, mask = draw(96, 160, 2, 8, torch.bfloat16)
    ours = everything(values.cuda(), mask.cuda(), 160, 2, 8, 0, "reference")
    for name, cpu in everything(values, mask, 160, 2, 8, 0, "reference").items():
        assert torch.equal(ours[name].cpu(), cpu), name


def test_kernels_run_on_the_current_stream_and_can_be_captured():
    values, mask = draw(256, 512, 2, 4, torch.bfloat16)
    expected = everything(values, mask, 512, 2, 4, 0, "reference")
    gpu_values, gpu_mask, stream = values.cuda(), mask.cuda(), torch.cuda.Stream()
    late, operands = torch.zeros_like(gpu_values), [torch.empty(256, 256), torch.empty(512, 128)]
    operands = [x.to(values).cuda() for x in operands]

    def refresh() -> torch.Tensor:
        chosen = slope.select_columns(late, gpu_mask, 512, n=2, m=4)
        slope.write_operand(late, gpu_mask, operands[0], 512, n=2, m=4)
        slope.write_operand(late, gpu_mask, operands[1], 512, n=2, m=4, backward_mask=chosen)
        return slope.compress(
            slope.decompress(late, gpu_mask, 512, n=2, m=4, backward_mask=chosen), gpu_mask, n=2, m=4
        )

    def same() -> bool:
        return all(
            torch.equal(ours.cpu(), expected[f"{name} from 0"])
            for ours, name in zip(operands, ("forward", "backward"), strict=True)
        )

    refresh()  # builds and loads
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late.copy_(gpu_values)
        refresh()
        event = stream.record_event()
    assert not event.query(), "the kernels are queued behind the sleeping one, not run elsewhere"
    event.synchronize()
    assert same()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        refresh()
    for operand in operands:
        operand.zero_()
    graph.replay()
    assert same()


def test_more_than_two_to_the_31_elements():
    rows, columns = 1 << 16, (1 << 15) + 64
    if torch.cuda.mem_get_info()[0] < 12 * rows * columns // 2:
        pytest.skip("needs 13 GB of free GPU memory")
    values, mask = draw(64, columns, 2, 4, torch.bfloat16)
    values, mask = values.cuda().repeat(rows // 64, 1), mask.cuda().repeat(rows // 64, 1)
    dense = slope.decompress(values, mask, columns, n=2, m=4)
    assert torch.equal(dense[-64:], dense[:64]) and torch.equal(slope.compress(dense, mask, n=2, m=4), values)
    del dense
    chosen = slope.select_columns(values, mask, columns, n=2, m=4)
    assert torch.equal(chosen[-64:], chosen[:64])
    out = torch.empty(columns, rows // 2, dtype=values.dtype, device="cuda")
    slope.write_operand(values, mask, out, columns, n=2, m=4, backward_mask=chosen)
    assert torch.equal(out[:, -32:], out[:, :32])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_is_used_and_the_current_one_kept():
    values, mask = draw(64, 128, 2, 4, torch.bfloat16)
    dense = slope.decompress(values.to("cuda:1"), mask.to("cuda:1"), 128, n=2, m=4)
    assert dense.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(dense.cpu(), slope.decompress(values, mask, 128, n=2, m=4))
