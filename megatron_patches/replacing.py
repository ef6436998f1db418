"""How a function of megatron-core's is replaced by one of this project, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARKER = "_ds_efficient_fused"


def is_replaced(module: Any, name: str) -> bool:
    """Whether a module's function is one that `replace` has put there."""
    return getattr(getattr(module, name), _MARKER, False)


def replace(module: Any, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of a module's, where its callers look it up, under the original's name."""
    made = functools.wraps(getattr(module, name))(function)
    setattr(made, _MARKER, True)
    setattr(module, name, made)
