"""SlopeLinear against dense emulation: values, gradients, dtypes, autocast, checkpointing, copies."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ds_efficient
from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.slope.linear import SlopeLinear

PATTERNS = ("1:2", "2:4", "1:4", "2:8", "4:8", "2:16", "3:32")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LEADING = ((), (5,), (2, 3), (0,), (2, 0, 3), (1, 1, 2, 2))


def group_top(values: list[float], n: int) -> set[int]:
    """Return the places of the n largest magnitudes; of equal ones the first."""
    return set(sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))[:n])


def column_mask(dense: Tensor, mask: Tensor, n: int, m: int) -> Tensor:
    """Return by loops which kept weights of a dense (out, in) matrix the column pass leaves."""
    left = torch.zeros_like(mask)
    for column in range(mask.shape[1]):
        for start in range(0, mask.shape[0], m):
            rows = [row for row in range(start, start + m) if mask[row, column]]
            for place in group_top([float(dense[row, column]) for row in rows], n):
                left[rows[place], column] = True
    return left


def spread(compact: Tensor, mask: Tensor) -> Tensor:
    """Return the dense fp64 matrix of a compact one, by a loop over its rows."""
    dense = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(mask.shape[0]):
        dense[row, mask[row].nonzero().flatten()] = compact[row].detach().double()
    return dense


class Emulation:
    """The layer as dense fp64 tensors; autograd of `run` gives the gradients that the paper defines."""

    def __init__(self, layer: SlopeLinear, n: int, m: int) -> None:
        self.mask = layer.forward_mask()
        self.weight = spread(layer.weight, self.mask).requires_grad_()
        self.backward_mask = self.mask
        if layer.slope.double_prune:
            self.backward_mask = column_mask(self.weight.detach(), self.mask, n, m)
        self.bias = None if layer.bias is None else self.leaf(layer.bias)
        down, up = layer.slope.adapter_down, layer.slope.adapter_up
        self.adapter = (
            (self.leaf(down), self.leaf(up)) if layer.slope.adapter_active and down is not None else None
        )

    @staticmethod
    def leaf(tensor: Any) -> Tensor:
        return tensor.detach().double().clone().requires_grad_()

    def run(self, x: Tensor) -> Tensor:
        backward = x @ (self.weight * self.backward_mask).detach().t()
        y = x.detach() @ (self.weight * self.mask).t() + (backward - backward.detach())
        if self.adapter is not None:
            y = y + (x @ self.adapter[0].t()) @ self.adapter[1].t()
        return y if self.bias is None else y + self.bias

    def compact_gradient(self) -> Tensor:
        assert self.weight.grad is not None
        return self.weight.grad[self.mask].view(self.mask.shape[0], -1)


def close(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert found is not None and expected is not None
    assert found.shape == expected.shape
    if expected.numel():
        error = (found.double() - expected).abs().max()
        assert error <= tolerance * (1 + expected.abs().max()), float(error)


def make(
    out: int, inner: int, pattern: str = "2:4", seed: int = 3, dtype: torch.dtype = torch.float32, **more: Any
) -> SlopeLinear:
    """Return a layer; one with an adapter has it active and trained."""
    layer = SlopeLinear(inner, out, pattern=pattern, key=Key(seed, ("layer",)), dtype=dtype, **more)
    if layer.slope.adapter_up is not None:
        generator = torch.Generator().manual_seed(seed)
        layer.slope.adapter_up.data.normal_(generator=generator)
        layer.activate_adapter()
    return layer


def scattered(shape: tuple[int, ...], seed: int, dtype: torch.dtype, contiguous: bool) -> Tensor:
    """Return normal numbers, or a view of every second one of a transposed tensor."""
    generator = torch.Generator().manual_seed(seed)
    if contiguous:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.randn((*shape[:-1][::-1], 2 * shape[-1]), generator=generator, dtype=torch.float64)
    axes = (*range(len(shape) - 2, -1, -1), len(shape) - 1)
    return wide.to(dtype)[..., ::2].permute(axes)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    pattern = draw(st.sampled_from(PATTERNS))
    m = int(pattern.split(":")[1])
    double = draw(st.booleans())
    return {
        "pattern": pattern,
        "inner": m * draw(st.integers(1, max(1, 48 // m))),
        "out": m * draw(st.integers(1, max(1, 24 // m))) if double else draw(st.integers(1, 23)),
        "double_prune": double,
        "adapter_rank": draw(st.sampled_from([0, 0, 1, 5])),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(deadline=None, max_examples=80)
@given(cases(), st.sampled_from(LEADING), st.booleans(), st.booleans())
def test_outputs_and_all_gradients_equal_dense_emulation(
    case: dict[str, Any], leading: tuple[int, ...], contiguous: bool, gradient_contiguous: bool
) -> None:
    layer = make(**case)
    n, m = map(int, case["pattern"].split(":"))
    dense, tolerance = Emulation(layer, n, m), TOLERANCE[case["dtype"]]
    assert torch.equal(layer.backward_mask(), dense.backward_mask)
    assert torch.equal(layer.dense_weight().double(), dense.weight)
    x = scattered((*leading, case["inner"]), case["seed"] + 1, case["dtype"], contiguous).requires_grad_()
    gradient = scattered((*leading, case["out"]), case["seed"] + 2, case["dtype"], gradient_contiguous)
    exact = x.detach().double().requires_grad_()
    y, expected = layer(x), dense.run(exact)
    assert y.dtype == case["dtype"]
    close(y, expected, tolerance)
    y.backward(gradient)
    expected.backward(gradient.double())
    close(x.grad, exact.grad, tolerance)
    close(layer.weight.grad, dense.compact_gradient(), tolerance)
    if dense.bias is not None:
        close(layer.bias.grad, dense.bias.grad, tolerance)
    if dense.adapter is not None:
        close(layer.slope.adapter_down.grad, dense.adapter[0].grad, tolerance)
        close(layer.slope.adapter_up.grad, dense.adapter[1].grad, tolerance)


@pytest.mark.parametrize("kind", ["sum", "expanded"])
def test_gradients_without_memory_of_their_own_are_taken(kind: str) -> None:
    layer = make(8, 16, dtype=torch.float64)
    dense, x = Emulation(layer, 2, 4), scattered((3, 16), 1, torch.float64, True)
    for run in (layer, dense.run):
        y = run(x)
        y.sum().backward() if kind == "sum" else y.backward(torch.full((1, 8), 0.5).double().expand(3, 8))
    close(layer.weight.grad, dense.compact_gradient(), 1e-12)


def test_frozen_weights_and_inputs_get_no_gradient_and_others_the_same() -> None:
    x = scattered((6, 32), 1, torch.float64, True)
    found = {}
    for frozen in ("", "weight", "input", "adapter_down", "adapter_up"):
        layer = make(8, 32, dtype=torch.float64, adapter_rank=3)
        tensors = {"weight": layer.weight, "input": x.clone().requires_grad_(), "bias": layer.bias}
        tensors |= {name: getattr(layer.slope, name) for name in ("adapter_down", "adapter_up")}
        if frozen:
            tensors[frozen].requires_grad_(False)
        layer(tensors["input"]).square().sum().backward()
        found[frozen] = {name: tensor.grad for name, tensor in tensors.items()}
        for name, gradient in found[frozen].items():
            assert gradient is None if name == frozen else torch.equal(gradient, found[""][name]), (
                frozen,
                name,
            )


def test_no_grad_inference_mode_and_eval_give_the_same_outputs() -> None:
    layer, x = make(8, 32, adapter_rank=2), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer(x)
        assert not y.requires_grad and torch.equal(y, expected)
    assert torch.equal(layer.eval()(x), expected)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("double_prune", [False, True])
def test_gradcheck(rank: int, double_prune: bool) -> None:
    layer = make(8, 16, dtype=torch.float64, adapter_rank=rank, double_prune=double_prune)
    x = scattered((2, 3, 16), 1, torch.float64, True).requires_grad_(not double_prune)
    parameters = [parameter for _, parameter in layer.named_parameters()]
    assert len(parameters) == (4 if rank else 2)
    # The input's gradient uses another matrix than the forward pass where the weight is pruned twice.
    torch.autograd.gradcheck(lambda *_: layer(x), [*parameters, *([] if double_prune else [x])])


@pytest.mark.parametrize("adapter_rank", [0, 3])
def test_autocast_gives_what_nn_linear_gives_for_the_same_matrix(adapter_rank: int) -> None:
    layer = make(16, 32, adapter_rank=adapter_rank, double_prune=False)
    dense = layer.to_linear()
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = []
    for module, given_x in zip((layer, dense), inputs, strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(given_x)
        y.float().square().sum().backward()
        outputs.append(y)
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[0], outputs[1], rtol=3e-2, atol=3e-2)
    assert inputs[0].grad.dtype == torch.float32 and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=5e-2, atol=1e-1)
    if not adapter_rank:
        expected = dense.weight.grad[layer.forward_mask()].view_as(layer.weight)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=5e-2, atol=5e-2)


def test_accumulated_gradients_are_those_of_one_big_batch() -> None:
    whole, parts = (make(16, 32, dtype=torch.float64, adapter_rank=3) for _ in range(2))
    x = scattered((12, 32), 1, torch.float64, True)
    whole(x).square().sum().backward()
    for part in x.split((3, 4, 5)):
        parts(part).square().sum().backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        close(other.grad, one.grad, 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_gives_the_same_bits(reentrant: bool) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for recompute in (False, True):
        block = nn.Sequential(make(16, 32, adapter_rank=2), nn.GELU(), make(8, 16))
        given_x = x.clone().requires_grad_()
        y = checkpoint(block, given_x, use_reentrant=reentrant) if recompute else block(given_x)
        y.square().sum().backward()
        found.append([y, given_x.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_weight_that_changes_between_forward_and_backward_is_noticed() -> None:
    layer = make(8, 16)
    y = layer(torch.ones(2, 16, requires_grad=True))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_column_mask_chosen_between_forward_and_backward_is_the_one_that_counts() -> None:
    layer = make(8, 16, dtype=torch.float64)
    x = torch.ones(2, 16, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    layer.slope.select_columns(layer.weight.detach().flip(0))
    y.sum().backward()
    expected = (layer.dense_weight() * layer.backward_mask()).sum(0).expand(2, 16)
    close(x.grad, expected, 1e-12)
    assert layer.weight.grad is not None and bool((layer.weight.grad == 2).all())


def test_a_deep_copy_is_independent_and_keeps_its_optimizer_group() -> None:
    layer = make(16, 32, adapter_rank=3)
    twin, x = copy.deepcopy(layer), torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(twin(x), layer(x))
    for name, parameter in twin.slope.named_parameters():
        assert vars(parameter) == vars(getattr(layer.slope, name)) != {}
    with torch.no_grad():
        twin.weight.mul_(2).neg_()
        twin.weight[:, ::2] = 0
    twin.refresh()
    assert not torch.equal(twin.backward_mask(), layer.backward_mask())
    assert not torch.equal(twin(x), layer(x))
    assert twin.slope.forward_products == layer.slope.forward_products == 2


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_restores_masks_weights_and_a_trained_adapter(assign: bool) -> None:
    source, target = make(16, 32, adapter_rank=3), SlopeLinear(32, 16, adapter_rank=3, key=Key(99))
    source.slope.adapter_up.data[0, 0] = 7.0
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    assert not torch.equal(target.forward_mask(), source.forward_mask())
    target.load_state_dict(torch.load(stream, weights_only=True), strict=True, assign=assign)
    assert torch.equal(target.forward_mask(), source.forward_mask())
    assert torch.equal(target.backward_mask(), source.backward_mask())
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert target.slope.adapter_active
    assert torch.equal(target(x), source(x))
    assert target.slope.adapter_up.parameter_group == source.slope.adapter_up.parameter_group


def test_the_state_of_an_adapter_that_waits_leaves_it_waiting() -> None:
    source, target = (SlopeLinear(32, 16, adapter_rank=3, key=Key(seed)) for seed in (1, 2))
    target.load_state_dict(source.state_dict())
    assert not target.slope.adapter_active


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_masks_stay_when_the_dtype_changes(dtype: torch.dtype) -> None:
    layer = make(16, 32, adapter_rank=2)
    masks = layer.slope.mask.clone(), layer.slope.column_mask.clone()
    layer.to(dtype)
    assert torch.equal(layer.slope.mask, masks[0]) and torch.equal(layer.slope.column_mask, masks[1])
    assert all(parameter.dtype == dtype for parameter in layer.parameters())
    assert layer(torch.ones(2, 32, dtype=dtype)).dtype == dtype


def test_a_compiled_layer_computes_the_same() -> None:
    layer = make(16, 32, adapter_rank=2)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=False)):
        layer.zero_grad()
        given_x = x.clone().requires_grad_()
        y = run(given_x)
        y.square().sum().backward()
        results.append([y, given_x.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_a_dense_layer_hands_over_its_kept_weights_and_its_bias(conv: bool, mask: str) -> None:
    if conv:
        from transformers.pytorch_utils import Conv1D

        dense, weight = Conv1D(16, 32), None
        weight = dense.weight.detach().t()
    else:
        dense = nn.Linear(32, 16)
        weight = dense.weight.detach()
    dense.eval().weight.requires_grad_(False)
    layer = SlopeLinear.from_linear(dense, mask=mask, key=Key(1))
    assert torch.equal(layer.dense_weight(), weight * layer.forward_mask())
    assert layer.bias is dense.bias and not layer.training and not layer.weight.requires_grad
    back = layer.to_linear()
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(back(x), layer(x))


def test_what_cannot_become_sparse_is_refused_by_name() -> None:
    class Own(nn.Linear):
        pass

    normed = nn.utils.weight_norm(nn.Linear(8, 8))
    for module, message in (
        (Own(8, 8), "Own is not supported"),
        (nn.Bilinear(4, 4, 4), "Bilinear is not supported"),
        (normed, "computed from other parameters"),
        (nn.Linear(6, 8), "in_features=6 is not a multiple of M=4"),
        (nn.Linear(8, 6), "out_features 6 is not a multiple of M=4"),
    ):
        with pytest.raises(UserError, match=message):
            SlopeLinear.from_linear(module)
    for options, message in (
        ({"pattern": "4:2"}, "4:2"),
        ({"pattern": "2:6"}, "2:6"),
        ({"mask": "best"}, "mask='best'"),
        ({"backend": "magic"}, "backend='magic'"),
        ({"adapter_rank": -1}, "adapter_rank=-1"),
    ):
        with pytest.raises(UserError, match=message):
            SlopeLinear(8, 8, **options)
    with pytest.raises(UserError, match="adapter_rank=0"):
        SlopeLinear(8, 8).activate_adapter()


def test_initial_weights_are_those_of_nn_linear_in_distribution() -> None:
    layer = SlopeLinear(256, 512, key=Key(4))
    bound = 256**-0.5
    values = layer.weight.detach().flatten().double()
    assert values.abs().max() <= bound and layer.bias.abs().max() <= bound
    assert abs(float(values.mean())) < 5 * bound / math.sqrt(3 * values.numel())
    assert float(values.var()) == pytest.approx(bound**2 / 3, rel=0.02)


def test_the_public_name_and_integer_keys() -> None:
    first, again = (ds_efficient.slope.SlopeLinear(16, 8, key=key) for key in (5, Key(5)))
    other = ds_efficient.slope.SlopeLinear(16, 8, key=6)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.slope.mask, again.slope.mask)
    assert not torch.equal(first.slope.mask, other.slope.mask)
