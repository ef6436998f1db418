"""FLOP formulas agree with torch's own counter and with the measured MFU figures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ds_efficient.core.flops import (
    executed_flops_per_token,
    model_flops_per_token,
    recomputed_layers,
    tflops,
    token_share,
)
from ds_efficient.core.gpu_peaks import find_gpu, mfu, peak_tflops
from ds_efficient.core.inventory import Inventory, ModelShape, Recompute
from ds_efficient.core.technique import Action


def _raw(function):
    function._get_raw = True  # hand over tensors, not shapes
    return function


class TinyGpt(nn.Module):
    """A GPT of a shape in plain torch, for counting; attention written out or fused."""

    def __init__(self, shape: ModelShape, fused: bool) -> None:
        super().__init__()
        self.shape, self.fused = shape, fused
        bias, hidden = shape.add_bias_linear, shape.hidden_size
        self.words = nn.Embedding(shape.vocab_size, hidden)
        self.qkv = nn.ModuleList(
            nn.Linear(hidden, shape.query_size + 2 * shape.kv_size, bias) for _ in range(shape.num_layers)
        )
        self.proj = nn.ModuleList(nn.Linear(shape.query_size, hidden, bias) for _ in self.qkv)
        width = shape.ffn * (2 if shape.swiglu else 1)
        self.fc1 = nn.ModuleList(nn.Linear(hidden, width, bias) for _ in self.qkv)
        self.fc2 = nn.ModuleList(nn.Linear(shape.ffn, hidden, bias) for _ in self.qkv)
        self.output = nn.Linear(hidden, shape.vocab_size, False)

    def layer(self, x: torch.Tensor, index: int) -> torch.Tensor:
        shape, (batch, length, _) = self.shape, x.shape
        sizes = [shape.query_size, shape.kv_size, shape.kv_size]
        q, k, v = (
            part.view(batch, length, -1, shape.head_dim).transpose(1, 2)
            for part in self.qkv[index](x).split(sizes, -1)
        )
        repeat = shape.num_attention_heads // shape.groups
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.proj[index](mixed.transpose(1, 2).reshape(batch, length, -1))
        inner = self.fc1[index](x)
        if shape.swiglu:
            gate, up = inner.chunk(2, -1)
            inner = nn.functional.silu(gate) * up
        return x + self.fc2[index](inner.relu())

    def forward(self, tokens: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        x = self.words(tokens)
        for index in range(self.shape.num_layers):
            if recompute:
                x = torch.utils.checkpoint.checkpoint(self.layer, x, index, use_reentrant=False)
            else:
                x = self.layer(x, index)
        return self.output(x).logsumexp(-1).sum()


def _attention_forward(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch's counter knows the CUDA attention kernels but not the CPU one: its own formulas, for the CPU's name.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _raw(_attention_forward),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _raw(_attention_backward),
}


def _counted(shape: ModelShape, *, fused: bool, recompute: bool = False) -> float:
    torch.manual_seed(0)
    model = TinyGpt(shape, fused)
    tokens = torch.zeros(2, shape.seq_length, dtype=torch.long)
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        model(tokens, recompute).backward()
    return counter.get_total_flops() / tokens.numel()


SHAPES = [
    ModelShape(2, 32, 4, 64, 16),
    ModelShape(3, 32, 4, 96, 8, num_query_groups=2, swiglu=True, ffn_hidden_size=48, add_bias_linear=False),
    ModelShape(1, 32, 2, 64, 32, kv_channels=8, untie_embeddings=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_model_flops_equal_torchs_counter(shape):
    assert model_flops_per_token(shape, causal=False).total == _counted(shape, fused=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_executed_flops_of_fused_attention_equal_torchs_counter(shape):
    # torch counts the whole attention matrix for fused attention, causal or not
    assert executed_flops_per_token(shape, causal=False).total == _counted(shape, fused=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_executed_flops_of_full_recomputation_equal_torchs_counter(shape):
    expected = _counted(shape, fused=False, recompute=True)
    # torch stops a recomputation at the last saved tensor: the very last product of a layer is not repeated
    last = 2.0 * shape.num_layers * shape.ffn * shape.hidden_size
    formula = executed_flops_per_token(
        shape, recompute=Recompute("full", "uniform"), attention="unfused", causal=False
    )
    assert formula.total - last == expected


def test_inventory_of_a_torch_model_counts_its_linear_layers():
    model = TinyGpt(SHAPES[0], False)
    counted = model_flops_per_token(Inventory.from_model(model))
    full = model_flops_per_token(SHAPES[0])
    assert counted.attention == 0
    assert counted.total == full.total - full.attention


def test_known_measurements_give_their_known_utilisation():
    """Tokens/s and MFU measured on one H100: the same convention as the project's recorded figures."""
    for hidden, heads, rate, expected in ((1024, 16, 72.6e3, 0.178), (2048, 16, 37.1e3, 0.318)):
        shape = ModelShape(24, hidden, heads, 50304, 2048, position_embedding_type="rope")
        rate_of_model = tflops(model_flops_per_token(shape), rate)
        assert mfu(rate_of_model, "NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(expected, abs=0.0006)


def test_technique_shares_reduce_only_executed_flops():
    shape = ModelShape(2, 32, 4, 64, 16)
    name = "decoder.layers.0.mlp.linear_fc1"
    dense = executed_flops_per_token(shape)
    sparse = executed_flops_per_token(
        shape,
        actions=[Action(name, "sparse", options={"matmul_share": {"forward": 0.5, "weight_gradient": 0.25}})],
    )
    product = 2 * 32 * 128
    assert dense.total - sparse.total == product * (0.5 + 0.75)
    skipped = Action(name, "skip", "small", options={"matmul_share": {"forward": 0.5}})
    assert executed_flops_per_token(shape, actions=[skipped]) == dense


def test_dropped_tokens_count_linearly_in_products_and_squared_in_attention():
    shape = ModelShape(1, 32, 4, 64, 16)
    dense = executed_flops_per_token(shape)
    half = executed_flops_per_token(
        shape, actions=[Action("decoder.layers.0", "drop tokens", options={"token_share": 0.5})]
    )
    assert half.mlp == dense.mlp / 2 and half.projections == dense.projections / 2
    assert half.attention == dense.attention / 4 and half.logits == dense.logits


def test_selective_recomputation_repeats_only_the_named_modules():
    shape = ModelShape(2, 32, 4, 64, 16)
    plain = executed_flops_per_token(shape)
    core = executed_flops_per_token(shape, recompute=Recompute("selective"))
    assert core.attention > plain.attention and core.mlp == plain.mlp
    mlp = executed_flops_per_token(shape, recompute=Recompute("selective", modules=("mlp",)))
    assert mlp.mlp == plain.mlp * 4 / 3 and mlp.attention == plain.attention


def test_block_recomputation_counts_layers_of_each_stage():
    assert recomputed_layers(Recompute("full", "block", 1), 4, 2) == {0, 2}
    assert recomputed_layers(Recompute("full", "uniform", 1), 4, 2) == {0, 1, 2, 3}
    assert recomputed_layers(Recompute(), 4, 2) == frozenset()


def test_contradictory_attention_is_refused():
    with pytest.raises(ValueError, match="causal must be False"):
        executed_flops_per_token(SHAPES[0], attention="unfused")
    with pytest.raises(ValueError, match="'fused' or 'unfused'"):
        executed_flops_per_token(SHAPES[0], attention="fast")


@settings(deadline=None, max_examples=60)
@given(
    layers=st.integers(1, 6), heads=st.integers(1, 8), length=st.integers(1, 64), swiglu=st.booleans(),
    granularity=st.sampled_from([None, "full", "selective"]),
)  # fmt: skip
def test_executed_flops_without_techniques_are_never_below_model_flops(
    layers, heads, length, swiglu, granularity
):
    shape = ModelShape(layers, heads * 8, heads, 64, length, swiglu=swiglu)
    executed = executed_flops_per_token(shape, recompute=Recompute(granularity))
    assert executed.total >= model_flops_per_token(shape).total


def test_token_shares_multiply_along_the_name():
    shares = {"a": 0.5, "a.b.c": 0.5, "a.bb": 0.1}
    assert token_share("a.b.c.d", shares) == 0.25
    assert token_share("x", shares) == 1.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("Tesla V100-PCIE-16GB", "V100 PCIe"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X/MI325X"),
    ],
)
def test_device_names_are_recognised(name, expected):
    gpu = find_gpu(name)
    assert gpu is not None and gpu.name == expected


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "cpu",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA X1000",
    ],
)
def test_unknown_devices_have_no_peak_and_no_utilisation(name):
    assert peak_tflops(name, "bf16") is None and mfu(100.0, name, "bf16") is None


def test_formats_a_device_lacks_have_no_peak():
    assert peak_tflops("Tesla V100-SXM2-32GB", "bf16") is None
    with pytest.raises(ValueError, match="bf16"):
        peak_tflops("NVIDIA H100 PCIe", "int8")
