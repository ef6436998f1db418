"""Any layer that drops tokens: gradients, recomputation, which tokens when, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ltd_layers import BATCH, LENGTH, WIDTH, Block, dropping, kept_tokens, sampler, states
from torch import Tensor, nn

from ds_efficient.errors import UserError
from ds_efficient.random_ltd.layer import LayerDrop, install


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_those_of_plain_indexing_also_with_another_consumer(dtype: torch.dtype) -> None:
    block = Block().to(dtype)
    plain = copy.deepcopy(block)
    dropping(block)
    index = kept_tokens()
    at = index[:, :, None].expand(-1, -1, WIDTH)
    gradients = []
    for run in ("ours", "indexing"):
        x = states(dtype).requires_grad_()
        if run == "ours":
            y, module = block(x), block
        else:
            y, module = x.scatter(1, at, plain(x.gather(1, at))), plain
        (y.sin() + 0.5 * x.square()).sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_layer_keeps_its_names_attributes_hooks_and_kind() -> None:
    block = Block()
    names, tag = list(block.state_dict()), block.tag
    calls: list[int] = []
    block.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
    dropping(block)
    assert list(block.state_dict()) == names and [name for name, _ in block.named_modules()] == ["", "fc"]
    assert isinstance(block, Block) and type(block).__name__ == "Block" and block.tag == tag
    block(states())
    assert calls == [LENGTH]
    block.load_state_dict(Block().state_dict())


def test_nothing_is_dropped_in_evaluation_without_gradients_or_once_all_are_kept() -> None:
    x = states()
    plain = Block()
    expected = plain(x)
    block = Block()
    drop = dropping(block)
    assert torch.equal(block.eval()(x), expected)
    block.train()
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    assert drop.passes == 0
    assert not torch.equal(block(x), expected)
    full = Block()
    drop = dropping(full, sampler(LENGTH))
    assert torch.equal(full(x), expected)
    assert (drop.passes, drop.dropped) == (1, 0)


def test_the_same_global_random_state_after_as_before() -> None:
    block = Block()
    dropping(block)
    before = torch.get_rng_state()
    block(states())
    assert torch.equal(before, torch.get_rng_state())


def rows_moved(block: nn.Module, x: Tensor) -> Tensor:
    """Return which tokens a block processed."""
    return (block(x) != x).any(-1)


def test_every_micro_batch_step_layer_and_rank_has_its_own_tokens() -> None:
    x = states()
    found: dict[tuple[int, int, int, int], Tensor] = {}
    for step in (0, 1):
        for rank in (0, 1):
            source = sampler(step=step, rank=rank, layers=(1, 2))
            blocks = {layer: Block() for layer in (1, 2)}
            for layer, block in blocks.items():
                install(block, LayerDrop(f"layers.{layer}", layer, source))
            for micro_batch in (0, 1):
                for layer, block in blocks.items():
                    moved = rows_moved(block, x)
                    index = kept_tokens(micro_batch, step=step, layer=layer, rank=rank)
                    expected = torch.zeros(BATCH, LENGTH, dtype=torch.bool).scatter_(1, index, True)
                    assert torch.equal(moved, expected)
                    found[step, rank, micro_batch, layer] = moved
    values = list(found.values())
    assert len({tuple(one.flatten().tolist()) for one in values}) == len(values)
    assert all(len({tuple(row.tolist()) for row in one}) > 1 for one in values)  # samples differ


class Stack(nn.Module):
    """Four blocks, each or each two of them recomputed."""

    def __init__(self, chunk: int, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(4)])
        self.chunk, self.reentrant = chunk, reentrant

    def part(self, x: Tensor, first: int) -> Tensor:
        for layer in self.layers[first : first + (self.chunk or 4)]:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if not self.chunk:
            return self.part(x, 0)
        for first in range(0, 4, self.chunk):
            x = torch.utils.checkpoint.checkpoint(self.part, x, first, use_reentrant=self.reentrant)
        return x


def siamese(stack: Stack) -> Tensor:
    """One backward pass for two forward ones: the second is recomputed first."""
    a = states().requires_grad_()
    b = (states() + 1).requires_grad_()
    (stack(a).sin().sum() + 2 * stack(b).cos().sum()).backward()
    return torch.cat([a.grad.flatten(), b.grad.flatten()])  # type: ignore[union-attr]


def in_flight(stack: Stack) -> Tensor:
    """Three micro-batches as in a pipeline: two forward passes ahead of the backward pass."""
    xs = [(states() + number).requires_grad_() for number in range(3)]
    first, second = (stack(x).sin().sum() for x in xs[:2])
    first.backward()
    third = stack(xs[2]).sin().sum()
    second.backward()
    third.backward()
    return torch.cat([x.grad.flatten() for x in xs])  # type: ignore[union-attr]


@pytest.mark.parametrize("order", [siamese, in_flight])
@pytest.mark.parametrize(("chunk", "reentrant"), [(1, True), (1, False), (2, True), (2, False), (4, True)])
def test_recomputation_finds_the_tokens_of_its_own_forward_pass(
    order: Callable[[Stack], Tensor], chunk: int, reentrant: bool
) -> None:
    results = []
    for chunked in (0, chunk):
        stack = Stack(chunked, reentrant)
        source = sampler(layers=(1, 2))
        source.passes.watch(stack)
        drops = [LayerDrop(f"layers.{number}", number, source) for number in (1, 2)]
        for drop in drops:
            install(stack.layers[drop.layer], drop)
        gradient = order(stack)
        weights = [parameter.grad for parameter in stack.parameters()]
        results.append((gradient, weights, [(drop.passes, drop.dropped) for drop in drops]))
    (expected, weights, counts), (found, other, again) = results
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))
    assert counts == again and counts[0][0] == (2 if order is siamese else 3)


# ---- what is refused ----


def refusal(block: nn.Module, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        block(*args, **kwargs)
    return str(caught.value)


class Cache:
    """Keys and values: empty, or of this layer, or of the one before it only."""

    def __init__(self, *filled: int) -> None:
        self.filled = filled

    def get_seq_length(self, layer: int = 0) -> int:
        return 2 if layer in self.filled else 0


class Takes(Block):
    """Accepts anything."""

    def forward(self, x: Tensor, **others: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("cu_seqlens", torch.tensor([0, LENGTH]), "packed"),
        ("weights", torch.zeros(BATCH, LENGTH), "does not know"),
        ("past_key_values", Cache(), None),
        ("freqs_cis", torch.zeros(LENGTH, 4), "(batch, 12, ...) is needed"),
        ("attention_mask", torch.zeros(BATCH, 1, LENGTH, LENGTH + 1), "no mask over 12 tokens"),
        ("attention_mask", object(), "cannot be gathered"),
    ],
)
def test_arguments_that_cannot_follow_are_refused_by_name(name: str, value: Any, part: str | None) -> None:
    block = Takes()
    dropping(block)
    if part is None:  # an empty cache is left out
        block(states(), **{name: value})
        block(states(), **{name: Cache(0)})
        value, part = Cache(0, 1), "evaluation mode"
    message = refusal(block, states(), **{name: value})
    assert name in message and part in message and "random_ltd_layer_id" in message


def test_layers_that_count_positions_by_themselves_are_refused() -> None:
    class RotaryEmbedding(nn.Module):
        pass

    block = Block()
    block.rotary = RotaryEmbedding()
    dropping(block)
    assert "RotaryEmbedding makes positions" in refusal(block, states())


def test_hidden_states_of_another_form_are_refused() -> None:
    block = Block()
    dropping(block)
    assert "(7, 32)" in refusal(block, torch.zeros(7, WIDTH))


def test_a_layer_is_not_installed_twice_nor_behind_another_tool() -> None:
    block = Block()
    dropping(block)
    with pytest.raises(UserError, match="drops tokens already"):
        dropping(block)
    other = Block()
    other.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(UserError, match="another tool"):
        dropping(other)


def test_another_name_of_the_mask_can_be_said() -> None:
    class Named(Block):
        def forward(self, x: Tensor, my_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            assert my_mask is not None
            self.seen = my_mask
            return super().forward(x)

    block = Named()
    dropping(block, mask_name="my_mask")
    mask = torch.arange(BATCH * LENGTH * LENGTH).view(BATCH, 1, LENGTH, LENGTH)
    block(states(), my_mask=mask)
    index = kept_tokens()
    for sample in range(BATCH):
        assert torch.equal(block.seen[sample, 0], mask[sample, 0][index[sample]][:, index[sample]])


def test_a_compiled_model_does_the_same_without_compiling_again_for_each_pass() -> None:
    results, graphs = [], []
    for compiled in (False, True):
        stack = Stack(0, False)
        source = sampler(layers=(1,))
        source.passes.watch(stack)
        install(stack.layers[1], LayerDrop("layers.1", 1, source))
        seen: list[int] = []

        def backend(module: Any, inputs: Any, seen: list[int] = seen) -> Any:
            seen.append(len(inputs))
            return module.forward

        if compiled:
            stack.compile(backend=backend)
        found = []
        for number in range(4):
            x = (states() + number).requires_grad_()
            y = stack(x)
            y.sin().sum().backward()
            found += [y.detach(), x.grad]
            graphs.append(len(seen))
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert graphs[4] > 0 and graphs[-1] == graphs[4]
