"""The rotary embedding on a GPU: the definition in double precision at every layout, gradients, streams.

``-k small`` selects a subset that is quick under compute-sanitizer and covers every kernel.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from rotary_cases import DTYPES, Case, cases

from ds_efficient.ops.rotary import rotary_embedding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def check(case: Case) -> None:
    """The kernel on the GPU, and what it does not read."""
    inputs = case.inputs("cuda")
    before = inputs[0].clone()
    case.check(torch.ops.ds_efficient.rotary(*inputs, "native"), inputs)
    assert torch.equal(inputs[0], before)


SMALL = {
    "wide": {"width": 32, "rotated": 32},
    "wide, some channels, gaps": {"width": 48, "rotated": 32, "gap": 16, "offset": 16},
    "odd": {"width": 13, "rotated": 10},
    "odd address": {"width": 32, "rotated": 32, "offset": 1},
    "samples first": {"width": 32, "rotated": 16, "order": (1, 2, 0)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_small_inputs_of_every_kernel_are_as_exact_as_their_type(name, dtype):
    for indexed, transposed in ((True, False), (False, True)):
        check(Case(dtype, 7, 3, 3, length=9, indexed=indexed, transposed=transposed, **SMALL[name]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_gradients_are_those_of_the_reference(dtype):
    case = Case(dtype, 6, 2, 3, 24, 16, 9, mscale=1.25)
    t, angles, index, mscale, _ = case.inputs("cuda")
    up = torch.randn(2, 3, 6, 24, device="cuda").to(dtype).permute(2, 0, 1, 3)
    x = t.clone().requires_grad_()
    (ours,) = torch.autograd.grad(rotary_embedding(x, angles, index, mscale=mscale), x, up)
    back = Case(dtype, 6, 2, 3, 24, 16, 9, mscale=1.25, transposed=True)
    back.check(ours, (up, angles, index, mscale, True))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_every_layout_is_as_exact_as_its_type(case):
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_usual_sizes(dtype):
    for (heads, width, rotated), samples in itertools.product(
        ((16, 128, 128), (4, 96, 24), (1, 64, 64)), (1, 4)
    ):
        for indexed in (True, False):
            check(Case(dtype, 190, samples, heads, width, rotated, 1024, indexed=indexed, gap=2 * width))
    check(Case(dtype, 5, 2, 200, 128, 64, 131072))
    check(Case(dtype, 3, 1, 1, 2052, 2048, 9))


def test_all_tokens_kept_give_the_bits_of_no_index():
    t, angles, *_ = Case(torch.bfloat16, 100, 3, 16, 128, 128, 100).inputs("cuda")
    every = torch.arange(100, device="cuda").expand(3, 100)
    whole = rotary_embedding(t, angles)
    assert torch.equal(rotary_embedding(t, angles, every), whole)
    assert torch.equal(rotary_embedding(t[1::3], angles, every[:, 1::3]), whole[1::3])


def test_queries_that_lie_among_keys_and_values_are_read_in_place():
    mixed = torch.randn(64, 2, 4, 3 * 64, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(64, 1, 1, 64, device="cuda") * 64
    for part in mixed.split(64, dim=-1):
        assert torch.equal(rotary_embedding(part, angles), rotary_embedding(part.contiguous(), angles))


def test_more_than_two_to_the_32_bytes():
    positions, heads, width = 140000, 128, 128
    if torch.cuda.mem_get_info()[0] < 3 * 2 * positions * heads * width:
        pytest.skip("needs 14 GB of free GPU memory")
    t = torch.ones(positions, 1, heads, width, dtype=torch.bfloat16, device="cuda")
    angles = torch.rand(positions, 1, 1, width, device="cuda") * 6
    found = rotary_embedding(t, angles)
    assert torch.equal(found[-9:], rotary_embedding(t[-9:].clone(), angles[-9:].clone()))


def test_the_kernel_runs_on_the_current_stream_and_in_a_graph():
    t, angles, index, *_ = Case(torch.float32, 40, 2, 4, 64, 64, 90).inputs("cuda")
    expected = rotary_embedding(t * 3, angles, index)  # builds and loads
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late = rotary_embedding(t * 3, angles, index)
        event = stream.record_event()
    assert not event.query(), "the work is queued behind the sleeping kernel, not run elsewhere"
    event.synchronize()
    assert torch.equal(late, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rotary_embedding(t * 3, angles, index)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("wrong", (-1, 9, 2**40))
def test_an_index_outside_of_the_angles_stops_the_process(wrong):
    code = f"""
import torch
from ds_efficient.ops.rotary import rotary_embedding
t, index = torch.ones(2, 1, 1, 8, device="cuda"), torch.tensor([[3, {wrong}]], device="cuda")
rotary_embedding(t, torch.ones(9, 8, device="cuda"), index)
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print("stopped:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "stopped: " in done.stdout, done.stderr


def test_megatron_cores_rotary_embedding_takes_the_kernel():
    rope_utils = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    from megatron_patches import fusions

    original = rope_utils._apply_rotary_pos_emb_bshd
    t, angles, index, *_ = Case(torch.float32, 40, 2, 4, 64, 64, 90, largest=90.0).inputs("cuda")
    gathered = angles[index.T, 0]
    expected = original(t, gathered), original(t, angles[:40])
    try:
        fusions.fuse_rotary_embedding()
        fused = rope_utils._apply_rotary_pos_emb_bshd
        noted = fusions.at_kept(angles, index)
        for found in (fused(t, noted, rotary_interleaved=False), fused(t, gathered, mscale=1.0)):
            torch.testing.assert_close(found, expected[0], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(fused(t, angles[:40]), expected[1], rtol=1e-6, atol=2e-6)
    finally:
        rope_utils._apply_rotary_pos_emb_bshd = original


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_is_used_and_the_current_one_kept():
    case = Case(torch.bfloat16, 40, 2, 4, 64, 64, 90)
    inputs = case.inputs("cuda:1")
    found = torch.ops.ds_efficient.rotary(*inputs, "native")
    assert found.device.index == 1 and torch.cuda.current_device() == 0
    case.check(found, inputs)
