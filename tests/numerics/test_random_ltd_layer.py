"""Layers of Hugging Face models and of torch that drop tokens: values, positions, masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ltd_layers import BATCH, KEPT, LENGTH, WIDTH, captured, dropping, inputs_of, kept_tokens, sampler, tiny
from torch import Tensor, nn

from ds_efficient.errors import UserError
from ds_efficient.random_ltd.layer import LayerDrop, install

pytest.importorskip("transformers", reason="needs the extra ds_efficient[hf]")


def restricted(mask: Tensor | None, index: Tensor, length: int, *, causal: bool) -> Tensor:
    """Return the additive mask of the whole sequence that hides the dropped tokens from everybody."""
    hidden = torch.ones(index.shape[0], 1, 1, length, dtype=torch.bool)
    hidden.scatter_(3, index[:, None, None, :], False)
    full = hidden.expand(-1, 1, length, -1)
    if causal and mask is None:
        full = full | torch.ones(length, length, dtype=torch.bool).triu(1)
    lowest = torch.finfo(torch.float32).min
    result = torch.zeros(full.shape).masked_fill(full, lowest)
    if mask is None:
        return result
    if mask.dtype == torch.bool:
        return result.masked_fill(~mask, lowest)
    return (result + mask).clamp(min=lowest)


CASES = [
    ("gpt2", "sdpa", "plain"),
    ("gpt2", "eager", "right"),
    ("gpt2", "sdpa", "left"),
    ("llama", "sdpa", "plain"),
    ("llama", "eager", "left"),
    ("llama", "sdpa", "packed"),
    ("mistral", "sdpa", "plain"),
    ("bloom", "eager", "right"),
    ("bert", "sdpa", "right"),
    ("bert", "eager", "plain"),
    ("vit", "sdpa", "plain"),
]


@pytest.mark.parametrize(("kind", "attention", "case"), CASES)
def test_a_layer_of_a_model_equals_the_whole_layer_with_dropped_keys_hidden(
    kind: str, attention: str, case: str
) -> None:
    """Rotary angles, ALiBi, padding, packed documents and windows belong to the original positions."""
    model, layers = tiny(kind, attention)
    layer = model.get_submodule(f"{layers}.1")
    hidden, named = captured(model, layer, inputs_of(kind, case))
    whole = copy.deepcopy(layer)
    length = hidden.shape[1]
    index = kept_tokens(length=length)
    mask = restricted(named.get("attention_mask"), index, length, causal=kind not in ("bert", "vit"))
    expected = whole(hidden, **{**named, "attention_mask": mask})
    dropping(layer)
    found = layer(hidden, **named)
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    at = index[:, :, None].expand(-1, -1, WIDTH)
    visible = torch.ones(BATCH, KEPT, dtype=torch.bool)
    if case in ("right", "left"):  # what padding tokens attend to is nobody's business
        visible = inputs_of(kind, case)["attention_mask"].bool().gather(1, index)
    torch.testing.assert_close(
        found.gather(1, at)[visible], expected.gather(1, at)[visible], rtol=1e-5, atol=1e-6
    )
    untouched = torch.ones(hidden.shape[:2], dtype=torch.bool).scatter_(1, index, False)
    assert torch.equal(found[untouched], hidden[untouched])


def test_causal_attention_without_a_mask_stays_without_one() -> None:
    """So that it runs on the flash kernel."""
    model, layers = tiny("llama", "sdpa")
    layer = model.get_submodule(f"{layers}.1")
    hidden, named = captured(model, layer, inputs_of("llama", "plain"))
    assert named["attention_mask"] is None
    dropping(layer)
    seen: list[Any] = []
    layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    layer(hidden, **named)
    assert seen[0]["attention_mask"] is None
    assert seen[0]["hidden_states"].shape == (BATCH, KEPT, WIDTH)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_later_tokens_change_nothing_before_them(kind: str) -> None:
    model, layers = tiny(kind, "sdpa")
    for number in (0, 1, 2):
        layer = model.get_submodule(f"{layers}.{number}")
        install(layer, LayerDrop(f"layer {number}", number, sampler(layers=(0, 1, 2))))
    inputs = inputs_of(kind, "plain")["input_ids"]
    changed = inputs.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 50
    found, other = model(inputs).last_hidden_state, None
    for number in (0, 1, 2):
        model.get_submodule(f"{layers}.{number}")._token_drop.drop.sampler.passes.restart(0)
    other = model(changed).last_hidden_state
    assert torch.equal(found[:, :8], other[:, :8])
    assert not torch.equal(found[:, 8:], other[:, 8:])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_with_gradient_checkpointing_trains_the_same(reentrant: bool) -> None:
    gradients = []
    for recompute in (False, True):
        model, layers = tiny("gpt2", "sdpa")
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        source = sampler()
        source.passes.watch(model)
        drop = dropping(model.get_submodule(f"{layers}.1"), source)
        for number in range(2):
            model(
                (inputs_of("gpt2", "plain")["input_ids"] + number) % 50
            ).last_hidden_state.sin().sum().backward()
        assert drop.passes == 2
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


def test_flash_attention_of_hugging_face_is_refused_with_the_remedy() -> None:
    model, layers = tiny("llama", "sdpa")
    layer = model.get_submodule(f"{layers}.1")
    hidden, named = captured(model, layer, inputs_of("llama", "plain"))
    dropping(layer)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match='use "sdpa"'):
        layer(hidden, **named)


# ---- torch's own layer ----


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "window", "padding"])
def test_torchs_encoder_layer_in_both_layouts(batch_first: bool, mask: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=batch_first).train()
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    index = kept_tokens()
    full = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    arguments: dict[str, Any] = {}
    if mask == "causal":
        arguments = {"src_mask": full, "is_causal": True}
    elif mask == "window":
        arguments = {"src_mask": full | full.transpose(0, 1).triu(-9).tril(-4)}
    elif mask == "padding":
        arguments = {"src_key_padding_mask": torch.arange(LENGTH).expand(BATCH, -1) >= LENGTH - 2}
    dropped = torch.ones(BATCH, LENGTH, dtype=torch.bool).scatter_(1, index, False)
    hidden = dropped[:, None, :].expand(-1, LENGTH, -1)
    if "src_mask" in arguments:
        hidden = hidden | arguments["src_mask"]
    if mask == "padding":
        hidden = hidden | arguments["src_key_padding_mask"][:, None, :]
    hidden = hidden.clone()
    hidden.diagonal(dim1=1, dim2=2)[dropped] = False  # so that no row is empty
    whole = copy.deepcopy(layer)

    def order(z: Tensor) -> Tensor:
        return z if batch_first else z.transpose(0, 1)

    expected = order(whole(order(x), src_mask=hidden.repeat_interleave(4, dim=0)))
    dropping(layer)
    found = order(layer(order(x), **arguments))
    at = index[:, :, None].expand(-1, -1, WIDTH)
    torch.testing.assert_close(found.gather(1, at), expected.gather(1, at), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[dropped], x[dropped])
