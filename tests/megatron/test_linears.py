"""The seam of linear layers: megatron-core's results, with another product inside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from rank_pool import RankPool
from tiny_runs import MODEL, Outcome, deepspeed_json, read_records

from ds_efficient.config.efficiency import load_config
from ds_efficient.errors import UserError

Ranks = Callable[[int], RankPool]
LAYOUTS = pytest.mark.parametrize(
    ("tensor", "sequence"), [(1, False), (2, False), (2, True)], ids=["one", "tensor", "sequence"]
)
TENSOR = "--tensor-model-parallel-size 2"
SEQUENCE = f"{TENSOR} --sequence-parallel"
SWIGLU = "--swiglu --normalization RMSNorm"

pytestmark = pytest.mark.distributed


@LAYOUTS
def test_a_product_computes_what_megatron_core_computes(ranks: Ranks, tensor: int, sequence: bool) -> None:
    for errors_of in ranks(tensor).run("seam_ranks:compare", tensor, sequence):
        assert len(errors_of) == (8 if sequence else 11)
        for case, errors in errors_of.items():
            for name, error in errors.items():
                assert error <= (0.0 if name.startswith("untouched") else 1e-12), f"{case}: {name}"


@LAYOUTS
def test_only_the_local_input_is_kept_for_the_backward_pass(
    ranks: Ranks, tensor: int, sequence: bool
) -> None:
    for kept, local in ranks(tensor).run("seam_ranks:saved_elements", tensor, sequence):
        assert kept == local == 6 * 3 * 16 // (2 if sequence else 1)


@pytest.mark.parametrize(("tensor", "stride"), [(1, 1), (2, 2)])
def test_parameters_carry_the_attributes_of_their_cut(ranks: Ranks, tensor: int, stride: int) -> None:
    for rank, found in enumerate(ranks(tensor).run("seam_ranks:marks", tensor, stride)):
        assert found["column layer"] == {"cut": "out", "rank": rank, "size": tensor, "stride": stride}
        assert found["row layer"] == {"cut": "in", "rank": rank, "size": tensor, "stride": 1}
        for kind, cut, whole, axis in (("column", "left", "right", 0), ("row", "right", "left", 1)):
            layout = (True, axis, stride if kind == "column" else 1)
            for name in ("weight", f"plain.{cut}"):
                mark = found[f"{kind} {name}"]
                assert (
                    mark["tensor_model_parallel"],
                    mark["partition_dim"],
                    mark["partition_stride"],
                ) == layout
                assert "tensor_parallel_partial" not in mark
            assert found[f"{kind} weight"]["made_up"] == "kept"
            assert found[f"{kind} weight"]["frozen"] is (kind == "row")
            mark = found[f"{kind} plain.{whole}"]
            assert mark["tensor_parallel_partial"] is True and "tensor_model_parallel" not in mark


def test_partial_gradients_are_summed_once(ranks: Ranks) -> None:
    assert ranks(2).run("seam_ranks:once") == [[[], 2.0], [[], 2.0]]


def test_what_would_go_round_a_product_is_refused(ranks: Ranks) -> None:
    expected = {
        "second": "computes through plain already",
        "cut": "parameter right: tensor_parallel_cut 'in'",
        "foreign weight": "weight of another layer",
        "gradient_accumulation_fusion": "gradient_accumulation_fusion=True",
        "grad_output_buffer": "grad_output_buffer=[]",
        "bias_extra": "bias_extra",
        "gtp_remat_size": "gtp_remat_size=2, which would bypass it; only 1",
        "fusion at installation": "gradient_accumulation_fusion=True",
        "partitioned": "without deepspeed.zero.Init",
        "recording": "autograd",
        "wrong axes": "tensor_parallel_cut ['left']",
        "no axes": "use DeepSpeed's checkpoints",
    }
    for found in ranks(2).run("seam_ranks:refusals"):
        assert found.keys() == expected.keys()
        for name, part in expected.items():
            assert part in found[name]


def assemble(ranks_pieces: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Put the pieces of all ranks into whole tensors; where two cover one place they must agree."""
    whole: dict[str, np.ndarray] = {}
    for pieces in ranks_pieces:
        for key, parts in pieces.items():
            for shape, offset, values in parts:
                target = whole.setdefault(key, np.full(shape, np.nan, np.float32))
                values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
                place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                assert np.all(np.isnan(target[place]) | (target[place] == values)), key
                target[place] = values
    return whole


