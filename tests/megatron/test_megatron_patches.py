"""megatron_patches against the installed megatron-core."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from rank_pool import RankPool

from ds_efficient.errors import UnsupportedVersion, UserError

Ranks = Callable[[int], RankPool]


def test_every_seam_holds_in_the_installed_version() -> None:
    from megatron_patches import compatibility

    assert [(finding.seam.where, finding.problem) for finding in compatibility() if finding.problem] == []


def test_an_unknown_version_needs_permission(caplog: pytest.LogCaptureFixture) -> None:
    import megatron_patches.version_guard as guard

    with mock.patch.object(guard, "installed_version", lambda: "0.99.0"):
        with pytest.raises(UnsupportedVersion, match="allow_untested_megatron"):
            guard.check()
        assert guard.check(allow_untested=True) == "0.99.0"
    assert "outside the tested range" in caplog.text
    with mock.patch.object(guard, "installed_version", lambda: "0.10.0"):
        with pytest.raises(UnsupportedVersion, match=r"install megatron-core==0\.16\.1"):
            guard.check(allow_untested=True)


def test_a_changed_signature_is_refused_by_name() -> None:
    import megatron_patches.version_guard as guard

    moved = guard.Seam(
        "megatron.core.parallel_state:initialize_model_parallel", ("no_such",), "process groups"
    )
    with mock.patch.object(guard, "SEAMS", (*guard.SEAMS, moved)):
        with pytest.raises(UnsupportedVersion, match=r"initialize_model_parallel.*no parameter no_such"):
            guard.check()


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed"
)
def test_transformer_engine_is_refused_where_it_is_missing() -> None:
    from megatron_patches.layer_spec import layer_spec

    with pytest.raises(UserError, match="not installed"):
        layer_spec(transformer_config=None, transformer_impl="transformer_engine")


def test_unknown_replacements_are_refused() -> None:
    from megatron_patches.layer_spec import layer_spec

    with pytest.raises(UserError, match="linear_fc3 unknown; allowed: linear_qkv"):
        layer_spec(transformer_config=None, linears={"linear_fc3": object})
    with pytest.raises(UserError, match="leave no place for linear_fc1"):
        layer_spec(
            transformer_config=None, linears={"linear_fc1": object}, transformer_impl="transformer_engine"
        )


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_is_no_less_exact_than_megatron_core(
    ranks: Ranks, groups: int, masked: bool, dtype: str
) -> None:
    ((ours, theirs),) = ranks(1).run("megatron_ranks:attention", groups, masked, dtype)
    assert ours <= 2.0 * theirs + 1e-6


@pytest.mark.distributed
def test_tensor_parallel_ranks_have_streams_of_their_own(ranks: Ranks) -> None:
    first, second = ranks(2).run("megatron_ranks:dropout_streams", 2)
    assert first[0] != second[0]
    assert first[1] == second[1]


def assemble(parts: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Put the parts of tensor-parallel ranks together, by an independent reading of Megatron's layout."""
    whole: dict[str, np.ndarray] = {}
    for name, (value, cut) in parts[0].items():
        if cut is None:
            whole[name] = value
            continue
        dimension, stride = cut
        pieces = [np.split(part[name][0], stride, axis=dimension) for part in parts]
        order = [pieces[rank][piece] for piece in range(stride) for rank in range(len(parts))]
        whole[name] = np.concatenate(order, axis=dimension)
    return whole


@pytest.mark.distributed
@pytest.mark.parametrize(("swiglu", "tied"), [(False, True), (True, False)], ids=["gpt2", "llama"])
def test_initial_weights_do_not_depend_on_the_layout(ranks: Ranks, swiglu: bool, tied: bool) -> None:
    (one,) = ranks(1).run("megatron_ranks:weights", 1, 1, swiglu, tied)
    whole = assemble(ranks(2).run("megatron_ranks:weights", 2, 1, swiglu, tied))
    stages = ranks(2).run("megatron_ranks:weights", 1, 2, swiglu, tied)
    assert whole.keys() == one.keys() == stages[0].keys() | stages[1].keys()
    for name, (value, _) in one.items():
        np.testing.assert_array_equal(whole[name], value, err_msg=name)
        for stage in stages:
            if name in stage:
                np.testing.assert_array_equal(stage[name][0], value, err_msg=name)


@pytest.mark.distributed
def test_initial_weights_have_the_stated_deviation(ranks: Ranks) -> None:
    (one,) = ranks(1).run("megatron_ranks:weights", 1, 1, False, True)
    deviation = {name: float(value.std()) for name, (value, _) in one.items() if value.ndim == 2}
    plain = deviation["decoder.layers.0.mlp.linear_fc1.weight"]
    scaled = deviation["decoder.layers.0.mlp.linear_fc2.weight"]
    assert plain == pytest.approx(0.02, rel=0.05)
    assert scaled == pytest.approx(0.02 / 2.0, rel=0.05)  # 1 / sqrt(2 x 2 layers)
    first, second = (one[f"decoder.layers.{layer}.mlp.linear_fc1.weight"][0] for layer in (0, 1))
    assert not np.array_equal(first, second)
    for name, (value, _) in one.items():
        if value.ndim == 1:
            assert np.all(value == (0.0 if name.endswith("bias") else 1.0)), name
