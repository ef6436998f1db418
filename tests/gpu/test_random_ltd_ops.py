"""Token dropping on a GPU: plain indexing bit for bit at every length, width and alignment; gradients.

``-k small`` selects a subset that is quick under compute-sanitizer and covers every kernel.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from random_ltd_plain import plain_gather, plain_scatter

from ds_efficient.core.keys import Key
from ds_efficient.ops import keyed_random
from ds_efficient.ops import random_ltd as ltd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KEY = Key(7).fold("random_ltd")
DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.uint8)
layouts = pytest.mark.parametrize("batch_first", (True, False))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def check(x: torch.Tensor, keep: int, batch_first: bool) -> None:
    """All functions on ``x`` (on the GPU) against plain indexing, bit for bit."""
    batch, length = x.shape[:2] if batch_first else x.shape[1::-1]
    options = {"batch_first": batch_first}
    index = ltd.sample_tokens(length, keep, batch, key=KEY, device="cuda")
    assert torch.equal(index.cpu(), ltd.sample_tokens(length, keep, batch, key=KEY))
    before, ops, end = x.clone(), torch.ops.ds_efficient, (index, batch_first, "native")
    part = ltd.gather_tokens(x, index, **options)
    assert torch.equal(bits(part), bits(plain_gather(x, index, batch_first)))
    new = part.flip(-1).contiguous()
    expected = bits(plain_scatter(x, new, index, batch_first))
    assert torch.equal(bits(ltd.scatter_tokens(x, new, index, **options)), expected)
    erased, taken = ops.ltd_split(x, *end)
    empty = plain_scatter(x, torch.zeros_like(part), index, batch_first)
    assert torch.equal(bits(erased), bits(empty)) and torch.equal(bits(taken), bits(part))
    assert torch.equal(bits(ops.ltd_erase(x, *end)), bits(empty))
    spread = ops.ltd_spread(new, index, length, batch_first, "native")
    assert torch.equal(bits(spread), bits(plain_scatter(torch.zeros_like(x), new, index, batch_first)))
    assert torch.equal(bits(x), bits(before))
    ltd.scatter_tokens(x, new, index, in_place=True, **options)
    assert torch.equal(bits(x), expected)


def state(batch: int, length: int, features: int, batch_first: bool, dtype: torch.dtype, offset: int = 0):
    """A hidden state on the GPU that starts ``offset`` elements into its memory."""
    shape = (batch, length, features) if batch_first else (length, batch, features)
    source = keyed_random.normal(KEY, shape, device="cuda").abs_().mul_(40)  # at most 254: fits uint8
    memory = torch.empty(source.numel() + offset, dtype=dtype, device="cuda")
    return memory[offset:].view(shape).copy_(source)


# ---- values ----


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", (1, 3, 33, 64, 1000))
def test_small_states_of_every_dtype_and_width(features, dtype, batch_first):
    for offset in (0, 1, 4):
        check(state(3, 37, features, batch_first, dtype, offset), 13, batch_first)
    for length, keep in ((1, 1), (64, 64), (50, 0)):
        check(state(3, length, features, batch_first, dtype), keep, batch_first)


@layouts
@pytest.mark.parametrize("length", (4096, 8192, 131072))
def test_small_rows_at_lengths_that_stop_other_kernels(length, batch_first):
    for keep in (1, 2049, length // 2, length - 1, length):
        check(state(2, length, 4, batch_first, torch.bfloat16), keep, batch_first)


@layouts
@pytest.mark.parametrize(
    ("length", "batch", "features", "keep"),
    [
        (2048, 8, 2048, 1024), (4096, 4, 4096, 2048), (32768, 1, 4096, 8192), (8192, 2, 1000, 4099),
        (131072, 1, 2048, 65536),
    ],
)  # fmt: skip
def test_states_as_models_have_them(length, batch, features, keep, batch_first):
    check(state(batch, length, features, batch_first, torch.bfloat16), keep, batch_first)


@layouts
def test_small_strided_expanded_and_transposed_states(batch_first):
    x = state(6, 40, 96, batch_first, torch.float32)
    index = ltd.sample_tokens(20, 9, 3, key=3, device="cuda")
    half = x[:3, :20] if batch_first else x[:20, :3]
    for view in (half, half[..., ::2], half[..., 1:33]):
        part = ltd.gather_tokens(view, index, batch_first=batch_first)
        assert torch.equal(part, plain_gather(view, index, batch_first))
        y = ltd.scatter_tokens(view, -part, index, batch_first=batch_first)
        assert torch.equal(y, plain_scatter(view, -part, index, batch_first))
        turned = view.transpose(0, 1)
        assert torch.equal(
            ltd.gather_tokens(turned, index, batch_first=not batch_first), part.transpose(0, 1)
        )
    table = torch.randn(20, 64, device="cuda")
    made = ltd.gather_rotary(table, index, batch_first=batch_first)
    assert torch.equal(made, table[index if batch_first else index.T])


def test_more_than_two_to_the_32_bytes():
    length, features = 131072, 17000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * length * features:
        pytest.skip("needs 14 GB of free GPU memory")
    x = torch.empty(length, 1, features, dtype=torch.bfloat16, device="cuda")
    x.copy_(torch.arange(length, device="cuda").view(-1, 1, 1) % 251)
    index = ltd.sample_tokens(length, 3000, 1, key=1, device="cuda")
    part = ltd.gather_tokens(x, index, batch_first=False)
    assert torch.equal(part[:, 0, -1], (index[0] % 251).to(torch.bfloat16))
    y = ltd.scatter_tokens(x, -part - 1, index, batch_first=False)
    x[index[0]] = -part - 1
    assert torch.equal(y, x)


# ---- choices ----


@pytest.mark.parametrize(
    ("layers", "batch", "length", "keep"),
    [(24, 8, 2048, 1024), (2, 3, 131072, 50000), (300, 1, 9, 4), (3, 2, 5, 0)],
)
def test_small_choices_of_all_layers_have_the_bits_of_the_cpu(layers, batch, length, keep):
    keys = [KEY.fold(layer) for layer in range(layers)]
    ours = ltd.sample_layers(length, keep, batch, keys, "cuda")
    assert ours.is_cuda and torch.equal(ours.cpu(), ltd.sample_layers(length, keep, batch, keys))


def test_global_random_state_of_the_gpu_is_untouched():
    before = torch.cuda.get_rng_state()
    ltd.sample_layers(100, 40, 2, [1, 2], "cuda")
    assert torch.equal(before, torch.cuda.get_rng_state())


# ---- gradients ----


@layouts
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("in_place", (False, True))
def test_small_gradients_are_those_of_plain_indexing(batch_first, dtype, in_place):
    base = state(3, 70, 48, batch_first, dtype) / 50
    index = ltd.sample_tokens(70, 31, 3, key=KEY, device="cuda")
    up = torch.randn_like(base)

    def run(through):
        x = base.clone().requires_grad_()
        y = through(x * 2)
        return y.detach(), *torch.autograd.grad(y, x, up)

    def plain(x):
        return plain_scatter(x, torch.tanh(plain_gather(x, index, batch_first)), index, batch_first)

    def apart(x):
        part = torch.tanh(ltd.gather_tokens(x, index, batch_first=batch_first))
        return ltd.scatter_tokens(x, part, index, batch_first=batch_first, in_place=in_place)

    def together(x):
        return ltd.apply_to_kept(torch.tanh, x, index, batch_first=batch_first)

    expected = run(plain)
    for ours in (run(apart), run(together)):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# ---- streams, graphs, errors ----


def test_kernels_run_on_the_current_stream():
    x, keys = state(2, 64, 32, True, torch.float32), [5, 6]
    index = ltd.sample_layers(64, 20, 2, keys, "cuda")[0]
    ltd.apply_to_kept(torch.neg, x, index, batch_first=True)  # builds and loads
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late = x * 3
        drawn = ltd.sample_layers(64, 20, 2, keys, "cuda")[0]
        y = ltd.apply_to_kept(torch.neg, late, drawn, batch_first=True)
        event = stream.record_event()
    assert not event.query(), "the work is queued behind the sleeping kernel, not run elsewhere"
    event.synchronize()
    assert torch.equal(y, plain_scatter(x * 3, -plain_gather(x * 3, index, True), index, True))


def test_small_launches_that_begin_early_see_what_the_kernels_before_wrote():
    source = state(4, 512, 256, True, torch.float32)
    x, made = torch.empty_like(source), []
    for turn in range(60):  # every index lies where the one before was read
        torch.mul(source, turn + 1, out=x)
        index = ltd.sample_tokens(512, 200, 4, key=KEY.fold(turn), device="cuda")
        part = ltd.gather_tokens(x, index, batch_first=True)
        ltd.scatter_tokens(x, -part, index, batch_first=True, in_place=True)
        made.append((part, x.clone()))
        del index
    for turn, (part, scattered) in enumerate(made):
        index = ltd.sample_tokens(512, 200, 4, key=KEY.fold(turn)).cuda()
        wanted = plain_gather(source * (turn + 1), index, True)
        assert torch.equal(part, wanted)
        assert torch.equal(scattered, plain_scatter(source * (turn + 1), -wanted, index, True))


def test_a_layer_can_be_captured_in_a_cuda_graph():
    x = state(2, 64, 32, True, torch.bfloat16)
    index = ltd.sample_tokens(64, 20, 2, key=5, device="cuda")
    expected = ltd.apply_to_kept(torch.neg, x, index, batch_first=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ltd.apply_to_kept(
            torch.neg, x, ltd.sample_tokens(64, 20, 2, key=5, device="cuda"), batch_first=True
        )
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("wrong", ("2, 1", "1, 1", "-1, 3", "2, 9"))
def test_an_index_that_does_not_ascend_within_the_length_stops_the_process(wrong):
    code = f"""
import torch
from ds_efficient.ops import random_ltd
x, index = torch.ones(1, 9, 8, device="cuda"), torch.tensor([[{wrong}]], device="cuda")
random_ltd.{{call}}
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print("stopped:", error)
"""
    for call in (
        "gather_tokens(x, index, batch_first=True)",
        "scatter_tokens(x, x[:, :2], index, batch_first=True)",
    ):
        command = [sys.executable, "-c", code.replace("{call}", call)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "stopped: " in done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_is_used_and_the_current_one_kept():
    x = state(2, 64, 32, True, torch.float32).to("cuda:1")
    index = ltd.sample_tokens(64, 20, 2, key=5, device="cuda:1")
    y = ltd.apply_to_kept(torch.neg, x, index, batch_first=True)
    assert y.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(y, plain_scatter(x, -plain_gather(x, index, True), index, True))