def test_sharded_tensors_do_not_depend_on_the_layout(ranks: Ranks) -> None:
    one = assemble(ranks(1).run("seam_ranks:sharded", 1))
    two = assemble(ranks(2).run("seam_ranks:sharded", 2))
    assert one.keys() == two.keys()
    assert sum(".plain." in key for key in one) == 2 * 4 * 3
    for key, value in one.items():
        np.testing.assert_array_equal(two[key], value, err_msg=key)
        assert np.isfinite(value).mean() == 0.5, key  # both layers have a place, each key fills its own


def train(
    ranks: Ranks, size: int, folder: Path, arguments: str, stage: int, target: str = "pretrain"
) -> Outcome:
    folder.mkdir()
    zero = deepspeed_json(zero_optimization={"stage": stage}, gradient_clipping=0.5)
    (folder / "ds.json").write_text(json.dumps(zero))
    common = (
        f"--deepspeed_config {folder}/ds.json --train-iters 4 --global-batch-size 8 --micro-batch-size 2 "
        f"--log-interval 1 --eval-iters 0 --run-dir {folder} {SWIGLU} {arguments}"
    )
    status = ranks(size).run(f"seam_ranks:{target}", [*MODEL, *common.split()])
    assert set(status) == {0}
    return Outcome(status, read_records(folder))


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train(ranks, 1, tmp_path_factory.mktemp("runs") / "one", "", 0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("cut", [TENSOR, SEQUENCE], ids=["tensor", "sequence"])
def test_training_with_products_does_not_depend_on_the_layout(
    ranks: Ranks, tmp_path: Path, one_rank: Outcome, cut: str, stage: int
) -> None:
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    run = train(ranks, 2, tmp_path / "run", f"{cut} {recompute if stage % 2 else ''}", stage)
    assert one_rank.losses[-1] < one_rank.losses[0]
    assert run.losses == pytest.approx(one_rank.losses, rel=1e-4)
    assert run.norms == pytest.approx(one_rank.norms, rel=1e-4)


def test_partial_gradients_of_a_product_left_alone_would_be_noticed(
    ranks: Ranks, tmp_path: Path, one_rank: Outcome
) -> None:
    wrong = train(ranks, 2, tmp_path / "run", SEQUENCE, 1, "pretrain_with_partial_gradients")
    assert wrong.norms[0] != pytest.approx(one_rank.norms[0], rel=1e-3)


@pytest.mark.parametrize("name", ["slope", "rmm"])
def test_techniques_on_linear_layers_refuse_transformer_engine(name: str) -> None:
    from megatron_patches.layer_spec import layer_spec

    section = {"enabled": True, **({"ratio": 0.5} if name == "rmm" else {"adapter": {"rank": 0}})}
    efficiency = load_config({"train_batch_size": 8, name: section}, check_available=False)
    with pytest.raises(UserError, match=f"no place for {name}; use --transformer-impl local"):
        layer_spec(efficiency, transformer_config=None, transformer_impl="transformer_engine")


def test_the_local_spec_has_the_seam_unless_told_otherwise() -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_patches.layer_spec import layer_spec, submodules
    from megatron_patches.linears import SeamColumnParallelLinear, SeamRowParallelLinear

    settings = mock.Mock(normalization="LayerNorm", qk_layernorm=False)
    for linears in ({}, {"linear_fc1": ColumnParallelLinear}):
        layer = layer_spec(transformer_config=settings, linears=linears).submodules
        attention, mlp = submodules(layer.self_attention), submodules(layer.mlp)
        assert attention.linear_qkv is SeamColumnParallelLinear
        assert attention.linear_proj is mlp.linear_fc2 is SeamRowParallelLinear
        assert mlp.linear_fc1 is linears.get("linear_fc1", SeamColumnParallelLinear)
