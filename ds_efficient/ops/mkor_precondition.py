"""Gradients between inverse factors: ``G <- M_L G M_R`` at the norm of G, for many layers with few launches.

A factor is a matrix M (d, d), or `LowRank`: an operand W (d, k) with M proportional to ``I - W W^T``
(`ds_efficient.ops.mkor_factored`; the norm is restored, so a common factor of M does not matter). With G the
weight's gradient and the bias's as last column,

    X = G W_R,  Y = W_L^T G - (W_L^T X) W_R^T,    P = G - [W_L | X] [Y; W_R^T]

are ``8 d_out d_in k`` operations (half of it for one side), in place of ``2 d_out d_in (d_out + d_in)``: G is
read once for each side and what is subtracted from it is written once, so at k = 128 the memory's bandwidth
sets the time. The last column is carried beside the weight, so that nothing is copied and the rows keep their
alignment. Dense factors are multiplied as they are; where their size, with
the bias, is no multiple of 8, or their type is not that of the product, they are copied into a padded buffer
first.

Products are made in float32 for float32 gradients and on the CPU; for half gradients on a GPU by tensor cores
in the gradient's own type with float32 sums. Their error is at most some 2^-8 (bfloat16) or 2^-11 (float16)
of ``|M_L| |M_R| |G|`` in spectral norms, the order of what rounding G to that type has cost already. Of
layers of equal shapes everything is a batched product. Gradients too large to be copied are one stack where
they lie at equal distances in memory, as in the flat buffers of ZeRO; elsewhere the products that read or
write them are made one after another. The memory beside the gradients is some operands, a few products, of
2^26 elements together, and where gradients are converted copies of 2^24, or of one larger gradient.

The norms, the scalar product of P and G, the decision and the scaling of weight and bias together are two
launches for up to 80 tensors (``csrc/mkor/mkor_rescale.cu``). Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.ops import mkor_operators as operators
from ds_efficient.ops.mkor_stacks import in_place, stack, stacked
from ds_efficient.ops.native import is_plain

__all__ = ["DTYPES", "LowRank", "operations", "precondition_", "rescale_"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALL = 1 << 20  # elements of a gradient that does not fill a GPU by itself
_TOGETHER = 1 << 24  # elements of small gradients, or of operands, that are stacked
_WAITING = 1 << 26  # elements of products of large gradients that are rescaled together
_ALIGNED = 8  # elements of a row that tensor cores take at a time
OPERATORS = operators.LIBRARY  # the operator exists as long as this object


@dataclass(frozen=True)
class LowRank:
    """An inverse factor proportional to ``I - W W^T``.

    Attributes:
        operand: W, (d, k).
    """

    operand: Tensor


Factor = Tensor | LowRank | None
Stack = Tensor | list[Tensor]
"""(n, rows, columns), or the layers' matrices one by one where they are too large to be copied."""


class _Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    left: Factor
    right: Factor

    def kind(self) -> tuple[object, ...]:
        """Layers of the same kind fit, or do not, for the same reason, and are multiplied together."""
        found: list[object] = []
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                found += (tensor.shape, tensor.dtype, tensor.is_contiguous(), tensor.device)
        for factor in (self.left, self.right):
            if factor is not None:
                tensor = _of(factor)
                found += (type(factor), tensor.shape, tensor.dtype, tensor.device)
            else:
                found.append(None)
        return tuple(found)


def _of(factor: Tensor | LowRank) -> Tensor:
    return factor.operand if isinstance(factor, LowRank) else factor


