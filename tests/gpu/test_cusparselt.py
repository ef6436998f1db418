"""Sparse products on a GPU: layout, accuracy, tiles, streams, graphs, measurements and their file.

Error rule: the error against a float64 product is at most twice that of torch's dense product in the dtype.
"""

from __future__ import annotations

import json

import fake_cusparselt as fakes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.ops import cusparselt_cache as caches
from ds_efficient.ops import cusparselt_library as lt
from ds_efficient.ops import cusparselt_plans as plans
from ds_efficient.ops.cusparselt import SparseOperand, multiply, probe, shape_problem, tune, unavailable
from ds_efficient.ops.cusparselt_probe import random_normal, random_pattern, relative_error


def why_not() -> str:
    """Reason to skip; a failing start-up check is none."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "no sparse tensor cores"
    try:
        lt.load()
    except OpBuildError as error:
        return str(error)
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs")]
DTYPES = (torch.bfloat16, torch.float16)
DEVICE = "cuda:0"


@pytest.fixture(autouse=True)
def own_cache_file(monkeypatch, tmp_path):
    """Nothing known from other tests or runs."""
    monkeypatch.setattr(caches.cache, "_path", tmp_path / "tuning.json")
    fakes.restart(monkeypatch)
    yield
    torch.cuda.synchronize()


def make(rows: int, k: int, tiles: int = 1, dtype: torch.dtype = torch.bfloat16):
    operand = SparseOperand(rows, k, dtype=dtype, device=DEVICE, tiles=tiles)
    pattern = random_pattern(rows, k, dtype=dtype, device=DEVICE)
    operand.set_pattern(pattern)
    return operand, pattern


def inputs(tokens: int, k: int, dtype: torch.dtype = torch.bfloat16, name: str = "x") -> Tensor:
    return random_normal(name, (tokens, k), dtype=dtype, device=DEVICE)


def check(operand: SparseOperand, dense: Tensor, x: Tensor) -> None:
    y = multiply(operand, x)
    assert y.shape == (len(x), operand.rows) and y.dtype is x.dtype and y.is_contiguous()
    reference = x.double() @ dense.double().t()
    assert relative_error(y, reference) <= 2 * relative_error(F.linear(x, dense), reference)


def same(y: Tensor, expected: Tensor) -> bool:
    """Whether two products are equal up to the order of summation, element by element."""
    return bool(((y - expected).abs() <= 0.02 * expected.abs().max()).all())


def test_start_up_check_passes():
    assert probe(DEVICE) is None
    assert unavailable("cuda") is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "k"), [(16, 32), (64, 128), (1024, 1024), (768, 3072), (3072, 768), (48, 96)]
)
def test_product_is_as_exact_as_the_dense_one(rows, k, dtype):
    assert shape_problem(rows, k, dtype) is None
    operand, pattern = make(rows, k, dtype=dtype)
    for tokens in (1, 7, 100, 8192):
        x = inputs(tokens, k, dtype)
        for _ in range(3):  # default algorithm, search, algorithm found
            check(operand, pattern, x)


@pytest.mark.parametrize("tiles", [2, 4])
def test_tiles_give_the_same_product(tiles):
    operand, pattern = make(4096, 1024, tiles)
    for tokens in (7, 256):
        for _ in range(3):
            check(operand, pattern, inputs(tokens, 1024))


@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("tiles", [1, 2])
def test_token_splits_give_the_same_product(splits, tiles):
    key = caches.choice_key(512, 256, 128, torch.bfloat16, 0)
    caches.cache.put({key: caches.Tuned(tiles, splits, 1.0, 1.0)._asdict()})
    operand, pattern = make(512, 256, tiles)
    check(operand, pattern, inputs(128, 256))
    check(operand, pattern, inputs(120, 256))
    assert {shape.tokens for shape in plans._plans} == {128 // splits}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", [1, 2])
def test_overwritten_values_some_exactly_zero(dtype, tiles):
    operand, pattern = make(512, 256, tiles, dtype)
    mask = pattern != 0
    for name in ("first", "second"):
        values = random_normal(name, (512, 128), dtype=dtype, device=DEVICE)
        values[::3, ::5] = 0
        values[7] = 0
        for first, view in operand.tile_values:
            view.copy_(values[first : first + len(view)])
        dense = torch.zeros_like(pattern).masked_scatter(mask, values)
        check(operand, dense, inputs(100, 256, dtype))


def test_operand_comes_back_from_its_metadata():
    operand, pattern = make(512, 256, 2)
    assert operand.packed_metadata().numel() == 512 * 256 // 8, "the buffer is 9/16 of the dense size"
    moment = SparseOperand.from_metadata(operand.packed_metadata(), 512, 256, dtype=torch.bfloat16)
    for (_, view), (_, saved) in zip(moment.tile_values, operand.tile_values, strict=True):
        view.copy_(saved)
    check(moment, pattern, inputs(64, 256))


def test_strided_and_misaligned_inputs():
    operand, pattern = make(64, 128)
    check(operand, pattern, inputs(32, 256)[:, ::2])
    odd = inputs(1, 32 * 128 + 1)[0, 1:].view(32, 128)
    assert odd.data_ptr() % 16
    check(operand, pattern, odd)
    assert multiply(operand, inputs(16, 128)[:0]).shape == (0, 64)


def test_other_devices_and_missing_gradients_are_refused():
    operand, _ = make(64, 128)
    with pytest.raises(UserError, match="x is on cpu"):
        multiply(operand, inputs(16, 128).cpu())
    with pytest.raises(UserError, match="no gradient"):
        multiply(operand, inputs(16, 128).requires_grad_())


def test_products_run_on_the_current_stream():
    operand, _ = make(1024, 1024)
    x = inputs(256, 1024)
    for _ in range(3):
        expected = multiply(operand, x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late = x.clone()
        y = multiply(operand, late)
        event = stream.record_event()
    assert not event.query(), "the product is queued behind the sleeping kernel, not run elsewhere"
    event.synchronize()
    assert same(y, expected)


def test_two_streams_at_once_do_not_disturb_each_other():
    pairs = [(make(1024, 512)[0], inputs(512, 512)), (make(512, 2048)[0], inputs(512, 2048, name="other"))]
    expected = []
    for operand, x in pairs:
        for _ in range(3):
            y = multiply(operand, x)
        expected.append(y.clone())
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for number, (stream, (operand, x)) in enumerate(zip(streams, pairs, strict=True)):
            with torch.cuda.stream(stream):
                found[number].append(multiply(operand, x))
    torch.cuda.synchronize()
    for results, reference in zip(found, expected, strict=True):
        assert all(same(result, reference) for result in results)


def test_products_can_be_captured_in_a_cuda_graph():
    operand, _ = make(512, 256)
    x = inputs(64, 256)
    for _ in range(3):
        expected = multiply(operand, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply(operand, x)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(y, expected)


def test_operator_in_a_compiled_function():
    operand, _ = make(512, 256)
    x = inputs(64, 256)
    for _ in range(3):
        expected = multiply(operand, x)
    assert same(torch.ops.ds_efficient.slope_sparse_multiply(operand.buffer, x, 512, 256, 1), expected)
    compiled = torch.compile(lambda x: multiply(operand, x), backend="aot_eager", fullgraph=True)
    assert same(compiled(x), expected)


def test_measured_once_and_known_to_the_next_process(monkeypatch):
    state, gpu_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    searched: list[plans.PlanShape] = []
    search = plans.search

    def counting(shape, *arguments):
        searched.append(shape)
        return search(shape, *arguments)

    monkeypatch.setattr(plans, "search", counting)
    choice = tune(2048, 1024, 4096, torch.bfloat16, DEVICE)
    assert choice.backend == ("cusparselt" if choice.speedup >= 1 else "dense")
    assert 0 < choice.milliseconds < 10 and 0 < choice.dense_milliseconds < 10
    assert len(searched) >= 3
    count = len(searched)
    assert json.loads(caches.cache._path.read_text())["entries"]

    for _ in range(2):
        fakes.restart(monkeypatch)
        assert tune(2048, 1024, 4096, torch.bfloat16, "cuda") == choice
        operand, pattern = make(2048, 1024, choice.tiles)
        for _ in range(3):
            check(operand, pattern, inputs(4096, 1024))
    assert len(searched) == count, "no search where the file knows the algorithm"
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(gpu_state, torch.cuda.get_rng_state())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_is_used_and_the_current_one_kept():
    operand = SparseOperand(64, 128, dtype=torch.bfloat16, device="cuda:1")
    pattern = random_pattern(64, 128, dtype=torch.bfloat16, device="cuda:1")
    operand.set_pattern(pattern)
    x = random_normal("x", (32, 128), dtype=torch.bfloat16, device="cuda:1")
    check(operand, pattern, x)
    assert torch.cuda.current_device() == 0
