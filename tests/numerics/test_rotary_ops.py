"""The rotary embedding: the definition in double precision, gradients, the contract of operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from rotary_cases import DTYPES, Case, cases, expected
from torch._subclasses import FakeTensorMode

from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.ops import native, rotary
from ds_efficient.ops.rotary import rotary_embedding

BACKENDS = ("native", "reference")
both = pytest.mark.parametrize("backend", BACKENDS)


# ---- values ----


@both
@settings(deadline=None, max_examples=60)
@given(cases())
@example(Case(torch.float32, 3, 1, 1, 2, 2, 5))
@example(Case(torch.bfloat16, 300, 2, 4, 40, 32, 131072, largest=131072.0))
def test_results_are_as_exact_as_their_type(backend, case):
    inputs = case.inputs()
    case.check(torch.ops.ds_efficient.rotary(*inputs, backend), inputs)
    if not case.transposed:
        t, angles, index, mscale, _ = inputs
        case.check(rotary_embedding(t, angles, index, mscale=mscale, backend=backend), inputs)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_tokens_kept_give_the_bits_of_no_index(backend, dtype):
    t, angles, *_ = Case(dtype, 9, 3, 2, 24, 16, 9).inputs()
    every = torch.arange(9).expand(3, 9)
    whole = rotary_embedding(t, angles, backend=backend)
    assert torch.equal(rotary_embedding(t, angles, every, backend=backend), whole)
    assert torch.equal(rotary_embedding(t, angles[:, 0, 0], backend=backend), whole)
    assert torch.equal(rotary_embedding(t, angles.expand(9, 3, 1, 16), every, backend=backend), whole)
    some = every[:, 2::3]
    assert torch.equal(rotary_embedding(t[2::3], angles, some, backend=backend), whole[2::3])


@both
def test_numbers_that_are_not_finite_and_the_ends_of_the_range(backend):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 65504.0, -65504.0, 6e-8, -0.0, 3e38])
    angles = torch.zeros(1, 2)
    for dtype in DTYPES:
        t = torch.stack((values, torch.zeros(8)), -1).to(dtype).view(1, 1, 8, 2)
        found = rotary_embedding(t, angles, backend=backend)
        first = t[..., 0]  # 0 * inf is NaN in the partner
        assert torch.equal(found[..., 0].nan_to_num(7), first.nan_to_num(7)) and found[..., 0, 0].isnan()
        turned = rotary_embedding(t, angles, mscale=2.0, backend=backend)[..., 0]
        assert torch.equal(turned.nan_to_num(7), (first * 2).nan_to_num(7))


def test_results_do_not_depend_on_the_number_of_threads():
    t, angles, index, *_ = Case(torch.float32, 300, 2, 4, 64, 64, 500).inputs()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(rotary_embedding(t, angles, index, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@both
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (4, 0, 3, 8), (4, 2, 0, 8)])
def test_nothing_gives_nothing(backend, shape):
    t = torch.ones(shape, requires_grad=True)
    index = torch.zeros(shape[1], shape[0], dtype=torch.int64)
    for found in (
        rotary_embedding(t, torch.ones(4, 6), index, backend=backend),
        rotary_embedding(t, torch.ones(4, 6), backend=backend),
    ):
        assert found.shape == shape
        (gradient,) = torch.autograd.grad(found.sum(), t)
        assert gradient.shape == shape


# ---- gradients ----


@both
@pytest.mark.parametrize("indexed", [True, False])
def test_gradients_to_second_order(backend, indexed):
    case = Case(torch.float64, 3, 2, 2, 7, 4, 5, indexed=indexed, per_sample=True, mscale=1.5, largest=9.0)
    t, angles, index, mscale, _ = case.inputs()

    def run(x):
        return rotary_embedding(x, angles, index, mscale=mscale, backend=backend)

    x = t.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(lambda x: run(x * x), x)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_turns_back_and_keeps_no_activations(backend, dtype):
    t, angles, index, mscale, _ = Case(dtype, 6, 2, 3, 16, 8, 9, mscale=1.25).inputs()
    x, up = t.clone().requires_grad_(), torch.randn(3, 6, 2, 16).to(dtype).permute(1, 2, 0, 3)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = rotary_embedding(x, angles, index, mscale=mscale, backend=backend)
    assert [tensor.data_ptr() for tensor in kept] == [angles.data_ptr(), index.data_ptr()]
    (gradient,) = torch.autograd.grad(y, x, up)
    back = Case(dtype, 6, 2, 3, 16, 8, 9, mscale=1.25, transposed=True)
    back.check(gradient, (up, angles, index, mscale, True))
    zeros = torch.autograd.grad(rotary_embedding(x, angles, index, backend=backend).sum(), x)[0]
    assert torch.allclose(
        zeros.double(), expected(torch.ones_like(t), angles, index, 1.0, True), atol=2e-2, rtol=2e-2
    )


# ---- contract ----


def test_the_operator_keeps_torchs_contract():
    t, angles, index, *_ = Case(torch.float32, 4, 2, 2, 6, 4, 7).inputs()
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    for backend in BACKENDS:
        every = (*quick, "test_aot_dispatch_dynamic") if backend == "native" else quick
        for rows, checks in ((index, every), (None, quick)):
            arguments = (t.clone().requires_grad_(), angles, rows, 1.5, False, backend)
            found = torch.library.opcheck(torch.ops.ds_efficient.rotary.default, arguments, test_utils=checks)
            assert set(found.values()) == {"SUCCESS"}


def test_fake_and_meta_tensors_need_no_device_and_a_traced_function_gives_the_same():
    with FakeTensorMode():
        t = torch.empty(5, 2, 3, 8, dtype=torch.bfloat16, device="cuda:0")
        index = torch.zeros(2, 5, dtype=torch.int64, device="cuda:0")
        found = rotary_embedding(t, torch.empty(9, 1, 1, 8, device="cuda:0"), index)
        assert found.shape == t.shape and found.device.type == "cuda" and found.dtype == t.dtype
    meta = rotary_embedding(torch.empty(5, 2, 3, 8, device="meta"), torch.empty(9, 8, device="meta"))
    assert meta.shape == (5, 2, 3, 8) and meta.device.type == "meta"

    t, angles, index, *_ = Case(torch.float32, 4, 2, 2, 6, 4, 7).inputs()

    def step(x):
        return rotary_embedding(x * 2, angles, index).sin()

    x = t.clone().requires_grad_()
    traced = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(traced, step(x))
    assert torch.equal(*(torch.autograd.grad((y * y).sum(), x)[0] for y in (traced, step(x))))


T, ANGLES, INDEX = torch.ones(3, 2, 1, 8), torch.ones(5, 1, 1, 4), torch.tensor([[0, 2, 4], [1, 3, 4]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((T[0], ANGLES, INDEX), r"t is torch.float32 of shape \(2, 1, 8\)"),
        ((T.long(), ANGLES, INDEX), "t is torch.int64.*bfloat16"),
        ((T, ANGLES.double(), INDEX), r"angles is torch.float64.*torch.float32 of shape \(L, R\)"),
        ((T, ANGLES[:, 0], INDEX), r"angles .*\(5, 1, 4\).*\(L, 2, 1, R\)"),
        ((T, ANGLES.expand(5, 3, 1, 4), INDEX), r"angles .*\(5, 3, 1, 4\)"),
        ((T, ANGLES.clone().requires_grad_(), INDEX), "needs a gradient.*constant"),
        ((T, ANGLES[..., :3], INDEX), "3 channels.*even number from 2 to 8"),
        ((T, torch.ones(5, 10), INDEX), "10 channels.*even number from 2 to 8"),
        ((T[..., :0], ANGLES[..., :0], INDEX), "0 channels"),
        ((torch.ones(3, 2, 1, 2050), torch.ones(5, 2050), INDEX), "2050 channels.*from 2 to 2048"),
        ((T, ANGLES[:2]), "angles has 2 positions, t has 3"),
        ((T, ANGLES, INDEX.int()), "index is torch.int32.*torch.int64"),
        ((T, ANGLES, INDEX.T), r"index .*\(3, 2\).*\(2, 3\)"),
        ((T, ANGLES, INDEX + 1), r"index has values from 1 to 5; .* 0 \.\. 4"),
        ((T, ANGLES, INDEX - 1), "index has values from -1 to 3"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    for backend in BACKENDS:
        with pytest.raises(UserError, match=message):
            rotary_embedding(*arguments, backend=backend)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match=r"backend='fast'.*auto"):
        rotary_embedding(T, ANGLES, INDEX, backend="fast")


def test_without_a_compiler_auto_gives_the_same_and_says_so_and_native_stops(monkeypatch, tmp_path, caplog):
    native_result = rotary_embedding(T, ANGLES, INDEX, backend="native")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native.forget()
    try:
        for _ in range(2):
            torch.testing.assert_close(rotary_embedding(T, ANGLES, INDEX), native_result)
        assert caplog.text.count("rotary on the CPU runs the plain torch code") == 1
        with pytest.raises(OpBuildError, match="no-such-compiler"):
            rotary.rotary_embedding(T, ANGLES, INDEX, backend="native")
    finally:
        native.forget()
