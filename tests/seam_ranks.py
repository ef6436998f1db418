"""What the ranks of ``megatron/test_linears.py`` run: they need process groups."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron_ranks import config, start
from rank_pool import run_script
from seam_product import PlainProduct, install, numbers
from torch import Tensor

LENGTH, BATCH, INPUTS, OUTPUTS = 6, 3, 16, 24


def _settings(tensor: int, sequence: bool, **changes: Any) -> Any:
    exact = {"params_dtype": torch.float64, "tensor_model_parallel_size": tensor}
    return config(sequence_parallel=sequence, **exact, **changes)


def _layer(kind: str, seam: bool, settings: Any, options: dict[str, Any]) -> Any:
    """Return a layer of ours or of megatron-core, the same weights each time on this rank."""
    from megatron.core.tensor_parallel import layers

    from megatron_patches import linears

    home, prefix = (linears, "Seam") if seam else (layers, "")
    cls = getattr(home, f"{prefix}{'Column' if kind == 'column' else 'Row'}ParallelLinear")
    layer = cls(INPUTS, OUTPUTS, config=settings, init_method=lambda weight: weight, **options)
    rank = dist.get_rank()
    with torch.no_grad():
        layer.weight.copy_(numbers(*layer.weight.shape, start=1 + 1000 * rank, scale=0.5, like=layer.weight))
        if layer.bias is not None:
            begin = 5000 + (100 * rank if kind == "column" else 0)
            layer.bias.copy_(numbers(*layer.bias.shape, start=begin, scale=0.5, like=layer.bias))
    return layer


def _input(kind: str, settings: Any, options: dict[str, Any]) -> Tensor:
    """Return this rank's part of the input, a new leaf."""
    whole = numbers(LENGTH, BATCH, INPUTS, scale=1.0, start=77, like=torch.zeros((), dtype=torch.float64))
    size, rank = dist.get_world_size(), dist.get_rank()
    if kind == "row" and options["input_is_parallel"]:
        whole = whole.chunk(size, dim=-1)[rank]
    elif kind == "column" and settings.sequence_parallel:
        whole = whole.chunk(size, dim=0)[rank]
    return whole.clone().requires_grad_()


def _pass(layer: Any, x: Tensor, recompute: bool = False) -> Tensor:
    """Run forward and backward; return the output with the bias added, wherever the layer leaves it."""
    from megatron.core import tensor_parallel

    def forward(x: Tensor) -> Tensor:
        out, bias = layer(x)
        return out if bias is None else out + bias

    out = tensor_parallel.checkpoint(forward, False, x) if recompute else forward(x)
    cut = out.numel() != LENGTH * BATCH * OUTPUTS
    begin = 9000 + (300 * dist.get_rank() if cut else 0)
    (out * numbers(*out.shape, scale=1.0, start=begin, like=out)).sum().backward()
    return out.detach()


def cases(tensor: int, sequence: bool) -> list[tuple[str, dict[str, Any]]]:
    """Return kinds and arguments of layers."""
    found: list[tuple[str, dict[str, Any]]] = []
    for bias, skip in ((True, False), (True, True), (False, False)):
        common = {"bias": bias, "skip_bias_add": skip}
        # megatron-core returns a bias that was skipped as it is cut, which fits no gathered output.
        found += [
            ("column", {**common, "gather_output": gather}) for gather in ([False] if skip else [False, True])
        ]
        found += [
            ("row", {**common, "input_is_parallel": cut}) for cut in (True, False) if cut or not sequence
        ]
    return found


def compare(tensor: int, sequence: bool) -> dict[str, dict[str, float]]:
    """Return, for each case, the largest differences between a seam layer and megatron-core's own."""
    start(tensor=tensor)
    settings = _settings(tensor, sequence)
    return {
        f"{kind} {options}": _differences(kind, settings, options)
        for kind, options in cases(tensor, sequence)
    }


