"""SlopeLinear on a GPU: products equal dense emulation; operands follow the weight, the masks, the dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool
from tiny_runs import deepspeed_json, train

from ds_efficient.core.keys import Key
from ds_efficient.slope.linear import SlopeLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Ranks = Callable[[int], RankPool]


def layer(
    out: int = 256,
    inner: int = 128,
    pattern: str = "2:4",
    dtype: torch.dtype = torch.bfloat16,
    **options: object,
) -> SlopeLinear:
    return SlopeLinear(
        inner,
        out,
        bias=False,
        pattern=pattern,
        dtype=dtype,
        device="cuda",
        backend="cusparselt",
        key=Key(5, (out, inner)),
        **options,  # type: ignore[arg-type]
    )


def check(sparse: SlopeLinear, tokens: int = 96, tolerance: float = 1e-2) -> None:
    """Compare all three products with fp32 products of the dense masked weights."""
    generator = torch.Generator("cuda").manual_seed(1)
    dtype = sparse.weight.dtype
    x = torch.randn(tokens, sparse.in_features, device="cuda", generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(tokens, sparse.out_features, device="cuda", generator=generator).to(dtype)
    sparse.weight.grad = None
    y = sparse(x)
    y.backward(dy)
    forward = sparse.dense_weight().float()
    backward = forward * sparse.backward_mask()
    gradient = (dy.float().t() @ x.detach().float())[sparse.forward_mask()].view_as(sparse.weight)
    assert x.grad is not None and sparse.weight.grad is not None
    for found, expected in (
        (y, x.detach().float() @ forward.t()),
        (x.grad, dy.float() @ backward),
        (sparse.weight.grad, gradient),
    ):
        error = (found.detach().float() - expected).norm() / expected.norm()
        assert float(error) < tolerance
    chosen = set(sparse.slope.operands.choices.values())
    assert chosen == {"cusparselt"}


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "2:8", "1:4", "2:16"])
@pytest.mark.parametrize(("out", "inner"), [(256, 128), (128, 256), (192, 320)])
def test_products_equal_dense_emulation(pattern: str, out: int, inner: int) -> None:
    check(layer(out, inner, pattern))


@pytest.mark.parametrize("tokens", [1, 7, 16, 100])
def test_any_number_of_tokens(tokens: int) -> None:
    check(layer(), tokens)


def test_fp16() -> None:
    check(layer(dtype=torch.float16), tolerance=3e-3)


def test_without_double_pruning_the_input_gradient_is_that_of_the_forward_weight() -> None:
    check(layer(double_prune=False))


def test_operands_follow_optimizer_steps_and_the_weight_lives_in_the_operand() -> None:
    sparse = layer()
    check(sparse)
    buffer = sparse.slope.operands._built[False].operand.buffer
    assert sparse.weight.data_ptr() == buffer.data_ptr()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.step()
        check(sparse)
    sparse.refresh()
    check(sparse)
    assert sparse.weight.data_ptr() == buffer.data_ptr()


def test_operands_follow_loaded_states_with_other_masks() -> None:
    sparse, other = layer(), layer()
    with torch.no_grad():
        other.weight.mul_(-3)
    state = SlopeLinear(128, 256, False, dtype=torch.bfloat16, device="cuda", key=Key(77)).state_dict()
    check(sparse)
    sparse.load_state_dict(state)
    assert torch.equal(sparse.weight, state["weight"])
    check(sparse)
    sparse.load_state_dict(other.state_dict())
    check(sparse)


def test_a_weight_inside_a_flat_buffer_is_followed_without_being_told() -> None:
    sparse = layer()
    check(sparse)
    flat = torch.zeros(2 * sparse.weight.numel(), dtype=torch.bfloat16, device="cuda")
    flat[: sparse.weight.numel()].copy_(sparse.weight.detach().flatten())
    sparse.weight.data = flat[: sparse.weight.numel()].view_as(sparse.weight)
    check(sparse)
    flat.mul_(2)
    check(sparse)
    assert sparse.weight.data_ptr() == flat.data_ptr()


def test_copies_dtypes_and_inference_mode() -> None:
    sparse = layer()
    with torch.inference_mode():
        sparse(torch.randn(32, 128, device="cuda", dtype=torch.bfloat16))
    check(sparse)
    twin = copy.deepcopy(sparse)
    with torch.no_grad():
        twin.weight.mul_(2)
    check(twin)
    check(sparse)
    check(sparse.half(), tolerance=3e-3)


def test_adapter_and_autocast() -> None:
    sparse = layer(dtype=torch.float32, adapter_rank=16)
    sparse.activate_adapter()
    assert sparse.slope.adapter_up is not None and sparse.slope.adapter_down is not None
    with torch.no_grad():
        sparse.slope.adapter_up.normal_(generator=torch.Generator("cuda").manual_seed(2))
    x = torch.randn(64, 128, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = sparse(x)
    y.float().square().sum().backward()
    whole = sparse.dense_weight() + sparse.slope.adapter_up.detach() @ sparse.slope.adapter_down.detach()
    expected = x.detach() @ whole.t()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
    assert float((y.detach().float() - expected).norm() / expected.norm()) < 1e-2
    assert sparse.weight.grad is not None and sparse.weight.grad.dtype == torch.float32
    assert set(sparse.slope.operands.choices.values()) == {"cusparselt"}


@pytest.mark.parametrize(("stage", "operands"), [(0, "kept"), (1, "rewritten"), (1, "kept"), (3, "auto")])
def test_training_on_sparse_products_follows_the_dense_ones(
    ranks: Ranks, tmp_path: Path, stage: int, operands: str
) -> None:
    def losses(backend: str) -> list[float]:
        section = {
            "enabled": True,
            "backend": backend,
            "operands": operands,
            "column_mask_interval": 2,
            "adapter": {"rank": 4, "start_step": 4},
        }
        config = deepspeed_json(
            zero_optimization={"stage": stage}, bf16={"enabled": True}, gradient_clipping=0.5, slope=section
        )
        run = train(
            ranks, 1, tmp_path / backend, "--hidden-size 64 --seq-length 32", config, steps=6, timeout=240.0
        )
        assert run.status == [0]
        return run.losses

    assert losses("cusparselt") == pytest.approx(losses("dense"), rel=5e-3)
