"""What the ranks of the rotary embedding's tests run: a layer of megatron-core that drops tokens."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import random_ltd_ranks
import torch
from random_ltd_ranks import SAMPLES, LayerDrop, sampler


def rotary_ways(dtype: str) -> dict[str, dict[str, np.ndarray]]:
    """Return outputs and gradients with gathered rotary angles, and by the fused embedding without."""
    import megatron_ranks
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_patches import fusions, random_ltd

    megatron_ranks.start()
    kind = getattr(torch, dtype)
    config = random_ltd_ranks._transformer_config(
        1, False, num_query_groups=2, params_dtype=kind, bf16=dtype == "bfloat16"
    )
    layer = random_ltd_ranks._layer(config).to(kind)
    layer.self_attention.linear_qkv.weight.data.mul_(20)  # so that attention tells positions apart
    arguments = random_ltd_ranks._arguments({"rotary": True}, config)
    angles = arguments["rotary_pos_emb"]

    def run(**changes: Any) -> dict[str, np.ndarray]:
        layer.install_token_drop(LayerDrop("layer 0", 0, sampler()))
        layer.zero_grad()
        states, weights = (state.to(kind) for state in random_ltd_ranks._states())
        x = states.requires_grad_()
        y = layer(hidden_states=x, **{**arguments, **changes})[0]
        (y * weights).sum().backward()
        weight = layer.self_attention.linear_qkv.weight.grad
        return {name: t.detach().double().numpy() for name, t in (("y", y), ("dx", x.grad), ("dw", weight))}

    found = {"gathered": run()}
    original = rope_utils._apply_rotary_pos_emb_bshd
    try:
        assert fusions.fuse_rotary_embedding() and not fusions.fuse_rotary_embedding()
        with mock.patch.object(random_ltd, "gather_table", side_effect=AssertionError("gathered")):
            found["fused"] = run()
            found["fused, two tensors"] = run(rotary_pos_emb=(angles, angles.clone()))
            found["fused, of each sample"] = run(rotary_pos_emb=angles.expand(-1, SAMPLES, -1, -1))
            layer.config.recompute_granularity = "selective"
            layer.self_attention.checkpoint_core_attention = True
            found["fused, recomputed"] = run()
            layer.self_attention.checkpoint_core_attention = False
        found["angles of another type"] = run(rotary_pos_emb=angles.double())
        layer.config.rotary_interleaved = True
        found["interleaved, fused"] = run()
    finally:
        rope_utils._apply_rotary_pos_emb_bshd = original
    found["interleaved, gathered"] = run()
    assert not hasattr(angles, "_ds_efficient_kept")
    return found
