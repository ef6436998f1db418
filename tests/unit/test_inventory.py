"""The inventory counts every parameter once, with full sizes, from a module as from a shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_efficient.core.inventory import Inventory, ModelShape, padded_vocab_size
from ds_efficient.errors import UserError


@pytest.fixture(scope="module")
def gpt_builder():
    """Build a meta-device megatron-core GPTModel of a shape, in a process group of one."""
    import torch.distributed as dist

    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    own_group = not dist.is_initialized()
    if own_group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    own_state = not parallel_state.model_parallel_is_initialized()
    if own_state:
        parallel_state.initialize_model_parallel()
    yield _build_gpt
    if own_state:
        parallel_state.destroy_model_parallel()
    if own_group:
        dist.destroy_process_group()


def _build_gpt(shape: ModelShape) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        ffn_hidden_size=shape.ffn,
        gated_linear_unit=shape.swiglu,
        activation_func=nn.functional.silu if shape.swiglu else nn.functional.gelu,
        add_bias_linear=shape.add_bias_linear,
        add_qkv_bias=shape.add_qkv_bias,
        normalization=shape.normalization,
        qk_layernorm=shape.qk_layernorm,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    spec = get_gpt_layer_local_spec(normalization=shape.normalization, qk_layernorm=shape.qk_layernorm)
    return GPTModel(
        config,
        spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.positions or shape.seq_length,
        share_embeddings_and_output_weights=not shape.untie_embeddings,
        position_embedding_type=shape.position_embedding_type,
    )


GPT2_LIKE = ModelShape(2, 32, 4, 128, 16)
SHAPES = {
    "gpt2": GPT2_LIKE,
    "untied": ModelShape(3, 32, 4, 128, 16, untie_embeddings=True),
    "llama": ModelShape(
        2, 48, 6, 256, 16, ffn_hidden_size=80, num_query_groups=2, swiglu=True, untie_embeddings=True,
        add_bias_linear=False, normalization="RMSNorm", position_embedding_type="rope",
    ),
    "qwen": ModelShape(
        1, 32, 4, 128, 8, num_query_groups=1, swiglu=True, add_bias_linear=False, add_qkv_bias=True,
        normalization="RMSNorm", qk_layernorm=True, position_embedding_type="rope",
    ),
    "wide_heads": ModelShape(2, 32, 4, 128, 8, kv_channels=16, position_embedding_type="none"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shape_and_megatron_model_give_the_same_inventory(gpt_builder, name):
    shape = SHAPES[name]
    model = gpt_builder(shape)
    from_model, from_shape = Inventory.from_model(model), Inventory.from_shape(shape)
    assert from_model.modules == from_shape.modules
    assert from_shape.total_parameters == sum(p.numel() for p in model.parameters())
    read = from_model.model
    assert read is not None
    assert Inventory.from_shape(read).modules == from_shape.modules


def test_megatron_layers_are_numbered_over_the_whole_model(gpt_builder):
    model = gpt_builder(GPT2_LIKE)
    for local, layer in enumerate(model.decoder.layers):
        layer.layer_number = 5 + local  # as on a later pipeline stage
    inventory = Inventory.from_model(model)
    assert inventory.find("decoder.layers.0.mlp.linear_fc1").layer == 4
    assert inventory.find("decoder.layers.1.input_layernorm").layer == 5


class _Holder(nn.Module):
    def __init__(self, weight: tuple[int, int], bias: int | None = None, bias_cut: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weight))
        self.weight.tensor_model_parallel = True
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.empty(bias))
            self.bias.tensor_model_parallel = bias_cut


class ColumnParallelLinear(_Holder):
    input_size, output_size, output_size_per_partition = 8, 12, 6


class RowParallelLinear(_Holder):
    input_size, output_size, input_size_per_partition = 12, 8, 6


class VocabParallelEmbedding(_Holder):
    num_embeddings, embedding_dim, num_embeddings_per_partition = 64, 8, 32


def test_tensor_parallel_shards_are_counted_in_full():
    model = nn.ModuleDict(
        {
            "column": ColumnParallelLinear((6, 8), 6, bias_cut=True),
            "row": RowParallelLinear((8, 6), 8),
            "words": VocabParallelEmbedding((32, 8)),
        }
    )
    column, row, words = Inventory.from_model(model)
    assert (column.kind, column.in_features, column.out_features) == ("column_parallel", 8, 12)
    assert (column.parameters, column.tensor_parallel) == (8 * 12 + 12, "out")
    assert (row.kind, row.parameters, row.tensor_parallel) == ("row_parallel", 12 * 8 + 8, "in")
    assert (words.kind, words.parameters) == ("embedding", 64 * 8)
    held = {name: sum(p.numel() for p in model[name].parameters()) for name in ("column", "row", "words")}
    assert {m.name: m.rank_parameters(2) for m in (column, row, words)} == held


def test_zero_3_partitions_are_counted_by_their_full_size():
    linear = nn.Linear(6, 4)
    for parameter in linear.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.data = torch.empty(0)
    (info,) = Inventory.from_model(linear)
    assert (info.in_features, info.out_features, info.parameters) == (6, 4, 28)


def test_meta_tensors_are_enough():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    assert [m.kind for m in Inventory.from_model(model)] == ["embedding", "norm", "linear"]
    assert Inventory.from_model(model).total_parameters == 40 + 8 + 16


def test_unknown_modules_with_parameters_are_kept_as_other():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    (info,) = Inventory.from_model(model)
    assert (info.kind, info.parameters) == ("other", 2 * 9 + 2)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def test_hugging_face_gpt2_is_read_with_tied_output(transformers):
    config = transformers.GPT2Config(n_layer=2, n_embd=24, n_head=3, n_positions=32, vocab_size=100)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    inventory = Inventory.from_model(model)
    assert inventory.total_parameters == sum(p.numel() for p in model.parameters())
    attention = inventory.find("transformer.h.1.attn.c_attn")
    assert (attention.kind, attention.layer) == ("linear", 1)
    assert (attention.in_features, attention.out_features) == (24, 72)
    head = inventory.find("lm_head")
    assert (head.kind, head.parameters, head.tied_to) == ("output", 0, "transformer.wte")
    assert inventory.model is not None
    assert Inventory.from_shape(inventory.model).total_parameters == inventory.total_parameters


def test_hugging_face_llama_is_read_untied(transformers):
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=56, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    inventory = Inventory.from_model(model)
    assert inventory.total_parameters == sum(p.numel() for p in model.parameters())
    assert inventory.find("lm_head").kind == "output"
    assert inventory.find("model.norm").kind == "norm"
    shape = inventory.model
    assert shape is not None and shape.swiglu and shape.groups == 2
    assert Inventory.from_shape(shape).total_parameters == inventory.total_parameters


@settings(deadline=None, max_examples=50)
@given(
    layers=st.integers(1, 4), heads=st.integers(1, 4), width=st.integers(1, 8), tp=st.sampled_from([1, 2, 4]),
    swiglu=st.booleans(), untie=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_ranks_together_hold_at_least_the_whole_model(layers, heads, width, tp, swiglu, untie, bias):
    shape = ModelShape(
        layers, heads * 4 * width, heads * 4, 128, 8, swiglu=swiglu, untie_embeddings=untie,
        add_bias_linear=bias, ffn_hidden_size=16 * width,
    )  # fmt: skip
    inventory = Inventory.from_shape(shape)
    held = sum(module.rank_parameters(tp) for module in inventory)
    replicated = sum(m.parameters for m in inventory if m.tensor_parallel is None) + sum(
        m.out_features for m in inventory if m.kind == "row_parallel" and m.bias
    )
    assert held * tp == inventory.total_parameters + (tp - 1) * replicated


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("decoder.layers.0.mlp.linear_fc1", True),
        ("linear_fc1", True),
        ("mlp.linear_fc1", True),
        ("0.mlp.linear_fc1", True),
        ("fc1", False),
        ("r.layers.0.mlp.linear_fc1", False),
        ("decoder.layers.0.mlp", False),
        ("Linear_fc1", False),
        ("linear_*", True),
        ("Linear_*", False),
        ("linear_fc?", True),
        ("linear_f?", False),
        ("layers.0.*", True),
        ("decoder.*.linear_fc1", True),
        ("layers.1.*", False),
        ("decoder.*.linear_fc2", False),
        ("ayers.*", False),
        ("*", True),
    ],
)
def test_names_of_a_section_mean_ends_of_dotted_names(name, meant):
    module = Inventory.from_shape(GPT2_LIKE).find("decoder.layers.0.mlp.linear_fc1")
    assert module.matches([name]) is meant
    assert module.matches(["linear_proj", name]) is meant


def test_no_name_means_no_module():
    assert not any(module.matches(()) for module in Inventory.from_shape(GPT2_LIKE))
    named = [module.leaf for module in Inventory.from_shape(GPT2_LIKE) if module.matches(["linear_fc*"])]
    assert named == ["linear_fc1", "linear_fc2"] * 2


def test_impossible_shapes_are_refused_with_every_problem_named():
    with pytest.raises(UserError, match=r"hidden_size = 30 .*num_query_groups = 3 .*'Bat'"):
        ModelShape(2, 30, 4, 128, 16, num_query_groups=3, normalization="Bat")
    with pytest.raises(UserError, match="max_position_embeddings = 8 is below seq_length = 16"):
        ModelShape(2, 32, 4, 128, 16, max_position_embeddings=8)
    with pytest.raises(UserError, match="num_layers = 0"):
        ModelShape(0, 32, 4, 128, 16)


@given(st.integers(1, 300_000), st.sampled_from([1, 64, 128]), st.integers(1, 16))
def test_vocabulary_padding_is_the_next_multiple(vocab, divisible, tp):
    padded = padded_vocab_size(vocab, divisible, tp)
    assert padded % divisible == 0 and padded % tp == 0
    assert 0 <= padded - vocab < math.lcm(divisible, tp)