def _differences(kind: str, settings: Any, options: dict[str, Any]) -> dict[str, float]:
    plain, theirs, ours, again = (_layer(kind, seam, settings, options) for seam in (True, False, True, True))
    xs = [_input(kind, settings, options) for _ in range(4)]
    product, repeated = install(ours), install(again)
    outs = [
        _pass(plain, xs[0]),
        _pass(theirs, xs[1]),  # megatron-core's weight: still without the product
    ]
    result = {
        "untouched output": _error(outs[0], outs[1]),
        "untouched input gradient": _error(xs[0].grad, xs[1].grad),
        "untouched weight gradient": _error(plain.weight.grad, theirs.weight.grad),
    }
    with torch.no_grad():  # now the dense weight that the product stands for
        dense = product.left @ product.right
        dense[:, ::2] += ours.weight
        theirs.weight.copy_(dense)
    theirs.zero_grad()
    xs[1].grad = None
    expected = _pass(theirs, xs[1])
    result["output"] = _error(_pass(ours, xs[2]), expected)
    result["recomputed output"] = _error(_pass(again, xs[3], recompute=True), expected)
    result.update(_gradients("", ours, product, xs[2], theirs, xs[1]))
    result.update(_gradients("recomputed ", again, repeated, xs[3], theirs, xs[1]))
    return result


def _gradients(
    prefix: str, ours: Any, product: PlainProduct, x: Tensor, theirs: Any, x_theirs: Tensor
) -> dict[str, float]:
    """Return the errors of every gradient; a low rank's are the dense weight's, multiplied."""
    dense = theirs.weight.grad
    left, right = dense @ product.right.detach().T, product.left.detach().T @ dense
    dist.all_reduce(right if ours.tensor_parallel_cut == "out" else left)
    result = {
        "input gradient": _error(x.grad, x_theirs.grad),
        "weight gradient": _error(ours.weight.grad, dense[:, ::2]),
        "left gradient": _error(product.left.grad, left),
        "right gradient": _error(product.right.grad, right),
    }
    if theirs.bias is not None:
        result["bias gradient"] = _error(ours.bias.grad, theirs.bias.grad)
    return {prefix + key: value for key, value in result.items()}


def _error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None and found.shape == expected.shape
    assert expected.abs().max() > 0.0
    return float((found - expected).abs().max())


