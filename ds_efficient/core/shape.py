"""The shape of a GPT and how its activations are recomputed: plain numbers, no torch.

Names follow Megatron's arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ds_efficient.errors import UserError

NORMALIZATIONS = ("LayerNorm", "RMSNorm")
POSITION_EMBEDDINGS = ("learned_absolute", "rope", "none")
RECOMPUTE_GRANULARITIES = ("full", "selective")
RECOMPUTE_METHODS = ("uniform", "block")
RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm")


def padded_vocab_size(vocab_size: int, divisible_by: int = 128, tensor_parallel: int = 1) -> int:
    """Return the vocabulary rounded up so that it can be cut.

    Megatron-LM rounds to a multiple of `divisible_by` x `tensor_parallel`; here it is their least common
    multiple, so that the model is the same on any usual number of tensor-parallel ranks.
    """
    multiple = math.lcm(divisible_by, tensor_parallel)
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer, as megatron-core's GPTModel is built from them.

    Attributes:
        num_layers, hidden_size, num_attention_heads: as in Megatron.
        ffn_hidden_size: inner width of the MLP (of one half with SwiGLU); None: 4 * hidden_size, and with
            SwiGLU ``int(4 * hidden_size * 2 / 3 / 64) * 64``, Megatron's default.
        num_query_groups: key/value heads; None: as many as heads.
        kv_channels: width of one head; None: hidden_size / heads.
        vocab_size: padded vocabulary.
        seq_length: tokens of one sample.
        swiglu: gated MLP (two halves in linear_fc1).
        untie_embeddings: the output layer has a weight of its own.
        add_bias_linear: biases in all linear layers but the output layer.
        add_qkv_bias: a bias in linear_qkv even where ``add_bias_linear`` is False.
        normalization: ``"LayerNorm"`` or ``"RMSNorm"``.
        qk_layernorm: norms on queries and keys.
        position_embedding_type: ``"learned_absolute"``, ``"rope"`` or ``"none"``.
        max_position_embeddings: rows of the learned table; None: seq_length.

    Raises:
        UserError: a size is below 1, heads do not divide the hidden size, or a name is unknown.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    seq_length: int
    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    swiglu: bool = False
    untie_embeddings: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    normalization: str = "LayerNorm"
    qk_layernorm: bool = False
    position_embedding_type: str = "learned_absolute"
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise UserError("model shape: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        sizes = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "seq_length")
        optional = ("ffn_hidden_size", "num_query_groups", "kv_channels", "max_position_embeddings")
        problems = [
            f"{name} = {getattr(self, name)}: a whole number of at least 1 is needed"
            for name in sizes + optional
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if problems:
            return problems
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = "
                f"{self.num_attention_heads}; change one of them or give kv_channels"
            )
        if self.num_attention_heads % self.groups:
            problems.append(
                f"num_query_groups = {self.groups} does not divide num_attention_heads = "
                f"{self.num_attention_heads}"
            )
        if self.normalization not in NORMALIZATIONS:
            problems.append(
                f"normalization = {self.normalization!r}: allowed are {', '.join(NORMALIZATIONS)}"
            )
        if self.position_embedding_type not in POSITION_EMBEDDINGS:
            problems.append(
                f"position_embedding_type = {self.position_embedding_type!r}: allowed are "
                f"{', '.join(POSITION_EMBEDDINGS)}"
            )
        positions = self.max_position_embeddings
        learned = self.position_embedding_type == "learned_absolute"
        if learned and positions is not None and positions < self.seq_length:
            problems.append(
                f"max_position_embeddings = {positions} is below seq_length = {self.seq_length}; raise it to "
                f"at least {self.seq_length}"
            )
        return problems

    @property
    def ffn(self) -> int:
        """Inner width of the MLP, default resolved."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return max(64, int(4 * self.hidden_size * 2 / 3 / 64) * 64) if self.swiglu else 4 * self.hidden_size

    @property
    def groups(self) -> int:
        """Key/value heads, default resolved."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_dim(self) -> int:
        """Width of one head, default resolved."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    @property
    def query_size(self) -> int:
        """Width of all queries together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all keys (or of all values) together."""
        return self.groups * self.head_dim

    @property
    def positions(self) -> int:
        """Rows of the learned position table; 0 where there is none."""
        if self.position_embedding_type != "learned_absolute":
            return 0
        return self.seq_length if self.max_position_embeddings is None else self.max_position_embeddings

    def __str__(self) -> str:
        parts = [
            f"{self.num_layers} layers x {self.hidden_size}",
            f"{self.num_attention_heads} heads"
            + (f" in {self.groups} groups" if self.groups != self.num_attention_heads else ""),
            f"ffn {self.ffn}" + (" swiglu" if self.swiglu else ""),
            f"vocabulary {self.vocab_size}",
            f"sequence {self.seq_length}",
            self.normalization,
            self.position_embedding_type,
            "untied" if self.untie_embeddings else "tied",
        ]
        return ", ".join(parts)


@dataclass(frozen=True)
class Recompute:
    """Activation recomputation, with Megatron's names.

    Attributes:
        granularity: None (off), ``"full"`` (whole layers) or ``"selective"`` (named modules).
        method: for ``"full"``: ``"uniform"`` (all layers, in chunks of `num_layers`) or ``"block"`` (the
            first `num_layers` of each pipeline stage).
        num_layers: see method; None: 1 for ``"uniform"``, all for ``"block"``.
        modules: for ``"selective"``.
    """

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] = ("core_attn",)

    def __post_init__(self) -> None:
        problems = []
        if self.granularity not in (None, *RECOMPUTE_GRANULARITIES):
            problems.append(f"recompute_granularity = {self.granularity!r}: allowed are full, selective")
        if self.method not in (None, *RECOMPUTE_METHODS):
            problems.append(f"recompute_method = {self.method!r}: allowed are uniform, block")
        if self.num_layers is not None and self.num_layers < 1:
            problems.append(f"recompute_num_layers = {self.num_layers}: at least 1 is needed")
        unknown = sorted(set(self.modules) - set(RECOMPUTE_MODULES))
        if unknown:
            problems.append(f"recompute_modules {unknown}: allowed are {', '.join(RECOMPUTE_MODULES)}")
        if problems:
            raise UserError("; ".join(problems))

    def full_layers(self, layers: int) -> int:
        """Return how many of a stage's `layers` are recomputed whole."""
        if self.granularity != "full":
            return 0
        if self.method == "block" and self.num_layers is not None:
            return min(self.num_layers, layers)
        return layers

    def selects(self, module: str) -> bool:
        """Return whether `module` is recomputed selectively."""
        return self.granularity == "selective" and module in self.modules
