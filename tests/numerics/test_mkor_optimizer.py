"""MKOR around a torch optimizer: formula, schedule, guards, state, the way back to first order."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from mkor_runs import batch, factors, mkor, model, normal, same, train
from torch import nn

from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.mkor import MKOR, HybridSwitch
from ds_efficient.mkor.statistics import preconditioned_layers


@pytest.mark.parametrize("inner", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_gamma_of_one_is_the_inner_optimizer_bit_for_bit(inner, form):
    one, two = model(), model()
    train(one, mkor(one, inner, gamma=1.0, form=form), range(6))
    train(two, getattr(torch.optim, inner)(two.parameters(), lr=0.05), range(6))
    assert same(one, two)


@pytest.mark.parametrize(
    "inner", [name for name in ("SGD", "AdamW", "RMSprop", "Muon") if hasattr(torch.optim, name)]
)
def test_any_inner_optimizer_learns_from_preconditioned_gradients(inner):
    network, plain = model(bias=False), model(bias=False)  # Muon takes matrices only
    losses = train(network, mkor(network, inner), range(40))
    train(plain, getattr(torch.optim, inner)(plain.parameters(), lr=0.05), range(40))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert not same(network, plain)


@pytest.mark.parametrize("sides", ["both", "left", "right"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_step_is_the_formula_of_the_paper_corrected(sides, bias):
    network = model(bias)
    optimizer = mkor(network, sides=sides, gamma=0.9, threshold=1e9, zeta=0.5)
    inputs = {"0": batch(0)[0]}
    inputs["2"] = torch.tanh(network[0](inputs["0"])).detach()
    optimizer.zero_grad()
    hidden = network[0](inputs["0"])
    hidden.retain_grad()
    output = network[2](torch.tanh(hidden))
    output.retain_grad()
    F.mse_loss(output, batch(0)[1]).backward()
    outputs = {"0": hidden.grad, "2": output.grad}
    expected = {}
    for name, layer in (("0", network[0]), ("2", network[2])):
        a, g = inputs[name].mean(0), outputs[name].sum(0)
        gradient = layer.weight.grad
        if bias:
            a = torch.cat([a, torch.ones(1, dtype=a.dtype)])
            gradient = torch.cat([gradient, layer.bias.grad[:, None]], 1)
            assert torch.allclose(g, layer.bias.grad, rtol=1e-12)
        product = gradient
        if sides != "left":
            product = product @ torch.linalg.inv(
                0.9 * torch.eye(len(a), dtype=a.dtype) + 0.1 * torch.outer(a, a)
            )
        if sides != "right":
            product = (
                torch.linalg.inv(0.9 * torch.eye(len(g), dtype=g.dtype) + 0.1 * torch.outer(g, g)) @ product
            )
        expected[name] = product * gradient.norm() / product.norm()
    optimizer.step()
    for name, layer in (("0", network[0]), ("2", network[2])):
        columns = layer.in_features
        assert torch.allclose(layer.weight.grad, expected[name][:, :columns], rtol=1e-9, atol=1e-13)
        if bias:
            assert torch.allclose(layer.bias.grad, expected[name][:, columns], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
def test_a_scaled_loss_changes_nothing(bias):
    networks = [model(bias) for _ in range(2)]
    for network, scale in zip(networks, (1.0, 2.0**16), strict=True):
        train(network, mkor(network, "AdamW"), range(8), scale=scale)
    assert same(*networks)


def test_factors_change_at_their_interval_and_in_the_warm_up():
    network = model()
    optimizer = mkor(network, inversion_interval=4, warmup_steps=2)
    changed = []
    for step in range(9):
        before = factors(optimizer)
        weight = network[0].weight.detach().clone()
        x, y = batch(step)
        F.mse_loss(network(x), y).backward()
        raw = network[0].weight.grad.clone()
        optimizer.step()
        assert not torch.allclose(network[0].weight.grad, raw)  # preconditioned in every step
        assert not torch.equal(weight, network[0].weight)
        optimizer.zero_grad()
        pairs = zip(before, factors(optimizer), strict=True)
        changed.append(not all(torch.equal(a, b) for a, b in pairs))
    assert changed == [True, True, False, False, True, False, False, False, True]


def test_the_norm_of_each_layer_stays_and_clipping_may_come_before():
    network = model()
    optimizer = mkor(network)
    for step in range(5):
        x, y = batch(step)
        F.mse_loss(network(x), y).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.01)
        norms = [torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm() for layer in network[::2]]
        optimizer.step()
        after = [torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm() for layer in network[::2]]
        assert torch.allclose(torch.stack(norms), torch.stack(after), rtol=1e-12)
        optimizer.zero_grad()


def test_clipping_does_not_change_the_factors():
    results = []
    for bound in (1e9, 1e-3):
        network = model()
        optimizer = mkor(network)
        F.mse_loss(network(batch(0)[0]), batch(0)[1]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), bound)
        optimizer.step()
        results.append(factors(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_leave_the_factors(form, bad):
    network = model()
    optimizer = mkor(network, form=form, inversion_interval=1)
    train(network, optimizer, range(3))
    before = factors(optimizer)
    x, y = batch(3)
    x[2, 1] = y[2, 1] = bad
    F.mse_loss(network(x), y).backward()
    optimizer.param_groups[0]["lr"] = 0.0
    kept = copy.deepcopy(network.state_dict())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, factors(optimizer), strict=True))
    assert optimizer.skipped_updates() == {"0": 1, "2": 1}
    network.load_state_dict(kept)
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.05
    assert all(math.isfinite(loss) for loss in train(network, optimizer, range(4, 8)))


@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_the_factored_form_trains_as_the_dense_one_below_its_rank(sides):
    networks = [model(), model()]
    for network, form in zip(networks, ("dense", "factored"), strict=True):
        train(network, mkor(network, form=form, max_rank=6, sides=sides), range(10))
    assert same(*networks, tolerance=1e-9)


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("saved_at", [3, 4])
def test_a_saved_run_goes_on_bit_for_bit(form, saved_at):
    def fresh():
        network = model()
        hybrid = HybridSwitch(ema=2, min_steps=100)
        return network, mkor(network, "AdamW", form=form, max_rank=3, hybrid=hybrid)

    straight, optimizer = fresh()
    train(straight, optimizer, range(9))
    first, before = fresh()
    train(first, before, range(saved_at))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "mkor": before.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, after = fresh()
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["mkor"])
    train(second, after, range(saved_at, 9))
    assert same(straight, second)
    assert all(torch.equal(a, b) for a, b in zip(factors(optimizer), factors(after), strict=True))


def test_the_hybrid_ends_in_the_inner_optimizer_and_stays_there_after_a_resume():
    network = model()
    optimizer = mkor(network, hybrid=HybridSwitch(beta=0.9, ema=2, min_steps=5))
    train(network, optimizer, range(40))
    assert optimizer.hybrid.switched and not optimizer.active and not optimizer.inverse_factors()
    resumed_network = copy.deepcopy(network)
    plain = copy.deepcopy(network)
    for module in [*plain.modules(), *resumed_network.modules()]:
        assert not module._forward_hooks
    resumed = mkor(resumed_network, hybrid=HybridSwitch(beta=0.9, ema=2, min_steps=5))
    resumed.load_state_dict(optimizer.state_dict())
    assert not resumed.active
    train(network, optimizer, range(40, 45))
    train(resumed_network, resumed, range(40, 45))
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.05), range(40, 45))
    assert same(network, plain) and same(network, resumed_network)


def test_before_the_switch_the_hybrid_is_mkor():
    networks = [model(), model()]
    train(networks[0], mkor(networks[0]), range(8))
    train(networks[1], mkor(networks[1], hybrid=HybridSwitch(min_steps=50)), range(8))
    assert same(*networks)


def test_the_printed_formula_does_not_survive_a_training_run():
    network = model(dtype=torch.float32)
    optimizer = mkor(
        network, formula="printed", state_dtype=torch.float32, inversion_interval=1, threshold=1e300
    )
    x, y = 20 * batch(0, dtype=torch.float32)[0], batch(0, dtype=torch.float32)[1]
    for _ in range(100):
        F.mse_loss(network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not all(torch.isfinite(m).all() and m.abs().max() < 1e20 for m in factors(optimizer))


def test_a_closure_is_called_once_and_its_loss_returned():
    networks = [model(), model()]
    optimizers = [mkor(network) for network in networks]
    train(networks[0], optimizers[0], range(1))
    calls = []

    def closure():
        calls.append(1)
        loss = F.mse_loss(networks[1](batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss

    assert optimizers[1].step(closure).item() > 0
    assert len(calls) == 1 and same(*networks)


def test_a_gradient_scaler_drives_it():
    networks = [model(dtype=torch.float32), model(dtype=torch.float32)]
    optimizers = [mkor(network, "SGD", state_dtype=torch.float32) for network in networks]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        x, y = batch(step, dtype=torch.float32)
        scaler.scale(F.mse_loss(networks[1](x), y)).backward()
        scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1], loss_scale=scaler.get_scale())
        scaler.update()
        optimizers[1].zero_grad()
    train(networks[0], optimizers[0], range(5))
    assert same(*networks, tolerance=1e-6)


def test_it_takes_fewer_steps_than_gradient_descent_where_inputs_are_badly_scaled():
    scales = torch.tensor([4.0, 2.0, 1.0, 0.3, 0.1, 0.1], dtype=torch.float64)

    def last_loss(second_order: bool) -> float:
        network = nn.Linear(6, 3).double()
        with torch.no_grad():
            network.weight.zero_()
            network.bias.zero_()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        stepper = MKOR(network, optimizer, state_dtype=torch.float64) if second_order else optimizer
        x = (normal(64, 6, seed=5) + 2) * scales
        y = x @ normal(6, 3, seed=6) + 1
        for _ in range(60):
            loss = F.mse_loss(network(x), y)
            loss.backward()
            stepper.step()
            stepper.zero_grad()
        return loss.item()

    assert last_loss(True) < last_loss(False)


def test_what_cannot_be_done_is_refused_by_name():
    network = model()
    inner = torch.optim.SGD(network.parameters(), lr=0.1)
    for wrong in (
        {"gamma": 0.0},
        {"inversion_interval": 0},
        {"warmup_steps": -1},
        {"threshold": 0.0},
        {"zeta": 1.0},
        {"gamma": 0.9, "zeta": 0.9},
        {"sides": "up"},
        {"form": "sparse"},
        {"state_dtype": torch.int8},
        {"form": "factored", "max_rank": 0},
        {"formula": "mine"},
    ):
        with pytest.raises(UserError, match=list(wrong)[-1]):
            MKOR(network, inner, **wrong)
    with pytest.raises(UserError, match="closure"):
        MKOR(network, torch.optim.LBFGS(network.parameters()))
    with pytest.raises(UserError, match=r"no nn\.Linear"):
        MKOR(nn.LayerNorm(3), inner)
    with pytest.raises(UserError, match="lazy"):
        preconditioned_layers(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(UserError, match="loss"):
        mkor(network, hybrid=HybridSwitch()).step()
    with pytest.raises(UserError, match="loss_scale"):
        mkor(network).step(loss_scale=0.0)


def test_a_state_of_another_run_is_refused():
    network = model()
    state = mkor(network).state_dict()
    with pytest.raises(CheckpointError, match="left"):
        mkor(network, sides="left").load_state_dict(state)
    with pytest.raises(CheckpointError, match="hybrid"):
        mkor(network, hybrid=HybridSwitch()).load_state_dict(state)
    with pytest.raises(CheckpointError, match="layers 2"):
        mkor(network, exclude=("2",)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="missing"):
        mkor(network).load_state_dict({"steps": 3})
