"""What the measurements of layers share: keyed tensors, a linear layer, a block of a GPT, memory counts."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from measuring import ROOT
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

from ds_efficient.core.keys import Key
from ds_efficient.ops.keyed_random import normal

HEAD = 128
KEY = Key(11, ("layer measurements",))
LINEARS = ("qkv", "proj", "fc1", "fc2")


def draw(name: str, *shape: int, like: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """A normal tensor."""
    return (normal(KEY.fold(name), list(shape), device=like) * scale).to(dtype)


def dense_linear(out: int, inputs: int, name: str, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """A linear layer without bias, drawn by key."""
    layer = nn.Linear(inputs, out, bias=False, device="meta")
    layer.weight = nn.Parameter(draw(name, out, inputs, like=device, dtype=dtype, scale=0.02))
    return layer


class Block(nn.Module):
    """A pre-norm block of a GPT: causal attention, and a feed-forward part with tanh-GELU.

    Args:
        hidden: width; heads of 128, or one head where that does not divide.
        device, dtype: of the parameters.
    """

    def __init__(self, hidden: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = max(1, hidden // HEAD)
        self.norm1 = nn.LayerNorm(hidden, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(hidden, device=device, dtype=dtype)
        self.qkv: nn.Module = dense_linear(3 * hidden, hidden, "qkv", device, dtype)
        self.proj: nn.Module = dense_linear(hidden, hidden, "proj", device, dtype)
        self.fc1: nn.Module = dense_linear(4 * hidden, hidden, "fc1", device, dtype)
        self.fc2: nn.Module = dense_linear(hidden, 4 * hidden, "fc2", device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden) to the same."""
        batch, length, hidden = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


def replace(module: nn.Module, names: Sequence[str], make: Callable[[nn.Linear, str], nn.Module]) -> None:
    """Put ``make(linear, name)`` in the place of the linear layers with these names, at any depth."""
    for path, parent in list(module.named_modules()):
        for name in names:
            child = getattr(parent, name, None)
            if type(child) is nn.Linear:
                setattr(parent, name, make(child, f"{path}.{name}" if path else name))


def saved_bytes(module: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that autograd saves in a call of `module`, parameters left out, each piece of memory once."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            found[storage.data_ptr()] = tensor  # kept, so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del result
    return total


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | str:
    """Most bytes that are allocated in a call above those before it; empty on the CPU."""
    if device.type != "cuda":
        return ""
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
