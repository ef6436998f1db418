"""Linear layers that techniques replace: which ones they may mean, and putting others in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ds_efficient.core.inventory import ModuleInfo

_LAYER_NUMBER = re.compile(r"((?:^|\.)(?:layers|layer|h|blocks|block)\.)\d+(?=\.|$)")


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether this is transformers' Conv1D, known by its name: a linear layer with weight (in, out)."""
    weight: Any = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None


def replace_everywhere(model: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Put `new` wherever the model has `old`: more than one place where it uses the layer twice."""
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module is old]
    for place in places:
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def reason_to_leave(
    module: ModuleInfo, modules: Sequence[str], exclude: Sequence[str], shared: Iterable[str | None]
) -> str:
    """Return why a linear layer stays as it is, or an empty text.

    Args:
        module: a linear layer.
        modules, exclude: names in the technique's section.
        shared: names of the modules whose weight another one uses too.
    """
    if module.matches(exclude):
        return "excluded"
    if module.kind == "output":
        return "projection onto the vocabulary"
    if not module.matches(modules):
        return "not in modules"
    if module.tied_to is not None or module.name in shared:
        return "shares its weight"
    if module.parameters < module.in_features * module.out_features:
        return "its weight is computed from other parameters"
    return ""


def global_name(name: str, layer: int | None) -> str:
    """Return a module's name as if all pipeline stages were one model: the key of its random draws."""
    return name if layer is None else _LAYER_NUMBER.sub(lambda found: f"{found[1]}{layer}", name, count=1)
