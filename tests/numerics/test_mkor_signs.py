"""MKOR's higher-rank statistics: unbiased, exact in their recursion, keyed, the same in a recomputation."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mkor_runs import batch, factors, linear_twin, mkor, model, normal, same, step_twins, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_efficient.core.keys import Key
from ds_efficient.errors import CheckpointError, UserError
from ds_efficient.mkor import MKOR, signs
from ds_efficient.mkor.bank import FactorBank
from ds_efficient.mkor.factored import FactoredInverse
from ds_efficient.mkor.inverse import DenseInverse, vector_weights
from ds_efficient.mkor.signs import RowSketch, random_signs
from ds_efficient.mkor.statistics import LayerStatistics

CPU = torch.device("cpu")


def sketch(vectors: int, seed: int = 0, **more: Any) -> RowSketch:
    return RowSketch(Key(seed, ("test",)), vectors, lambda: 0, **more)


def every_sign(rows: int) -> Tensor:
    """Return all vectors of so many signs, (rows, 2^rows)."""
    numbers = torch.arange(2**rows)
    return torch.stack([1.0 - 2 * ((numbers >> row) & 1) for row in range(rows)]).double()


@pytest.mark.parametrize("bias", [True, False])
def test_over_all_signs_the_mean_outer_product_is_the_second_moment_and_the_variance_as_stated(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches, of 3 rows and 2: all 32 choices of their signs as 32 vectors."""
    table = every_sign(5)
    layer = nn.Linear(4, 3, bias=bias).double()
    statistics = LayerStatistics(layer, sketch(32))
    inputs, gradients = normal(5, 4, seed=1) + 0.5, normal(5, 3, seed=2)
    for rows in (slice(0, 3), slice(3, 5)):
        monkeypatch.setattr(signs, "random_signs", lambda *_, rows=rows, **__: table[rows])
        (layer(inputs[rows]) * gradients[rows]).sum().backward()  # gradients of a mean: 1/5 of a row's own
    found = statistics.vectors(loss_scale=0.5)
    assert found is not None
    columns = torch.cat([inputs, torch.ones(5, 1).double()], 1) if bias else inputs
    for vectors, x in zip(found, (columns, 5 * 2 * gradients), strict=True):
        exact = x.T @ x / 5
        outer = vectors[:, :, None] * vectors[:, None, :]
        assert torch.allclose(outer.mean(0), exact, rtol=1e-12, atol=1e-12)
        squares = x.square()
        diagonal = exact.diagonal()
        variance = torch.outer(diagonal, diagonal) + exact.square() - 2 / 25 * squares.T @ squares
        assert torch.allclose((outer - exact).square().mean(0), variance, rtol=1e-11, atol=1e-11)


def test_keyed_signs_give_the_second_moment_within_five_sigma() -> None:
    x = normal(40, 6, seed=3) + 1
    exact, draws = x.T @ x / 40, 200
    total = torch.zeros_like(exact)
    for seed in range(draws):
        found = sketch(64, seed).of_rows("right", (seed % 3, seed % 5), x) / math.sqrt(40)
        total += found[:, :-1].T @ found[:, :-1] / 64
        assert torch.equal(found.mul(math.sqrt(40))[:, -1].round() % 2, torch.zeros(64))  # of 40 signs
    diagonal, squares = exact.diagonal(), x.square()
    variance = torch.outer(diagonal, diagonal) + exact.square() - 2 / 1600 * squares.T @ squares
    error = (total / draws - exact).abs()
    assert (error < 5 * (variance / (64 * draws)).sqrt()).all() and error.max() > 0


def test_signs_are_fair_independent_and_those_of_their_row() -> None:
    whole = random_signs(7, 4096, 40, dtype=torch.float64, device=CPU)
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    overlap = whole.T @ whole / 4096 - torch.eye(40)
    assert overlap.abs().max() < 5 / 64 and whole.mean(0).abs().max() < 5 / 64
    part = random_signs(7, 96, 40, first=4000, dtype=torch.float64, device=CPU)
    assert torch.equal(part, whole[4000:])


