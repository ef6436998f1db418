"""Keyed random numbers on a GPU: the same bits as on the CPU, on any stream, at any offset and alignment."""

from __future__ import annotations

import pytest
import torch

from ds_efficient.core.keys import Key
from ds_efficient.ops import keyed_random as kr

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEYS = (0, 1, 2**64 - 1, Key(1234).fold("gpu").value)
SIZES = (0, 1, 3, 4, 5, 1023, 4096, 1_000_003)
OFFSETS = (0, 1, 2, 3, 4, 7, 2**32 - 5, 2**34 + 1, 2**62 + 3)


def same_bits(ours: torch.Tensor, cpu: torch.Tensor) -> bool:
    view = {4: torch.int32, 2: torch.int16, 8: torch.int64}[cpu.element_size()]
    assert ours.is_cuda and ours.dtype == cpu.dtype
    return ours.shape == cpu.shape and torch.equal(ours.cpu().view(view), cpu.view(view))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_cuda_equals_cpu_bit_for_bit(key, offset):
    for size in SIZES:
        assert same_bits(
            kr.random_bits(key, size, offset=offset, device="cuda"), kr.random_bits(key, size, offset=offset)
        )
        for dtype in DTYPES:
            for draw in (kr.uniform, kr.normal):
                ours = draw(key, size, dtype=dtype, offset=offset, device="cuda")
                assert same_bits(ours, draw(key, size, dtype=dtype, offset=offset)), (
                    draw.__name__,
                    size,
                    dtype,
                )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_word_of_the_tails_agrees(dtype):
    """64 million words: about 60,000 in the tail branch, and the extremes among them."""
    for draw in (kr.normal, kr.uniform):
        for chunk in range(4):
            offset = chunk << 24
            ours = draw(99, 1 << 24, dtype=dtype, offset=offset, device="cuda")
            assert same_bits(ours, draw(99, 1 << 24, dtype=dtype, offset=offset))


def test_reference_on_the_gpu_gives_the_same_bits():
    for dtype in DTYPES:
        for draw in (kr.uniform, kr.normal):
            ours = draw(5, 300_001, dtype=dtype, offset=3, device="cuda", backend="reference")
            assert same_bits(ours, draw(5, 300_001, dtype=dtype, offset=3))
    ours = kr.sample_k_of_n(5, 1000, 300, batch=4, device="cuda", backend="reference")
    assert same_bits(ours, kr.sample_k_of_n(5, 1000, 300, batch=4))


@pytest.mark.parametrize(
    ("n", "k", "batch"),
    [
        (0, 0, 2), (1, 1, 3), (7, 0, 3), (7, 7, 3), (8, 3, 1), (255, 100, 3), (256, 255, 3), (257, 1, 3),
        (257, 257, 3), (1023, 512, 5), (1024, 1, 2), (2048, 1024, 64), (4097, 4000, 3), (100_001, 5, 2),
        (100_001, 100_000, 2), (1_000_000, 500_000, 2), (3_000_001, 17, 1),
    ],
)  # fmt: skip
def test_choice_on_cuda_equals_cpu(n, k, batch):
    for key, row in ((0, 0), (KEYS[3], 2**33 + 1)):
        ours = kr.sample_k_of_n(key, n, k, batch=batch, offset=row, device="cuda")
        assert same_bits(ours, kr.sample_k_of_n(key, n, k, batch=batch, offset=row))


def test_kernels_run_on_the_current_stream():
    kr.normal(3, 10, device="cuda")  # builds and loads
    kr.sample_k_of_n(3, 10, 2, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late = torch.ones(1, device="cuda")
        drawn = kr.normal(3, 100_000, device="cuda") * late
        rows = kr.sample_k_of_n(3, 4096, 100, batch=8, device="cuda")
        event = stream.record_event()
    assert not event.query(), "the draws are queued behind the sleeping kernel, not run elsewhere"
    event.synchronize()
    assert same_bits(drawn, kr.normal(3, 100_000))
    assert same_bits(rows, kr.sample_k_of_n(3, 4096, 100, batch=8))


def test_draws_can_be_captured_in_a_cuda_graph():
    kr.normal(3, 10, device="cuda")  # builds and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = kr.normal(3, (64, 64), dtype=torch.bfloat16, device="cuda")
    drawn.zero_()
    graph.replay()
    assert same_bits(drawn, kr.normal(3, (64, 64), dtype=torch.bfloat16))


def test_global_random_state_of_the_gpu_is_untouched():
    before = torch.cuda.get_rng_state()
    kr.random_bits(1, 9, device="cuda")
    kr.uniform(1, 9, device="cuda")
    kr.normal(1, 9, device="cuda")
    kr.sample_k_of_n(1, 9, 3, device="cuda")
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_more_than_two_to_the_32_bytes():
    n = (1 << 30) + 5
    if torch.cuda.mem_get_info()[0] < 3 * 4 * n:
        pytest.skip("needs 13 GB of free GPU memory")
    drawn = kr.uniform(8, n, device="cuda")
    for start in (0, (1 << 29) - 7, n - 1000):
        assert same_bits(drawn[start : start + 1000].clone(), kr.uniform(8, 1000, offset=start))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_is_used_and_the_current_one_kept():
    drawn = kr.normal(3, 1000, device="cuda:1")
    assert drawn.device.index == 1 and torch.cuda.current_device() == 0
    assert same_bits(drawn, kr.normal(3, 1000))
