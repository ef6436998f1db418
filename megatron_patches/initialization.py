"""Initial weights drawn by key: the same model on any device and any parallel layout.

Megatron-LM draws from per-rank generators, so that another tensor- or pipeline-parallel size is another
model. Here each parameter's values depend only on (seed, its global name, the element's place in the whole
matrix).
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from ds_efficient.core.keys import derive_key
from ds_efficient.ops.keyed_random import normal

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_TIED_COPY = ("output_layer.weight", "embedding.word_embeddings.weight")
# Residual branches end here; 1/sqrt(2 x layers) keeps the sum's variance (GPT-2, section 2.3).
_SCALED = ("linear_proj.weight", "linear_fc2.weight")


def global_name(name: str, offset: int, *, tied: bool) -> str:
    """Return a parameter's name as if all layers were on one rank.

    Args:
        name: name on this pipeline stage.
        offset: layers on earlier stages.
        tied: whether the output weights are the embedding's.
    """
    if tied and name == _TIED_COPY[0]:
        return _TIED_COPY[1]
    return _LAYER.sub(lambda match: str(int(match.group()) + offset), name)


@torch.no_grad()
def initialize_weights(model: Any, *, seed: int, std: float, num_layers: int) -> None:
    """Fill every matrix of `model` in place; norms stay 1 and biases 0.

    Args:
        model: GPTModel of this rank, weights uninitialised.
        seed: run seed.
        std: standard deviation.
        num_layers: layers of the whole model.
    """
    from megatron.core import parallel_state

    layers = model.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    tied = bool(model.share_embeddings_and_output_weights)
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            if name.endswith("bias"):
                parameter.zero_()
            continue
        whole_name = global_name(name, offset, tied=tied)
        scale = std / math.sqrt(2.0 * num_layers) if whole_name.endswith(_SCALED) else std
        cut = size if getattr(parameter, "tensor_model_parallel", False) else 1
        dimension = getattr(parameter, "partition_dim", 0) if cut > 1 else 0
        stride = getattr(parameter, "partition_stride", 1) if cut > 1 else 1
        key = derive_key(seed, layer=whole_name, stream="initial weights")
        parameter.copy_(_shard(parameter, key, cut, rank, dimension, stride) * scale)


def _shard(
    parameter: torch.Tensor, key: int, cut: int, rank: int, dimension: int, stride: int
) -> torch.Tensor:
    """Draw this rank's part of the whole matrix, without drawing the rest where the part is contiguous."""
    shape = list(parameter.shape)
    if cut == 1:
        return normal(key, shape, device=parameter.device)
    if dimension == 0:
        # Gated layers (stride 2) hold a part of the gate's rows, then the same part of the other half's.
        rows = shape[0] // stride
        width = math.prod(shape[1:])
        pieces = [
            normal(
                key,
                [rows, *shape[1:]],
                offset=(piece * cut + rank) * rows * width,
                device=parameter.device,
            )
            for piece in range(stride)
        ]
        return torch.cat(pieces)
    whole = [*shape]
    whole[dimension] *= cut
    parts = normal(key, whole, device=parameter.device).chunk(cut * stride, dim=dimension)
    return torch.cat(parts[rank::cut], dim=dimension)