def test_rounded_inputs_are_summed_in_fp32_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(3, 50, 8, seed=4, dtype=torch.bfloat16)
    exact = sketch(5).of_rows("left", (1, 2), x.double())
    monkeypatch.setattr(signs, "_CHUNK", 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = sketch(5).of_rows("left", (1, 2), x)
    assert found.dtype == torch.float32 and found.shape == (5, 9)
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_draw_is_named_by_step_pass_side_rank_and_shard() -> None:
    x = 2 ** torch.arange(48.0, dtype=torch.float64)[:, None]  # a sum tells all signs

    def drawn(side: str = "right", named: tuple[int, int] = (3, 1), rank: int = 2, shard: int = 1) -> Tensor:
        return sketch(1, rank=rank, shards={"right": shard}).of_rows(side, named, x)

    first = drawn()
    assert torch.equal(first, drawn())
    others = [drawn("left"), drawn(named=(4, 1)), drawn(named=(3, 2)), drawn(rank=1), drawn(shard=0)]
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(drawn("left", shard=0), drawn("left"))  # a side whose rows all shards share


@given(
    size=st.integers(1, 12),
    vectors=st.integers(1, 6),
    gamma=st.sampled_from([0.3, 0.9, 0.95, 0.999]),
    length=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
)
@settings(deadline=None, max_examples=40)
def test_updates_are_the_inverse_of_the_recursion(
    size: int, vectors: int, gamma: float, length: float
) -> None:
    dense, low = DenseInverse(size, torch.float64), FactoredInverse(size, size, torch.float64)
    exact = torch.eye(size, dtype=torch.float64)
    each, weights = vector_weights(gamma, vectors)
    assert each**vectors == pytest.approx(gamma, rel=1e-12)
    for step in range(5):
        v = length * normal(vectors, size, seed=step)
        exact = gamma * exact + (1 - gamma) / vectors * v.T @ v
        for factor in (dense, low):
            for vector, weight in zip(v, weights, strict=True):
                factor.update(vector * weight, each)
    for factor in (dense, low):
        m = factor.dense()
        assert torch.linalg.eigvalsh(m).min() > 0
        scale = m.abs().max() * exact.abs().max()
        assert (m @ exact - torch.eye(size)).abs().max() < 1e-10 * max(1.0, length) * max(1.0, float(scale))


def test_one_vector_is_taken_in_as_it_is_and_gamma_of_one_changes_nothing() -> None:
    assert vector_weights(0.95, 1) == (0.95, [1.0])
    assert vector_weights(1.0, 3) == (1.0, [1.0] * 3)
    with pytest.raises(UserError, match="gamma=0"):
        vector_weights(0.0, 2)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_bank_takes_several_vectors_in_and_blends_once(form: str) -> None:
    bank = FactorBank(
        {"a": (6, 5), "b": (9, 5)}, sides="both", form=form, max_rank=16, dtype=torch.float32,
        operand_dtype=torch.float32, gamma=0.9, threshold=1.3, zeta=0.5, device=CPU,
    )  # fmt: skip
    by_hand = {n: {"left": DenseInverse(o), "right": DenseInverse(5)} for n, o in (("a", 6), ("b", 9))}
    each, weights = vector_weights(0.9, 3)
    for step in range(5):
        found = {
            name: {side: normal(3, factor.size, seed=7 * step + factor.size, dtype=torch.float32)
                   for side, factor in pair.items()}
            for name, pair in by_hand.items()
        }  # fmt: skip
        bank.update(found)
        for name, pair in by_hand.items():
            for side, factor in pair.items():
                factor.stabilize(1.3, 0.5)
                for vector, weight in zip(found[name][side], weights, strict=True):
                    factor.update(vector * weight, each)
    for name, pair in by_hand.items():
        for side, factor in pair.items():
            times = bank._multiplier(name, side).times(torch.eye(factor.size))
            assert torch.allclose(times, factor.dense(), atol=3e-5)
    hits = [int(factor.hits) for pair in by_hand.values() for factor in pair.values()]
    assert bank.hits.tolist() == hits and sum(hits) > 0
    assert bank.taken.tolist() == [5] * 4
    before = bank.state("a")["factors"]
    found["a"]["left"][2, 1] = math.nan  # the last of three, of one side
    bank.update(found)
    after = bank.state("a")["factors"]
    assert all(torch.equal(after[s][k], before[s][k]) for s in before for k in before[s])
    assert bank.left_out.tolist() == [1, 1, 0, 0] and bank.taken.tolist() == [5, 5, 6, 6]


class Around(nn.Module):
    """A network, recomputed or as it is."""

    def __init__(self, inside: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.inside, self.reentrant = inside, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.inside(x)
        return checkpoint(self.inside, x.requires_grad_(), use_reentrant=self.reentrant)


def wrapped_mkor(network: nn.Module, **more: Any) -> MKOR:
    return mkor(network, statistics_rank=3, **more)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_recomputation_finds_the_signs_of_its_pass(reentrant: bool, bias: bool) -> None:
    networks = [Around(model(bias), None), Around(model(bias), reentrant)]
    optimizers = [wrapped_mkor(network) for network in networks]
    for network, optimizer in zip(networks, optimizers, strict=True):
        train(network, optimizer, range(4), 2)
    assert same(*networks, tolerance=1e-13)
    pairs = zip(*map(factors, optimizers), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in pairs)


def test_the_seed_decides_and_torchs_generator_is_left_alone() -> None:
    networks = [model() for _ in range(3)]
    before = torch.get_rng_state()
    found = []
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        optimizer = wrapped_mkor(network, seed=seed)
        train(network, optimizer, range(3), 2)
        found.append(factors(optimizer))
    assert torch.equal(torch.get_rng_state(), before)
    one, again, other = found
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.linalg.eigvalsh(m).min() > 0 for m in one)


@pytest.mark.parametrize("bias", [True, False])
def test_a_scaled_loss_and_passes_that_were_thrown_away_change_nothing(bias: bool) -> None:
    networks = [model(bias) for _ in range(2)]
    optimizers = [wrapped_mkor(network, inner="AdamW") for network in networks]
    for step in range(4):
        F.mse_loss(networks[1](batch(55)[0]), batch(55)[1]).backward()
        optimizers[1].zero_grad()
        train(networks[0], optimizers[0], range(step, step + 1), 2)
        train(networks[1], optimizers[1], range(step, step + 1), 2, scale=2.0**16)
    assert same(*networks)


def test_values_that_are_not_finite_leave_the_factors() -> None:
    network = model()
    optimizer = wrapped_mkor(network, inversion_interval=1)
    train(network, optimizer, range(3))
    before = factors(optimizer)
    x, y = batch(3)
    x[2, 1] = y[2, 1] = math.inf
    F.mse_loss(network(x), y).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, factors(optimizer), strict=True))
    assert optimizer.skipped_updates() == {"0": 1, "2": 1}


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_saved_run_goes_on_bit_for_bit(form: str) -> None:
    def fresh() -> tuple[nn.Module, MKOR]:
        network = model()
        return network, wrapped_mkor(network, inner="AdamW", form=form, max_rank=4)

    straight, optimizer = fresh()
    train(straight, optimizer, range(7))
    first, before = fresh()
    train(first, before, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "mkor": before.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, after = fresh()
    train(second, after, range(1))  # what it did before must not matter
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["mkor"])
    train(second, after, range(4, 7))
    assert same(straight, second)
    assert all(torch.equal(a, b) for a, b in zip(factors(optimizer), factors(after), strict=True))


