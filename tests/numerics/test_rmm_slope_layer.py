"""A sparse layer whose weight gradient is sketched."""

from __future__ import annotations

import copy

import pytest
import torch
from rmm_layers import KEY, ROWS, gradients, numbers, seen_by

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.ops.rmm import partition, sketch_matrix
from ds_efficient.rmm.sketch import Sketch
from ds_efficient.slope import SlopeLinear


def sparse_with_sketch(rank: int) -> SlopeLinear:
    layer = SlopeLinear(32, 48, adapter_rank=rank, key=4, dtype=torch.float64, backend="dense")
    if rank:
        layer.activate_adapter()
        with torch.no_grad():
            layer.slope.adapter_up.copy_(numbers(48, rank, seed=5))
    layer.slope.weight_gradient_by(Sketch(KEY, ratio=0.25, block_size=64, min_rows=8))
    return layer


@pytest.mark.parametrize("rank", [0, 4])
def test_a_sparse_layer_takes_the_sketched_gradient_at_its_kept_positions(rank: int) -> None:
    layer = sparse_with_sketch(rank)
    plain = copy.deepcopy(layer)
    plain.slope.weight_gradient_source = None
    x = numbers(ROWS, 32, dtype=torch.float64)
    y, dx, dw, db = gradients(layer, x)
    exact = gradients(plain, x)
    for found, expected in ((y, exact[0]), (dx, exact[1]), (db, exact[3])):
        torch.testing.assert_close(found, expected)
    s = sketch_matrix(
        KEY.fold(0, 0, 0), "gaussian", partition(ROWS, 0.25, block_size=64, min_rows=8), dtype=torch.float64
    )
    dy = numbers(ROWS, 48, seed=1, dtype=torch.float64)
    dense = (s.t() @ dy).t() @ (s.t() @ x)
    torch.testing.assert_close(dw, layer.slope.compress(dense), rtol=1e-6, atol=1e-6)
    if rank:
        up, down = layer.slope.adapter_up, layer.slope.adapter_down
        torch.testing.assert_close(up.grad, plain.slope.adapter_up.grad)
        torch.testing.assert_close(down.grad, up.detach().t() @ dense, rtol=1e-6, atol=1e-6)


def test_a_sparse_layer_with_a_sketch_saves_no_input_and_takes_one_sketch() -> None:
    layer = sparse_with_sketch(4)
    x = numbers(ROWS, 32, dtype=torch.float64).requires_grad_()
    widths = sorted(value.shape for value in seen_by(lambda: layer(x)) if value.is_floating_point())
    assert [tuple(shape) for shape in widths] == [(56, 32), (ROWS, 4)]
    with pytest.raises(UserError, match="estimated already"):
        layer.slope.weight_gradient_by(Sketch(KEY, ratio=0.5))
    assert seen_by(lambda: layer.eval()(x))[-1].shape == (ROWS, 32)


def test_sparse_layers_share_a_projection_also_under_autocast() -> None:
    layers = [SlopeLinear(32, 48, key=number, backend="dense") for number in range(2)]
    for number, layer in enumerate(layers):
        layer.slope.weight_gradient_by(Sketch(Key(number), ratio=0.25, block_size=64, min_rows=8))
    x, dy = numbers(ROWS, 32), numbers(ROWS, 48, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [layer(x) for layer in layers]
    tallies = [layer.slope.weight_gradient_source.tally for layer in layers]
    assert [tally.kept_bytes for tally in tallies] == [56 * 32 * 2, 0]
    parts = partition(ROWS, 0.25, block_size=64, min_rows=8)
    s = sketch_matrix(Key(0).fold(0, 0, 0), "gaussian", parts, dtype=torch.bfloat16).float()
    expected = (s.t() @ dy.float()).t() @ (s.t() @ x.bfloat16().float())
    for layer, y in zip(layers, outputs, strict=True):
        y.backward(dy)
        assert layer.weight.grad.dtype == torch.float32
        error = layer.weight.grad - layer.slope.compress(expected)
        assert float(error.norm() / layer.slope.compress(expected).norm()) < 0.02
