"""Operands follow weight, masks and dtype: on the CPU, through the fake cuSPARSELt that computes there."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_cusparselt import fake_library  # noqa: F401

from ds_efficient.core.keys import Key
from ds_efficient.ops import cusparselt
from ds_efficient.slope.linear import SlopeLinear
from ds_efficient.slope.operands import Operands

TILES = {"tiles": 1}
REAL_TUNE = Operands._tune


@pytest.fixture(autouse=True)
def on_the_cpu(fake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fake run for CPU tensors, in as many tiles as a test says."""
    monkeypatch.setattr(Operands, "_obstacle", lambda self, x, rows, inner: None)
    monkeypatch.setitem(TILES, "tiles", 1)
    monkeypatch.setattr(
        Operands,
        "_tune",
        staticmethod(
            lambda x, rows, inner: cusparselt.Choice("cusparselt", TILES["tiles"], 1, 1.5, 1.0, 1.5)
        ),
    )


def layer(pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16, **options: object) -> SlopeLinear:
    return SlopeLinear(64, 128, False, pattern=pattern, dtype=dtype, key=Key(3), **options)  # type: ignore[arg-type]


def check(sparse: SlopeLinear, tokens: int = 32) -> None:
    """Compare outputs and input gradient with products of the dense masked weights."""
    x = torch.linspace(-1, 1, tokens * 64).reshape(tokens, 64).to(sparse.weight.dtype).requires_grad_()
    dy = torch.linspace(1, -2, tokens * 128).reshape(tokens, 128).to(sparse.weight.dtype)
    y = sparse(x)
    y.backward(dy)
    forward = sparse.dense_weight().float()
    assert x.grad is not None
    torch.testing.assert_close(y.float(), x.detach().float() @ forward.t(), rtol=2e-2, atol=2e-2)
    expected = dy.float() @ (forward * sparse.backward_mask())
    torch.testing.assert_close(x.grad.float(), expected, rtol=2e-2, atol=4e-2)
    assert set(sparse.slope.operands.choices.values()) == {"cusparselt"}


def operand_of(sparse: SlopeLinear) -> cusparselt.SparseOperand:
    return sparse.slope.operands._built[False].operand


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "1:4", "2:8", "2:16"])
def test_products_of_every_fitting_pattern(pattern: str) -> None:
    check(layer(pattern), 32)
    check(layer(pattern), 7)


@pytest.mark.parametrize(
    ("pattern", "tiles", "shared"), [("2:4", 1, True), ("1:2", 1, True), ("2:8", 1, False), ("2:4", 2, False)]
)
def test_the_weight_lives_in_its_operand_where_it_can(pattern: str, tiles: int, shared: bool) -> None:
    TILES["tiles"] = tiles
    sparse = layer(pattern)
    before = sparse.weight.detach().clone()
    check(sparse)
    assert (sparse.weight.data_ptr() == operand_of(sparse).buffer.data_ptr()) == shared
    assert torch.equal(sparse.weight, before)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.step()
        check(sparse)
    sparse.refresh()
    check(sparse)


def test_a_shared_weight_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = layer()
    check(sparse)
    written: list[bool] = []
    original = Operands._write_values

    def counting(self: Operands, operand: object, weight: object, mask: object, column_mask: object) -> None:
        written.append(column_mask is not None)
        original(self, operand, weight, mask, column_mask)  # type: ignore[arg-type]

    monkeypatch.setattr(Operands, "_write_values", counting)
    check(sparse)
    check(sparse)
    # once, because moving the weight into its operand gave it another address
    assert written in ([], [True])
    written.clear()
    with torch.no_grad():
        sparse.weight.mul_(2)
    check(sparse)
    assert written == [True], "only the backward operand holds a copy"


def test_loaded_states_bring_their_masks_along() -> None:
    sparse = layer()
    state = SlopeLinear(64, 128, False, dtype=torch.bfloat16, key=Key(99)).state_dict()
    check(sparse)
    sparse.load_state_dict(state)
    assert torch.equal(sparse.weight, state["weight"])
    check(sparse)
    assert torch.equal(sparse.weight, state["weight"]), "a new pattern must not overwrite the weight"


