"""The cuSPARSELt side of SLoPe without a GPU: products, algorithms, operands, the start-up check."""

from __future__ import annotations

import logging
import re

import fake_cusparselt as fakes
import pytest
import torch
from fake_cusparselt import check, fake_library, inputs, make  # noqa: F401

from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.ops import cusparselt as face
from ds_efficient.ops import cusparselt_cache as caches
from ds_efficient.ops import cusparselt_library as lt
from ds_efficient.ops import cusparselt_plans as plans
from ds_efficient.ops import cusparselt_probe as probes
from ds_efficient.ops.cusparselt import SparseOperand, multiply
from ds_efficient.ops.cusparselt_multiply import padded_tokens

DTYPES = (torch.bfloat16, torch.float16)


# Products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "tiles"), [(32, 64, 1), (64, 64, 1), (96, 32, 2), (96, 32, 3)])
@pytest.mark.parametrize("tokens", [1, 7, 16, 100])
def test_product_equals_the_dense_one(fake, rows, k, tiles, tokens, dtype):
    operand, pattern = make(rows, k, tiles, dtype)
    check(operand, pattern, tokens)


def test_second_description_of_x_is_used_where_the_first_is_refused(fake):
    def refuse_transposed(handle, product, op_a, op_b, *rest):
        return fakes.NOT_SUPPORTED if op_b == lt.TRANSPOSE else 0

    fake.fail["cusparseLtMatmulDescriptorInit"] = refuse_transposed
    operand, pattern = make(32, 64)
    check(operand, pattern, 16)
    assert plans._layouts == {torch.bfloat16: plans.LAYOUTS[1]}
    before = fake.calls["cusparseLtMatmulDescriptorInit"]
    check(operand, pattern, 32)
    assert fake.calls["cusparseLtMatmulDescriptorInit"] == before + 1, "decided once for the dtype"


def test_no_description_accepted_is_an_error_that_names_function_and_shape(fake):
    fake.fail["cusparseLtMatmulPlanInit"] = fakes.NOT_SUPPORTED
    operand, _ = make(32, 64)
    with pytest.raises(lt.LtError, match=r"cusparseLtMatmulPlanInit for 32x64 .*tokens 16.*: NOT_SUPPORTED"):
        multiply(operand, inputs(16, 64))


def test_empty_strided_and_misaligned_inputs(fake):
    operand, pattern = make(32, 64)
    assert multiply(operand, inputs(16, 64)[:0]).shape == (0, 32)
    wide = inputs(16, 128)[:, ::2]
    assert not wide.is_contiguous()
    reference = wide.double() @ pattern.double().t()
    assert probes.relative_error(multiply(operand, wide), reference) < 1e-2
    odd = inputs(1, 16 * 64 + 1)[0, 1:].view(16, 64)
    assert odd.is_contiguous() and odd.data_ptr() % 16
    reference = odd.double() @ pattern.double().t()
    assert probes.relative_error(multiply(operand, odd), reference) < 1e-2


@pytest.mark.parametrize(("tokens", "padded"), [(1, 16), (15, 16), (16, 16), (17, 32), (8192, 8192)])
def test_padding_of_tokens(tokens, padded):
    assert padded_tokens(tokens) == padded


def test_a_product_after_the_first_makes_one_library_call(fake):
    operand, pattern = make(32, 64)
    for _ in range(2):  # the second time searches
        check(operand, pattern, 16)
    before = fake.calls.copy()
    check(operand, pattern, 16)
    fresh = fake.calls - before
    assert fresh == {"cusparseLtMatmul": 1}


def test_operands_of_one_shape_share_a_plan_and_streams_get_lanes_of_their_own(fake, monkeypatch):
    first, pattern = make(32, 64)
    second, _ = make(32, 64)
    check(first, pattern, 16)
    planned = fake.calls["cusparseLtMatmulPlanInit"]
    monkeypatch.setattr(plans, "current_stream", lambda device: 77)
    check(second, pattern, 16)
    assert fake.calls["cusparseLtMatmulPlanInit"] == planned
    assert fake.streams == [0, 77]


def test_workspace_is_kept_for_each_stream_and_grows(fake, monkeypatch):
    operand, pattern = make(32, 64)
    fake.workspace = 100
    check(operand, pattern, 16)
    fake.workspace = 5000
    check(operand, pattern, 32)
    check(operand, pattern, 48)
    small, large, same = fake.workspaces
    assert small and large != small and same == large


# Algorithms


