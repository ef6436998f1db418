"""Operators ``mkor_update_`` and ``mkor_rescale_`` of ``torch.ops.ds_efficient``.

`ds_efficient.ops.mkor` and `ds_efficient.ops.mkor_precondition` check arguments and call them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_efficient.errors import OpBuildError
from ds_efficient.ops import mkor_reference as reference
from ds_efficient.ops.mkor_native import CudaLibrary, Library
from ds_efficient.ops.registration import define_operators


def update_(
    matrices: Sequence[Tensor],
    vectors: Tensor,
    largest: Tensor,
    gamma: float,
    threshold: float,
    zeta: float,
    backend: str,
) -> Tensor:
    """Run `ds_efficient.ops.mkor.update_`, arguments checked."""
    kind = CudaLibrary if largest.device.type == "cuda" else Library
    library = kind.for_device(largest.device, backend)
    if library is None:
        return reference.update_(matrices, vectors, largest, gamma, threshold, zeta)
    outcome = torch.empty(len(matrices), dtype=torch.int32, device=largest.device)
    if not matrices:
        return outcome
    return library.update(matrices, vectors, largest, outcome, (gamma, threshold, zeta))


def _update_fake(
    matrices: Sequence[Tensor],
    vectors: Tensor,
    largest: Tensor,
    gamma: float,
    threshold: float,
    zeta: float,
    backend: str,
) -> Tensor:
    return largest.new_empty(len(matrices), dtype=torch.int32)


def rescale_(
    gradients: Sequence[Tensor],
    products: Sequence[Tensor],
    counts: Sequence[int],
    subtract: bool,
    backend: str,
) -> Tensor:
    """Run `ds_efficient.ops.mkor_precondition.rescale_`, arguments checked."""
    device = gradients[0].device
    if device.type != "cuda":
        if backend == "native":
            raise OpBuildError('mkor: the rescaling has compiled code for CUDA only; use backend="auto"')
        return reference.rescale_(gradients, products, counts, subtract)
    library = CudaLibrary.for_device(device, backend)
    if library is None:
        return reference.rescale_(gradients, products, counts, subtract)
    return library.rescale(gradients, products, counts, subtract)


def _rescale_fake(
    gradients: Sequence[Tensor],
    products: Sequence[Tensor],
    counts: Sequence[int],
    subtract: bool,
    backend: str,
) -> Tensor:
    return gradients[0].new_empty(len(counts), 3, dtype=torch.float64)


LIBRARY = define_operators(
    (
        "mkor_update_(Tensor(a!)[] matrices, Tensor vectors, Tensor(b!) largest, float gamma, "
        "float threshold, float zeta, str backend) -> Tensor",
        update_,
        _update_fake,
    ),
    (
        "mkor_rescale_(Tensor(a!)[] gradients, Tensor[] products, int[] counts, bool subtract, "
        "str backend) -> Tensor",
        rescale_,
        _rescale_fake,
    ),
)
