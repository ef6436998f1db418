"""Layers of a sparse export on a GPU: cuSPARSELt gives the outputs of dense products, for any tokens."""

from __future__ import annotations

import pytest
import torch

from ds_efficient.core.keys import Key
from ds_efficient.errors import OpBuildError
from ds_efficient.ops import cusparselt_library
from ds_efficient.ops.keyed_random import normal
from ds_efficient.slope.linear import SlopeLinear


def why_not() -> str:
    """Reason to skip; a failing start-up check is none."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "no sparse tensor cores"
    try:
        cusparselt_library.load()
    except OpBuildError as error:
        return str(error)
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs")]
KEY = Key(3, ("sparse inference",))


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_cusparselt_gives_the_dense_products(pattern: str, tokens: int) -> None:
    dtype = torch.bfloat16
    source = SlopeLinear(512, 256, pattern=pattern, key=KEY, dtype=dtype, device="cuda")
    adapter = tuple(
        (normal(KEY.fold(name), shape, device="cuda") / 16).to(dtype)
        for name, shape in (("down", [8, 512]), ("up", [256, 8]))
    )
    x = normal(KEY.fold("x"), [tokens, 512], device="cuda").to(dtype)
    outputs = []
    for backend in ("cusparselt", "dense"):
        layer = SlopeLinear.from_compact(
            source.weight.detach(), source.slope.mask, source.bias, pattern=pattern,
            adapter=(adapter[0], adapter[1]), backend=backend,
        )  # fmt: skip
        with torch.no_grad():
            outputs.append(layer(x).float())
        chosen = set(layer.slope.operands.choices.values())
        assert chosen == {backend}
    exact = x.double() @ source.dense_weight().double().t()
    exact += x.double() @ adapter[0].double().t() @ adapter[1].double().t() + source.bias.detach().double()
    limit = 2 * float((outputs[1] - exact).norm() / exact.norm())
    assert float((outputs[0] - exact).norm() / exact.norm()) <= limit
    assert torch.allclose(outputs[0], outputs[1], rtol=2e-2, atol=2e-2)