@torch.no_grad()
def precondition_(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lefts: Sequence[Factor],
    rights: Sequence[Factor],
    *,
    backend: str = "auto",
) -> Tensor:
    """Replace the gradients of layers by ``M_L G M_R``, rescaled to the Frobenius norm of G.

    Args:
        weights: (out, in) gradients, contiguous, float32, bfloat16 or float16; replaced in place.
        biases: of each layer None, or the bias's gradient (out,) in the weight's type: the last column of G,
            replaced in place; the right factor then has size in + 1.
        lefts, rights: of each layer the factor of size out, and of size in; None is the identity.
        backend: of the rescaling: ``"auto"`` (kernels on CUDA, plain torch on the CPU), ``"native"`` (CUDA
            only) or ``"reference"`` (plain torch).

    Returns:
        (layers, 3) float64 on the device: ``|G|^2``, ``|P|^2`` and ``<G, P>`` before the rescaling. Where G
        is zero or not finite, P overflows or rounding turned it away from G (third number not positive), the
        gradient was left as it is.

    Raises:
        UserError: arguments that do not fit each other; names them.
        OpBuildError: the kernels are needed and cannot be built.
    """
    layers = [_Layer(*layer) for layer in zip(weights, biases, lefts, rights, strict=True)]
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        kind = layer.kind()
        if kind not in kinds:
            _check(index, layer)
            kinds[kind] = []
        kinds[kind].append(index)
    if not layers:
        return torch.empty(0, 3, dtype=torch.float64)
    rows: list[Tensor] = [weights[0]] * len(layers)
    for members in _batches(layers, kinds.values()):
        chosen = [layers[index] for index in members]
        products, columns, subtract = _products(chosen)
        elements = chosen[0].weight.numel()
        most = max(1, _WAITING // elements) if elements > _SMALL else len(chosen)
        found: list[Tensor] = []
        for first in range(0, len(chosen), most):
            span = slice(first, first + most)
            found += _replace(chosen[span], products(span), columns and columns[span], subtract, backend)
        for index, row in zip(members, found, strict=True):
            rows[index] = row
    return torch.stack(rows)


def _replace(
    layers: Sequence[_Layer],
    products: Sequence[Tensor],
    columns: Sequence[Tensor] | None,
    subtract: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Overwrite the gradients of layers with weights' and biases' products; return their sums."""
    if columns is None:
        gradients = [layer.weight for layer in layers]
        made = list(products)
    else:
        gradients, made = [], []
        for layer, product, column in zip(layers, products, columns, strict=True):
            assert layer.bias is not None
            gradients += (layer.weight, layer.bias)
            made += (product, column)
    counts = [1 if columns is None else 2] * len(layers)
    return rescale_(gradients, made, counts, subtract=subtract, backend=backend).unbind()


def rescale_(
    gradients: Sequence[Tensor],
    products: Sequence[Tensor],
    counts: Sequence[int],
    *,
    subtract: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Overwrite gradients with products scaled to the gradients' joint norm, layer by layer.

    Args:
        gradients: contiguous tensors of one type of `DTYPES` on one device, overwritten.
        products: the same shapes, of that type or float32.
        counts: number of tensors of each layer in turn, 1 to 80; their sum is that of the tensors.
        subtract: the products are gradients minus these tensors.
        backend: as in `precondition_`.

    Returns:
        As `precondition_`.
    """
    first = gradients[0]
    if first.is_cuda and products[0].dtype != first.dtype:
        products = [product.to(first.dtype) for product in products]
    products = [product.contiguous() for product in products]
    plain = is_plain(first) and not first.is_meta
    run = operators.rescale_ if plain else torch.ops.ds_efficient.mkor_rescale_
    sums: Tensor = run(list(gradients), products, list(counts), subtract, backend)
    return sums


def operations(out_features: int, in_features: int, left: int | None, right: int | None) -> int:
    """Operations of one call for a layer, multiplications and additions counted.

    Args:
        out_features, in_features: shape of G.
        left, right: rank of a low-rank factor, 0 for a matrix, None for no factor.
    """
    total = 0
    for size, rank in ((out_features, left), (in_features, right)):
        if rank is not None:
            total += out_features * in_features * (4 * rank or 2 * size)
    return total


def _check(index: int, layer: _Layer) -> None:
    weight, bias = layer.weight, layer.bias
    if weight.dim() != 2 or weight.dtype not in DTYPES or not weight.is_contiguous() or not weight.numel():
        raise UserError(
            f"weights[{index}] is {weight.dtype} of shape {tuple(weight.shape)} with strides "
            f"{weight.stride()}; expected a contiguous (out, in) of {', '.join(map(str, DTYPES))}"
        )
    rows, columns = weight.shape
    if bias is not None and (bias.shape != (rows,) or bias.dtype != weight.dtype or not bias.is_contiguous()):
        raise UserError(
            f"biases[{index}] is {bias.dtype} of shape {tuple(bias.shape)}; expected a contiguous "
            f"{weight.dtype} of shape ({rows},), or None"
        )
    for name, factor, size in (
        ("lefts", layer.left, rows),
        ("rights", layer.right, columns + (bias is not None)),
    ):
        if factor is None:
            continue
        found = _of(factor)
        fits = found.dim() == 2 and found.shape[0] == size and found.device == weight.device
        if not fits or (not isinstance(factor, LowRank) and found.shape[1] != size):
            raise UserError(
                f"{name}[{index}] has shape {tuple(found.shape)} on {found.device}; expected a matrix "
                f"({size}, {size}) or an operand ({size}, rank) on {weight.device}"
            )


def _batches(layers: Sequence[_Layer], kinds: Iterable[list[int]]) -> list[list[int]]:
    """Layers of one kind whose operands are stacked; of large ones with dense factors each alone."""
    batches: list[list[int]] = []
    for members in kinds:
        first = layers[members[0]]
        factors = (first.left, first.right)
        dense = [factor.numel() for factor in factors if isinstance(factor, Tensor)]
        elements, alone = max([first.weight.numel(), *dense]), False
        if first.weight.numel() > _SMALL:
            ranks = [factor.operand.shape[1] for factor in factors if isinstance(factor, LowRank)]
            elements = sum(first.weight.shape) * sum(ranks)  # beside the product
            if first.weight.dtype != _product_type(first.weight):
                elements += first.weight.numel()  # of the copies
            alone = bool(dense)
        most = 1 if alone else max(1, _TOGETHER // max(1, elements))
        for at in range(0, len(members), most):  # by number: which layers go together depends on no address
            batch = members[at : at + most]
            if len(batch) > 1 and type(first.weight) is Tensor:  # in the order of memory
                batch.sort(key=lambda index: layers[index].weight.data_ptr())
            batches.append(batch)
    return batches


def _product_type(gradient: Tensor) -> torch.dtype:
    return gradient.dtype if gradient.device.type == "cuda" else torch.float32


def _multiply(a: Stack, b: Stack, out: Tensor) -> Tensor:
    """``a b`` for each layer."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.bmm(a, b, out=out)
    for left, right, made in zip(a, b, out, strict=True):
        torch.mm(left, right, out=made)
    return out


def _products(
    layers: Sequence[_Layer],
) -> tuple[Callable[[slice], Sequence[Tensor]], Sequence[Tensor] | None, bool]:
    """``M_L G M_R`` of layers of one kind, or what is subtracted from G to give it.

    Returns:
        What gives the weights' products of some of the layers, made when it is called where they are large;
        the biases' (out,); and whether they are to be subtracted.
    """
    first = layers[0]
    dtype = _product_type(first.weight)
    c = stacked([layer.bias for layer in layers], dtype)
    c = None if c is None else c[..., None]
    left, right = first.left, first.right
    g: Stack
    together = in_place([layer.weight for layer in layers])
    if together is not None:
        g = together.to(dtype)
    else:
        g = [layer.weight.to(dtype) for layer in layers]
        if first.weight.numel() <= _SMALL:
            g = torch.stack(g)
    if left is None and right is None:
        return list(g).__getitem__, _columns(c), False
    u, w = (
        stacked([f.operand if isinstance(f, LowRank) else None for f in side], dtype)
        for side in ([layer.left for layer in layers], [layer.right for layer in layers])
    )
    columns = first.weight.shape[1]
    if not isinstance(left, Tensor) and not isinstance(right, Tensor):
        outer, inner = _difference(g, c, u, w)
        last = None if c is None else torch.bmm(outer, inner[..., columns:])
        body = inner[..., :columns]

        def made(span: slice) -> Sequence[Tensor]:
            if isinstance(g, Tensor):
                return torch.bmm(outer[span], body[span]).unbind()
            return [torch.mm(a, b) for a, b in zip(outer[span], body[span], strict=True)]

        return made, _columns(last), True
    whole = g if isinstance(g, Tensor) else stack(g)
    if w is not None:
        whole, c = _subtracted(whole, c, *_difference(whole, c, None, w))
    elif isinstance(right, Tensor):
        factors = [layer.right for layer in layers if isinstance(layer.right, Tensor)]
        whole, c = _right_dense(whole, c, factors)
    if u is not None:
        whole, c = _subtracted(whole, c, *_difference(whole, c, u, None))
    elif isinstance(left, Tensor):
        m = stack([layer.left for layer in layers if isinstance(layer.left, Tensor)]).to(dtype)
        whole, c = torch.bmm(m, whole), None if c is None else torch.bmm(m, c)
    parts = whole.unbind()
    return parts.__getitem__, _columns(c), False


def _columns(c: Tensor | None) -> Sequence[Tensor] | None:
    return None if c is None else c[..., 0].unbind()


def _subtracted(g: Tensor, c: Tensor | None, outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor | None]:
    columns = g.shape[2]
    part = torch.bmm(outer, inner[..., :columns])
    return g - part, None if c is None else c - torch.bmm(outer, inner[..., columns:])


def _difference(g: Stack, c: Tensor | None, u: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two factors of ``(G | c) - (I - U U^T) (G | c) (I - W W^T)``, U or W None for no factor.

    The bias's column of the second lies behind those of the weight, whose rows stay aligned.
    """
    n, (rows, columns) = len(g), g[0].shape
    if w is not None:
        body = w if c is None else w[:, :-1]
        x = _multiply(g, body, w.new_empty(n, rows, w.shape[2]))
        if c is not None:
            x.addcmul_(c, w[:, -1:])
        if u is None:
            return x, w.mT
    assert u is not None
    k, width = u.shape[2], columns + (c is not None)
    height = k + (0 if w is None else w.shape[2])
    inner = u.new_empty(n, height, -(-width // _ALIGNED) * _ALIGNED)[..., :width]
    y = inner[:, :k]
    _multiply(u.mT, g, y[..., :columns])
    if c is not None:
        torch.bmm(u.mT, c, out=y[..., columns:])
    if w is None:
        return u, y
    y.baddbmm_(torch.bmm(u.mT, x), w.mT, alpha=-1)
    inner[:, k:] = w.mT
    return torch.cat([u, x], 2), inner


def _right_dense(g: Tensor, c: Tensor | None, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """``(G | c) M``."""
    size, columns = len(factors[0]), g.shape[2]
    padded = -(-size // _ALIGNED) * _ALIGNED
    if size == padded and c is None:
        return torch.bmm(g, stack([factor.to(g.dtype) for factor in factors])), None
    m = g.new_zeros(len(g), padded, padded)
    for made, factor in zip(m, factors, strict=True):
        made[:size, :size] = factor
    joined = g.new_zeros(*g.shape[:2], padded)
    joined[..., :columns] = g
    if c is not None:
        joined[..., columns : columns + 1] = c
    product = torch.bmm(joined, m)
    weight = product[..., :columns].contiguous()
    return weight, None if c is None else product[..., columns : columns + 1].contiguous()
