"""A plain GPT and its text, for comparing the quality of techniques at equal tokens.

The model is written in torch alone. Initial weights, masks and the order of the samples are drawn by key, so
every arm of a comparison starts from the same weights and sees the same tokens, on every device.
"""

from __future__ import annotations

import json
import lzma
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import ROOT
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

from ds_efficient.core.keys import Key
from ds_efficient.ops.keyed_random import normal, random_bits


@dataclass(frozen=True)
class Size:
    """A model and how it is trained.

    Attributes:
        layers, hidden, heads, sequence, vocabulary: of the model.
        batch: sequences a step.
        steps, lr: of a run.
        windows: sequences of the validation text that an evaluation reads.
        rank: of the adapters.
    """

    layers: int
    hidden: int
    heads: int
    sequence: int
    vocabulary: int
    batch: int
    steps: int
    lr: float
    windows: int
    rank: int


SIZES = {
    "tiny": Size(6, 192, 6, 128, 2048, 4, 240, 2e-3, 48, 16),
    "125m": Size(12, 768, 12, 512, 8192, 32, 500, 6e-4, 256, 64),
    "small": Size(4, 192, 6, 128, 2048, 2, 240, 2e-3, 16, 16),
    "trial": Size(2, 64, 2, 32, 512, 4, 12, 2e-3, 8, 4),
}

LINEARS = ("qkv", "proj", "fc1", "fc2")


class Block(nn.Module):
    """A pre-norm block: causal attention and a feed-forward part with tanh-GELU."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden = size.hidden
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden) to the same."""
        batch, length, hidden = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Token and learned position embeddings, blocks, and an output that shares the token embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.positions = nn.Embedding(size.sequence, size.hidden)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean loss of predicting each next token of (batch, sequence + 1) ids."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        places = torch.arange(inputs.shape[1], device=ids.device)
        x = self.tokens(inputs) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def new_model(size: Size, seed: int, device: torch.device) -> GPT:
    """A model with weights drawn by key: normal, 0.02, and as GPT-2 less for what adds to the residual."""
    with torch.device(device):
        model = GPT(size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = 0.02 / math.sqrt(2 * size.layers) if name.split(".")[-2] in ("proj", "fc2") else 0.02
                key = Key(seed, ("quality", "weights", name))
                parameter.copy_(normal(key, list(parameter.shape), device=device) * scale)
            elif name.endswith("bias"):
                parameter.zero_()
    return model


def replace_linears(model: GPT, make: Callable[[nn.Linear, str], nn.Module]) -> list[Any]:
    """Replace the four linears of each block by ``make(linear, name)``; returns what was made."""
    made = []
    for name, module in list(model.named_modules()):
        if isinstance(module, Block):
            for leaf in LINEARS:
                made.append(make(getattr(module, leaf), f"{name}.{leaf}"))
                setattr(module, leaf, made[-1])
    return made


class Text:
    """Tokens of the training and the validation text, in windows of sequence + 1.

    Args:
        folder: what `prepare` wrote.
        size: of the model.
        device: where the tokens are held.
    """

    def __init__(self, folder: Path, size: Size, device: torch.device) -> None:
        train, valid = (
            torch.from_numpy(np.load(path).astype(np.int32)).to(device)
            for path in token_files(folder, size.vocabulary)
        )
        self.size = size
        self.train = train.unfold(0, size.sequence + 1, size.sequence)
        self.valid = valid.unfold(0, size.sequence + 1, size.sequence)[: size.windows]

    def order(self, seed: int) -> Tensor:
        """The order of the training windows."""
        key = Key(seed, ("quality", "order"))
        return random_bits(key, self.train.shape[0], device=self.train.device).argsort(stable=True)

    def batch(self, order: Tensor, step: int) -> Tensor:
        """Windows of one step, (batch, sequence + 1); after all of them the order begins again."""
        size = self.size.batch
        index = torch.arange(step * size, (step + 1) * size, device=order.device) % order.shape[0]
        return self.train[order[index]].long()

    def validation(self) -> Iterator[Tensor]:
        """Batches of the validation windows."""
        yield from (part.long() for part in self.valid.split(self.size.batch) if part.shape[0])


def token_files(folder: Path, vocabulary: int) -> tuple[Path, Path]:
    """Files with the tokens of the training and the validation text."""
    return folder / f"train-{vocabulary}.npy", folder / f"valid-{vocabulary}.npy"


def prepare(train: Path, valid: Path, folder: Path, vocabulary: int, megabytes: float) -> None:
    """Train a byte-level BPE on the training text and write both texts as uint16 tokens.

    Args:
        train, valid: JSON lines with "text", also compressed (.xz).
        folder: for ``tokenizer-<vocabulary>.json`` and the files of `token_files`.
        vocabulary: of the tokenizer; the first token ends each document.
        megabytes: of the training tokens, at most.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents(train), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / f"tokenizer-{vocabulary}.json"))
    limit = int(megabytes * 1e6) // 2
    for source, target in zip((train, valid), token_files(folder, vocabulary), strict=True):
        ids: list[np.ndarray] = []
        total = 0
        for text in documents(source):
            ids.append(np.array([*tokenizer.encode(text).ids, 0], dtype=np.uint16))
            total += len(ids[-1])
            if total >= limit:
                break
        np.save(target, np.concatenate(ids)[:limit])
        print(f"{target}: {min(total, limit):,} tokens", flush=True)


def documents(path: Path) -> Iterator[str]:
    """The texts of a file of JSON lines."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]