def test_a_weight_in_a_flat_buffer_stays_there_and_is_followed() -> None:
    sparse = layer()
    check(sparse)
    flat = torch.zeros(3 * sparse.weight.numel(), dtype=torch.bfloat16)
    place = flat[sparse.weight.numel() : 2 * sparse.weight.numel()]
    place.copy_(sparse.weight.detach().flatten())
    sparse.weight.data = place.view_as(sparse.weight)
    check(sparse)
    flat.mul_(3)
    check(sparse)
    assert sparse.weight.data_ptr() == place.data_ptr()


def test_a_managed_weight_in_a_flat_buffer_is_renewed_when_told() -> None:
    sparse = layer()
    flat = torch.cat([sparse.weight.detach().flatten()] * 2)
    sparse.weight.data = flat[: sparse.weight.numel()].view_as(sparse.weight)
    sparse.slope.operands.managed = True
    check(sparse)
    flat.mul_(2)
    sparse.slope.operands.weight_changed()
    check(sparse)


@pytest.mark.parametrize("partitioned", [True, False])
def test_transient_operands_leave_only_metadata_between_uses(partitioned: bool) -> None:
    sparse = layer()
    if partitioned:  # by ZeRO-3
        vars(sparse.weight).update(ds_id=0)
    sparse.slope.operands.rewritten = not partitioned
    for _ in range(2):
        check(sparse)
        with torch.no_grad():
            sparse.weight.mul_(2)
    sparse.refresh()
    check(sparse)
    built = sparse.slope.operands._built
    assert all(entry.held is None and entry.metadata is not None for entry in built.values())
    assert 0 < sparse.slope.operands.nbytes() <= 2 * 64 * 128 // 8 * 2
    assert sparse.weight.untyped_storage().nbytes() == sparse.weight.nbytes


def test_autocast_casts_are_never_taken_for_unchanged() -> None:
    sparse = layer(dtype=torch.float32)
    x = torch.ones(16, 64)
    for factor in (1, 2, 4):
        with torch.no_grad():
            sparse.weight.fill_(factor)
        with torch.autocast("cpu", torch.bfloat16):
            y = sparse(x)
        assert y.dtype == torch.bfloat16 and bool((y == 32 * factor).all())


def test_copies_have_operands_of_their_own() -> None:
    sparse = layer()
    with torch.inference_mode():
        sparse(torch.ones(16, 64, dtype=torch.bfloat16))
    check(sparse)
    twin = copy.deepcopy(sparse)
    with torch.no_grad():
        twin.weight.mul_(2)
    check(twin)
    check(sparse)
    assert operand_of(twin).buffer.data_ptr() != operand_of(sparse).buffer.data_ptr()
    check(sparse.half())


def test_new_column_masks_reach_the_backward_operand() -> None:
    sparse = layer()
    check(sparse)
    before = sparse.backward_mask()
    with torch.no_grad():
        sparse.weight.copy_(sparse.weight.flip(0))
    sparse.refresh()
    assert not torch.equal(before, sparse.backward_mask())
    check(sparse)


@pytest.mark.parametrize(("tokens", "tuned"), [(1, 2), (8192, 8192), (8193, 16384), (200_000, 16384)])
def test_a_choice_is_measured_with_the_next_power_of_two_of_tokens(
    monkeypatch: pytest.MonkeyPatch, tokens: int, tuned: int
) -> None:
    asked: list[int] = []

    def tune(rows: int, inner: int, tokens: int, dtype: object, device: object) -> cusparselt.Choice:
        asked.append(tokens)
        return cusparselt.Choice("cusparselt", 1, 1, 1.5, 1.0, 1.5)

    monkeypatch.setattr(cusparselt, "tune", tune)
    REAL_TUNE(torch.empty(tokens, 1), 64, 64)
    assert asked == [tuned]


def test_without_a_choice_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(x: object, rows: int, inner: int) -> cusparselt.Choice:
        raise AssertionError("measured")

    monkeypatch.setattr(Operands, "_tune", staticmethod(refuse))
    check(layer(backend="cusparselt"))