def test_search_on_the_second_product_and_its_result_is_used_by_the_next_process(fake, monkeypatch):
    operand, pattern = make(32, 64)
    check(operand, pattern, 16)
    assert fake.calls["cusparseLtMatmulSearch"] == 0, "no search for a number of tokens seen once"
    check(operand, pattern, 16)
    check(operand, pattern, 16)
    assert fake.calls["cusparseLtMatmulSearch"] == 1
    (plan,) = plans._plans.values()
    assert plan.algorithm == (7, 2, 1, 1)

    fakes.restart(monkeypatch)
    operand, pattern = make(32, 64)
    check(operand, pattern, 16)
    check(operand, pattern, 16)
    assert fake.calls["cusparseLtMatmulSearch"] == 1
    (plan,) = plans._plans.values()
    assert {k: fake.described[plan._selection.address][k] for k in fakes.FOUND} == fakes.FOUND


@pytest.mark.parametrize(
    ("rows", "dtype", "minimum"), [(32, torch.float16, 1), (64, torch.bfloat16, 65), (64, torch.float16, 65)]
)
def test_default_algorithm_where_a_search_is_unsafe_or_not_worth_it(fake, monkeypatch, rows, dtype, minimum):
    monkeypatch.setattr(plans, "SEARCH_MINIMUM", minimum)
    operand, pattern = make(rows, 64, dtype=dtype)
    for _ in range(4):
        check(operand, pattern, 16)
    assert fake.calls["cusparseLtMatmulSearch"] == 0


def test_algorithm_that_the_library_no_longer_knows_is_searched_again(fake, monkeypatch, caplog):
    operand, pattern = make(32, 64)
    shape = operand.layout.tile_shape(16)
    caches.cache.put({caches.algorithm_key(shape): plans.Algorithm(99, 1, 0, 0)._asdict()})
    with caplog.at_level(logging.INFO):
        check(operand, pattern, 16)
    assert "does not take the algorithm" in caplog.text
    check(operand, pattern, 16)
    assert fake.calls["cusparseLtMatmulSearch"] == 1
    assert caches.kept_algorithm(shape) == (7, 2, 1, 1)


def test_failing_search_leaves_the_default_and_is_not_repeated(fake, caplog):
    fake.fail["cusparseLtMatmulSearch"] = fakes.NOT_SUPPORTED
    operand, pattern = make(32, 64)
    for _ in range(4):
        check(operand, pattern, 16)
    assert fake.calls["cusparseLtMatmulSearch"] == 1
    assert "search of an algorithm failed" in caplog.text


def test_destroyed_plans_leave_nothing_behind(fake):
    operand, _ = make(32, 64)
    library, shape = lt.load(), operand.layout.tile_shape(16)
    plans.Plan(library, shape).destroy()  # decides the layout
    before = set(fake.described)
    plan = plans.Plan(library, shape)
    plan.destroy()
    left = set(fake.described) - before
    assert left <= {plan._product.address}, "the library has no function that destroys a product descriptor"


# Operands


def test_values_can_be_overwritten_and_may_be_zero(fake):
    operand, pattern = make(96, 32, tiles=3)
    mask = pattern != 0
    values = -pattern[mask].view(96, 16)
    values[::5, ::3] = 0
    for first, view in operand.tile_values:
        assert view.shape == (32, 16) and view.data_ptr() % 256 == operand.buffer.data_ptr() % 256
        view.copy_(values[first : first + len(view)])
    check(operand, torch.zeros_like(pattern).masked_scatter(mask, values), 16)


def test_metadata_alone_brings_an_operand_back(fake):
    operand, pattern = make(96, 32, tiles=2)
    kept = operand.packed_metadata()
    assert kept.numel() == 96 * 32 // 8 and kept.dtype is torch.uint8
    values = [view.clone() for _, view in operand.tile_values]
    for metadata in (kept, operand.metadata()):
        moment = SparseOperand.from_metadata(metadata, 96, 32, dtype=torch.bfloat16)
        for (_, view), saved in zip(moment.tile_values, values, strict=True):
            view.copy_(saved)
        check(moment, pattern, 16)
    assert 2 * 96 * 32 * 9 // 16 <= operand.nbytes < 2 * 96 * 32 * 9 // 16 + 2 * 256
    with pytest.raises(UserError, match=r"metadata of shape .* does not fit a 96x64 matrix in 2 tile"):
        SparseOperand.from_metadata(kept, 96, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("rows", "k", "dtype", "tiles", "message"),
    [
        (24, 64, torch.bfloat16, 1, "rows=24 is not a multiple of 16"),
        (32, 48, torch.bfloat16, 1, "k=48 is not a multiple of 32"),
        (48, 64, torch.bfloat16, 2, "rows=48 / tiles=2 is not a multiple of 16"),
        (64, 64, torch.bfloat16, 3, "rows=64 cannot be split into tiles=3"),
        (32, 64, torch.float32, 1, "dtype torch.float32 is not supported.*bfloat16, torch.float16"),
        (0, 64, torch.float16, 1, "rows=0 is not a multiple"),
    ],
)
def test_impossible_operands_are_refused_with_the_reason(fake, rows, k, dtype, tiles, message):
    with pytest.raises(UserError, match=message + '.*"backend": "dense"'):
        SparseOperand(rows, k, dtype=dtype, device="cpu", tiles=tiles)


