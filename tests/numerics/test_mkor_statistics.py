"""MKOR's statistics: hooks, micro-batches, recomputation, convolutions, the layers it takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mkor_runs import batch, factors, linear_twin, mkor, model, normal, same, step_twins, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_efficient.mkor.statistics import LayerStatistics, input_sum, preconditioned_layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_micro_batches_are_one_batch(bias, dtype, tolerance):
    networks = [model(bias, dtype) for _ in range(2)]
    for network, pieces in zip(networks, (1, 4), strict=True):
        train(network, mkor(network, state_dtype=dtype), range(8), pieces)
    assert same(*networks, tolerance=tolerance)
    assert not same(networks[0], model(bias, dtype))


class Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inside = inside
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inside, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_recomputed_activations_count_once(reentrant, bias):
    plain, inside = model(bias), model(bias)
    wrapped = Checkpointed(inside, reentrant)
    plain_optimizer, wrapped_optimizer = mkor(plain), mkor(wrapped)
    train(plain, plain_optimizer, range(4), 2)
    train(wrapped, wrapped_optimizer, range(4), 2)
    assert same(plain, inside, tolerance=1e-13)
    found = zip(factors(plain_optimizer), factors(wrapped_optimizer), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in found)


def test_passes_that_train_nothing_do_not_count():
    networks = [model(), model()]
    optimizers = [mkor(network) for network in networks]
    for step in range(4):
        networks[1].eval()
        networks[1](batch(77 + step)[0])
        with torch.no_grad():
            networks[1].train()(batch(99 + step)[0])
        F.mse_loss(networks[1](batch(55)[0]), batch(55)[1]).backward()
        optimizers[1].zero_grad()  # thrown away
        for network, optimizer in zip(networks, optimizers, strict=True):
            train(network, optimizer, range(step, step + 1))
    assert same(*networks)


@pytest.mark.parametrize(
    "stride, padding, dilation", [(1, 0, 1), (2, 1, 1), (1, "same", 2), ((1, 2), (2, 0), 1)]
)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_sum_of_patches_is_that_of_the_unfolded_images(stride, padding, dilation, mode):
    conv = nn.Conv2d(
        3, 4, (3, 2), stride=stride, padding=padding, dilation=dilation, padding_mode=mode
    ).double()
    x = normal(5, 3, 9, 8)
    padded = F.pad(
        x, conv._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else "circular"
    )
    patches = F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    total, rows = input_sum(conv, x)
    assert rows == 5 * patches.shape[2] == conv(x)[:, 0].numel()
    assert torch.allclose(total, patches.sum((0, 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("unbatched", [True, False])
def test_a_convolution_is_the_linear_layer_of_its_patches(bias, unbatched):
    conv = nn.Conv2d(2, 3, 3, bias=bias).double()
    linear = linear_twin(conv)
    x = normal(2, 6, 5, seed=3) if unbatched else normal(4, 2, 6, 5, seed=3)
    patches = F.unfold(x, 3) if not unbatched else F.unfold(x[None], 3)
    optimizers = step_twins(conv, linear, x, patches, mkor)
    assert torch.allclose(conv.weight.flatten(1), linear.weight, rtol=1e-10)
    for a, b in zip(*map(factors, optimizers), strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


class Mixed(nn.Module):
    """Layers that MKOR takes, and those that it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 6)
        self.body = nn.Linear(6, 6)
        self.frozen_bias = nn.Linear(6, 6)
        self.frozen_bias.bias.requires_grad_(False)
        self.twin, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.bias = self.twin.bias
        self.grouped = nn.Conv2d(2, 2, 1, groups=2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.tied_head = nn.Linear(6, 6, bias=False)
        self.tied_head.weight = self.embedding.weight
        self.output_layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.other(self.twin(self.frozen_bias(torch.tanh(self.body(self.embedding(x))))))
        return self.output_layer(self.tied_head(self.frozen(self.normed(x)))).square().mean()


def test_only_layers_with_a_weight_of_their_own_are_touched():
    network = Mixed()
    assert list(preconditioned_layers(network, ("output_layer",))) == ["body", "frozen_bias"]
    assert list(preconditioned_layers(network, ("body",))) == ["frozen_bias", "output_layer"]
    optimizer = mkor(network, state_dtype=torch.float32)
    network(torch.arange(6)).backward()
    before = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    optimizer.step()
    changed = {
        name for name, grad in before.items() if not torch.equal(grad, network.get_parameter(name).grad)
    }
    assert changed == {"body.weight", "body.bias", "frozen_bias.weight"}
    shapes = {name: [len(f.dense()) for f in by.values()] for name, by in optimizer.inverse_factors().items()}
    assert shapes == {"body": [6, 7], "frozen_bias": [6, 6]}


def test_statistics_are_vectors_and_go_away_with_their_hooks():
    layer = nn.Linear(5, 4)
    statistics = LayerStatistics(layer)
    layer(torch.ones(3, 7, 5)).sum().backward()
    a, g = statistics.vectors()
    assert statistics.rows == 21
    assert torch.equal(a, torch.ones(6)) and torch.equal(g, torch.full((4,), 21.0))
    statistics.remove()
    layer(torch.ones(2, 5)).sum().backward()
    assert statistics.vectors() is None