def test_states_of_another_rank_or_seed_are_refused_and_older_ones_have_rank_one() -> None:
    network = model()
    state = mkor(network).state_dict()
    del state["settings"]["statistics_rank"], state["settings"]["seed"]
    mkor(network, seed=4).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"'statistics_rank': 1.*'statistics_rank': 3"):
        wrapped_mkor(network).load_state_dict(state)
    with pytest.raises(CheckpointError, match="'seed': 0"):
        wrapped_mkor(network, seed=2).load_state_dict(wrapped_mkor(network).state_dict())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "padding, stride, dilation, mode, unbatched",
    [(0, 1, 1, "zeros", False), ((1, 0), (2, 1), 1, "circular", False), (0, 2, 2, "zeros", True)],
)
def test_a_convolution_is_the_linear_layer_of_its_patches(
    bias: bool, padding: Any, stride: Any, dilation: int, mode: str, unbatched: bool
) -> None:
    conv = nn.Conv2d(
        2, 3, (3, 2), stride=stride, padding=padding, dilation=dilation, padding_mode=mode, bias=bias
    ).double()
    linear = linear_twin(conv)
    x = normal(2, 9, 8, seed=3) if unbatched else normal(4, 2, 9, 8, seed=3)
    whole = x[None] if unbatched else x
    padded = F.pad(
        whole, conv._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else "circular"
    )
    patches = F.unfold(padded, (3, 2), stride=stride, dilation=dilation)
    optimizers = step_twins(conv, linear, x, patches, wrapped_mkor)
    assert torch.allclose(conv.weight.flatten(1), linear.weight, rtol=1e-10)
    for a, b in zip(*map(factors, optimizers), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_ranks_that_cannot_be_are_refused_by_name() -> None:
    for rank in (0, 65, 2.0, True):
        with pytest.raises(UserError, match=f"statistics_rank={rank}; allowed: 1 to 64"):
            mkor(model(), statistics_rank=rank)
    with pytest.raises(UserError, match="statistics_rank=2 with formula='printed'"):
        mkor(model(), statistics_rank=2, formula="printed")