def test_compressed_size_without_room_for_metadata_is_refused(fake, monkeypatch):
    def only_values(handle, descriptor, size, scratch):
        fakes.ctypes.c_size_t.from_address(size).value = 32 * 64

    monkeypatch.setattr(fake.cusparseLtSpMMACompressedSize2, "run", only_values)
    with pytest.raises(
        OpBuildError, match=r"compresses a 32x64 matrix to 2048 bytes, .*this layout is not known"
    ):
        SparseOperand(32, 64, dtype=torch.bfloat16, device="cpu")


def test_patterns_that_are_not_two_of_four_are_refused_with_the_place(fake):
    operand, pattern = make(32, 64)
    pattern[3, 8:12] = torch.tensor([1.0, 0, 0, 0])
    with pytest.raises(UserError, match="1 nonzero elements in row 3, columns 8 to 11; exactly 2"):
        operand.set_pattern(pattern)
    with pytest.raises(UserError, match=r"pattern of shape \(32, 32\)"):
        operand.set_pattern(pattern[:, :32])
    with pytest.raises(UserError, match=r"torch\.float16: expected"):
        operand.set_pattern(pattern.half())


def test_inputs_that_do_not_fit_are_refused(fake):
    operand, _ = make(32, 64)
    with pytest.raises(UserError, match=r"x has shape \(4, 32\); expected \(tokens, 64\)"):
        multiply(operand, inputs(4, 32))
    with pytest.raises(UserError, match=r"x is torch.float16, the sparse operand torch.bfloat16"):
        multiply(operand, inputs(4, 64, torch.float16))
    with pytest.raises(UserError, match="no gradient"):
        multiply(operand, inputs(4, 64).requires_grad_())
    with torch.no_grad():
        multiply(operand, inputs(4, 64).requires_grad_())
    empty = SparseOperand(32, 64, dtype=torch.bfloat16, device="cpu")
    with pytest.raises(UserError, match="no pattern yet"):
        multiply(empty, inputs(4, 64))


def test_operator_gives_shapes_to_fake_tensors_without_the_library(fake):
    from torch._subclasses.fake_tensor import FakeTensorMode

    operand, _ = make(32, 64)
    before = fake.calls.copy()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(inputs(20, 64))
        assert multiply(operand, x).shape == (20, 32)
    assert fake.calls == before


# Start-up check


def test_probe_passes_on_the_expected_layout_without_searching(fake):
    assert face.probe("cpu") is None
    assert fake.calls["cusparseLtMatmulSearch"] == 0


def test_probe_finds_another_order_of_values_and_wrong_products(fake, monkeypatch):
    compress = fake.cusparseLtSpMMACompress2.run

    def reversed_values(*arguments):
        compress(*arguments)
        rows, k, _, dtype, _ = fake.described[arguments[1]]
        values = fakes.view(arguments[5], rows * k // 2, dtype)
        values.copy_(values.flip(0))

    monkeypatch.setattr(fake.cusparseLtSpMMACompress2, "run", reversed_values)
    assert "not the kept values in row-major order" in face.probe("cpu")


def test_probe_finds_wrong_products(fake, monkeypatch):
    run = fake.cusparseLtMatmul.run

    def twice(*arguments):
        run(*arguments)
        fakes.matrix(arguments[7], *fake.described[arguments[1]][0][3]).mul_(2)

    monkeypatch.setattr(fake.cusparseLtMatmul, "run", twice)
    assert re.search(
        r"cuSPARSELt 0.8.1 failed \(64x128, 1 tile.*differs from the dense one", face.probe("cpu")
    )


def test_probe_reports_an_error_of_the_library(fake):
    fake.fail["cusparseLtSpMMACompress2"] = fakes.NOT_SUPPORTED
    assert "cusparseLtSpMMACompress2 for 64x128" in face.probe("cpu")


def test_unavailable_gives_the_reason(monkeypatch):
    assert "not on 'cpu'" in face.unavailable("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert face.unavailable("cuda") == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    probes._unavailable.cache_clear()
    assert "Tesla V100 has compute capability 7.0; sparse tensor cores need 8.0" in face.unavailable("cuda:0")

    def missing():
        raise OpBuildError("cuSPARSELt is not found")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(lt, "load", missing)
    probes._unavailable.cache_clear()
    assert face.unavailable("cuda:0") == "cuSPARSELt is not found"
    probes._unavailable.cache_clear()
