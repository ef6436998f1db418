"""Small layers and models for the tests of dropped tokens, and the choice of tokens as it is documented."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ds_efficient.core.keys import Key
from ds_efficient.core.passes import Passes
from ds_efficient.ops.random_ltd import sample_tokens
from ds_efficient.random_ltd.config import TokenScheduleConfig
from ds_efficient.random_ltd.layer import LayerDrop, install
from ds_efficient.random_ltd.sampler import TokenSampler

KEY = Key(5, ("random_ltd",))
LENGTH, BATCH, KEPT, WIDTH = 12, 3, 5, 32


def sampler(
    kept: int = KEPT, *, step: int = 0, rank: int = 0, layers: tuple[int, ...] = (1,)
) -> TokenSampler:
    config = TokenScheduleConfig.model_validate(
        {"min_value": kept, "schedule_config": {"require_steps": 10**6, "seq_per_step": 1}}
    )
    made = TokenSampler(KEY, config, Passes(step), rank=rank)
    made.layers = list(layers)
    return made


def dropping(layer: nn.Module, source: TokenSampler | None = None, **arguments: Any) -> LayerDrop:
    drop = LayerDrop("layers.1", 1, source or sampler())
    install(layer, drop, **arguments)
    return drop


def kept_tokens(
    micro_batch: int = 0, *, step: int = 0, layer: int = 1, rank: int = 0, **sizes: int
) -> Tensor:
    """Return the documented choice: keyed by (seed, step, micro-batch, layer, data-parallel rank)."""
    length, kept, batch = (
        sizes.get(name, default) for name, default in (("length", LENGTH), ("kept", KEPT), ("batch", BATCH))
    )
    return sample_tokens(length, kept, batch, key=KEY.fold(step, micro_batch, layer, rank))


class Block(nn.Module):
    """A residual block with its own mixing of tokens, so that neighbours matter."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.fc = nn.Linear(WIDTH, WIDTH)
        self.tag = "own"

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = torch.tanh(self.fc(x) + x.mean(1, keepdim=True))
        return x + (y if scale is None else y * scale)


def states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(4))


def tiny(kind: str, attention: str) -> tuple[nn.Module, str]:
    """Return a model of three layers without dropout, and the name of its list of layers."""
    import transformers

    small = {"num_hidden_layers": 3, "hidden_size": WIDTH, "num_attention_heads": 4, "vocab_size": 50}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            config = transformers.GPT2Config(
                n_layer=3,
                n_embd=WIDTH,
                n_head=4,
                vocab_size=50,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
            model, layers = transformers.GPT2Model._from_config(config, attn_implementation=attention), "h"
        elif kind in ("llama", "mistral"):
            made = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[kind]
            window = {"sliding_window": 4} if kind == "mistral" else {}
            config = made(**small, intermediate_size=48, num_key_value_heads=2, **window)
            model = transformers.AutoModel.from_config(config, attn_implementation=attention)
            layers = "layers"
        elif kind == "bloom":
            config = transformers.BloomConfig(
                n_layer=3,
                hidden_size=WIDTH,
                n_head=4,
                vocab_size=50,
                hidden_dropout=0.0,
                attention_dropout=0.0,
            )
            model, layers = transformers.BloomModel(config), "h"
        elif kind == "bert":
            config = transformers.BertConfig(**small, intermediate_size=48, **no_dropout)
            model = transformers.BertModel._from_config(config, attn_implementation=attention)
            layers = "encoder.layer"
        else:
            sizes = {name: small[name] for name in small if name != "vocab_size"}
            config = transformers.ViTConfig(
                **sizes, intermediate_size=48, image_size=24, patch_size=8, num_channels=1, **no_dropout
            )
            model = transformers.ViTModel._from_config(config, attn_implementation=attention)
            layers = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return model.train(), layers


def inputs_of(kind: str, case: str) -> dict[str, Tensor]:
    """Return a batch: plain, with padding at the right or left, or two documents in a row."""
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(BATCH, 1, 24, 24, generator=generator)}
    inputs: dict[str, Tensor] = {"input_ids": torch.randint(50, (BATCH, LENGTH), generator=generator)}
    if case in ("right", "left"):
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        for sample, count in enumerate((0, 3, 6)):
            mask[sample, slice(LENGTH - count, None) if case == "right" else slice(0, count)] = 0
        inputs["attention_mask"] = mask
    if case == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(7), torch.arange(LENGTH - 7)]).expand(BATCH, -1)
    return inputs


def captured(model: nn.Module, layer: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Return the hidden states and the other arguments by name that the model calls a layer with."""
    calls: list[tuple[Any, Any]] = []
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    model(**inputs, **({} if hasattr(model.config, "image_size") else {"use_cache": False}))
    hook.remove()
    args, kwargs = calls[0]
    names = [name for name in inspect.signature(type(layer).forward).parameters if name != "self"]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return named.pop("hidden_states").detach(), named