def saved_elements(tensor: int, sequence: bool) -> tuple[int, int]:
    """Return what a column-parallel layer keeps for its backward pass, parameters aside, and its input."""
    start(tensor=tensor)
    settings, options = _settings(tensor, sequence), {"bias": True, "skip_bias_add": False}
    layer = _layer("column", True, settings, options)
    install(layer)
    x = _input("column", settings, options)
    kept: list[int] = []

    def pack(value: Tensor) -> Tensor:
        if not isinstance(value, torch.nn.Parameter):
            kept.append(value.untyped_storage().nbytes() // value.element_size())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(x)
    return sum(kept), x.numel()


def marks(tensor: int, stride: int) -> dict[str, dict[str, Any]]:
    """Return the attributes of the parameters of both kinds of layers with a product."""
    start(tensor=tensor)
    found: dict[str, dict[str, Any]] = {}
    for kind in ("column", "row"):
        own = {"stride": stride} if kind == "column" else {"input_is_parallel": True}
        layer = _layer(kind, True, _settings(tensor, False), {"bias": True, "skip_bias_add": False, **own})
        layer.weight.made_up = "kept"
        layer.weight.requires_grad_(kind == "column")
        install(layer)
        found |= {
            f"{kind} {key}": {**vars(p), "frozen": not p.requires_grad} for key, p in layer.named_parameters()
        }
        found[f"{kind} layer"] = {
            name: getattr(layer, f"tensor_parallel_{name}") for name in ("cut", "rank", "size")
        } | {"stride": layer.weight_stride}
    return found


def once() -> list[Any]:
    """Return the names that a second registration of partial gradients finds, and a gradient's factor."""
    start(tensor=2)
    from megatron_patches.partial_gradients import sum_partial_gradients

    layer = _layer("column", True, _settings(2, False), {"bias": False, "skip_bias_add": False})
    product = install(layer)
    names = sum_partial_gradients(layer, layer.tp_group)
    product.right.backward(torch.ones_like(product.right))
    assert product.right.grad is not None
    return [names, float(product.right.grad.max())]


def refusals() -> dict[str, str]:
    """Return the message of everything that must be refused."""
    start(tensor=2)
    from ds_efficient.errors import UserError
    from megatron_patches.linears import TensorParallelRegion

    settings = _settings(2, False)
    found: dict[str, str] = {}

    def attempt(name: str, error: Any, act: Any) -> None:
        try:
            act()
        except error as problem:
            found[name] = str(problem)

    def fresh(**more: Any) -> Any:
        return _layer("column", True, settings, {"bias": True, "skip_bias_add": False, **more})

    taken = fresh()
    product = install(taken)
    x = _input("column", settings, {})
    attempt("second", UserError, lambda: install(taken))
    attempt("cut", ValueError, lambda: fresh().install_product(_rowwise(product), torch.zeros(2, 2)))
    attempt("foreign weight", UserError, lambda: taken(x, weight=torch.zeros(OUTPUTS // 2, INPUTS).double()))
    for key, value in (("gradient_accumulation_fusion", True), ("grad_output_buffer", []), ("bias_extra", 1)):
        asked: dict[str, Any] = {"bias": None, "gradient_accumulation_fusion": False, "allreduce_dgrad": True}
        asked |= {"sequence_parallel": False, "tp_group": taken.tp_group, key: value}
        attempt(key, (UserError, TypeError), lambda: taken._forward_impl(x, taken.weight, **asked))  # noqa: B023
    remat = fresh()
    remat.gtp_remat_size = 2
    attempt("gtp_remat_size", UserError, lambda: install(remat))
    fused = fresh()
    with mock.patch.object(fused.config, "gradient_accumulation_fusion", True):
        attempt("fusion at installation", UserError, lambda: install(fused))
    partitioned = fresh()
    partitioned.weight.ds_id = 0
    attempt("partitioned", UserError, lambda: install(partitioned))
    attempt("recording", RuntimeError, lambda: TensorParallelRegion(taken.tp_group).enter(x))
    product.axes = {}
    attempt("wrong axes", ValueError, taken.sharded_state_dict)
    with mock.patch.object(PlainProduct, "sharded_axes", new_callable=mock.PropertyMock) as axes:
        axes.side_effect = AttributeError
        attempt("no axes", UserError, taken.sharded_state_dict)
    return found


def _rowwise(product: PlainProduct) -> PlainProduct:
    return PlainProduct(product.left.detach(), product.right.detach(), "in")


def sharded(tensor: int) -> dict[str, list[tuple[Any, Any, Any]]]:
    """Return (global shape, offset, values) of every piece that this rank saves of a gated model."""
    start(tensor=tensor)
    from megatron.core.models.gpt import GPTModel
    from torch.nn.functional import silu

    from megatron_patches.initialization import initialize_weights
    from megatron_patches.layer_spec import block_spec, layer_spec

    settings = config(
        tensor_model_parallel_size=tensor,
        gated_linear_unit=True,
        activation_func=silu,
        init_method=lambda weight: weight,
        output_layer_init_method=lambda weight: weight,
    )
    spec = block_spec(settings, lambda index: layer_spec(transformer_config=settings))
    model = GPTModel(config=settings, transformer_layer_spec=spec, vocab_size=64, max_sequence_length=16)
    initialize_weights(model, seed=11, std=0.02, num_layers=2)
    install_everywhere(model)
    pieces: dict[str, list[tuple[Any, Any, Any]]] = {}
    for key, value in model.sharded_state_dict().items():
        if not key.startswith("decoder.layers.") or key.endswith("_extra_state"):
            continue
        parts = value.build() if hasattr(value, "build") else [value]
        pieces[key] = [(p.global_shape, p.global_offset, p.data.detach().numpy()) for p in parts]
    return pieces


def install_everywhere(model: Any) -> int:
    """Give every linear layer of the transformer layers a product; return their number."""
    from ds_efficient.core.linear_seam import LinearSeam

    layers = [module for module in model.modules() if isinstance(module, LinearSeam)]
    for layer in layers:
        install(layer)
    return len(layers)


def pretrain(argv: list[str]) -> int:
    """Run ``launch/pretrain_gpt.py`` with a product in every linear layer."""
    from pretraining import model

    build = model.build_model

    def build_with_products(*args: Any) -> Any:
        built = build(*args)
        assert install_everywhere(built) == 4 * len(built.decoder.layers)
        return built

    with mock.patch.object(model, "build_model", build_with_products):
        return run_script(argv)


def pretrain_with_partial_gradients(argv: list[str]) -> int:
    """As `pretrain`, with the gradients of the parameters that all ranks hold left partial."""
    with mock.patch("megatron_patches.linears.partial_gradients") as module:
        module.sum_partial_gradients = lambda model, group: []
        return pretrain(argv)
