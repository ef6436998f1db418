"""What the ranks of ``megatron/`` tests run: they need process groups."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist


def start(tensor: int = 1, pipeline: int = 1) -> None:
    """Start groups and random streams on the CPU."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_patches.cpu_compat import install

    dist.init_process_group("gloo")
    install()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def config(**changes: Any) -> Any:
    """Return a small TransformerConfig."""
    from megatron.core.transformer import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**{**values, **changes})


def attention(groups: int, masked: bool, dtype: str) -> tuple[float, float]:
    """Return the largest errors of our attention and of megatron-core's against fp64 arithmetic by hand."""
    start()
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_patches.attention import SdpaCoreAttention

    kind = getattr(torch, dtype)
    settings = config(num_query_groups=groups, bf16=dtype == "bfloat16", params_dtype=kind)
    generator = torch.Generator().manual_seed(3)
    length, batch, heads, width = 13, 2, 4, 8
    q = torch.randn(length, batch, heads, width, generator=generator).to(kind)
    k, v = (torch.randn(length, batch, groups, width, generator=generator).to(kind) for _ in range(2))
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None].expand(batch, 1, -1, -1).clone()
    if masked:  # a document boundary in the first sample
        hidden[0, :, 6:, :6] = True
    arguments = (settings, 1, AttnMaskType.causal, "self")
    ours = SdpaCoreAttention(*arguments)(q, k, v, hidden if masked else None)
    theirs = DotProductAttention(*arguments)(q, k, v, hidden)
    expected = by_hand(q, k, v, hidden)
    return float((ours.double() - expected).abs().max()), float((theirs.double() - expected).abs().max())


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(d)) v in fp64, one sample and head at a time."""
    length, batch, heads, width = q.shape
    out = torch.zeros(length, batch, heads, width, dtype=torch.float64)
    for sample in range(batch):
        for head in range(heads):
            group = head // (heads // k.shape[2])
            scores = q[:, sample, head].double() @ k[:, sample, group].double().T / width**0.5
            scores = scores.masked_fill(hidden[sample, 0], float("-inf"))
            out[:, sample, head] = torch.softmax(scores, dim=-1) @ v[:, sample, group].double()
    return out.reshape(length, batch, heads * width)


def dropout_streams(tensor: int) -> tuple[list[float], list[float]]:
    """Return numbers drawn inside and outside a fork, and check that forks nest and do not leak."""
    start(tensor=tensor)
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with tracker.fork():
        inside = torch.rand(3)
        with tracker.fork("data-parallel-rng"):
            nested = torch.rand(3)
        more = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    with tracker.fork():
        again = torch.rand(3)
    assert (
        not torch.equal(inside, again) and not torch.equal(inside, more) and not torch.equal(nested, inside)
    )
    with contextlib.suppress(ValueError):
        tracker.add("model-parallel-rng", 99)
        raise AssertionError("a second stream of the same name was accepted")
    return inside.tolist(), torch.rand(3).tolist()


def weights(tensor: int, pipeline: int, swiglu: bool, tied: bool) -> dict[str, Any]:
    """Return every weight of this rank by its global name, with how it is cut."""
    start(tensor=tensor, pipeline=pipeline)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from torch.nn.functional import silu

    from megatron_patches.initialization import global_name, initialize_weights
    from megatron_patches.layer_spec import block_spec, layer_spec

    gate = {"gated_linear_unit": True, "activation_func": silu} if swiglu else {}
    settings = config(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        init_method=lambda weight: weight,
        output_layer_init_method=lambda weight: weight,
        **gate,
    )
    model = GPTModel(
        config=settings,
        transformer_layer_spec=block_spec(settings, lambda index: layer_spec(transformer_config=settings)),
        vocab_size=64,
        max_sequence_length=16,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
    )
    initialize_weights(model, seed=11, std=0.02, num_layers=2)
    offset = model.decoder.layers[0].layer_number - 1
    found = {}
    for name, parameter in model.named_parameters():
        cut = bool(getattr(parameter, "tensor_model_parallel", False)) and tensor > 1
        found[global_name(name, offset, tied=tied)] = (
            parameter.detach().numpy(),
            (getattr(parameter, "partition_dim", 0), getattr(parameter, "partition_stride", 1))
            if cut
            else None,
        )
    return found
