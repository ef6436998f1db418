"""Everything that touches megatron-core: specs, process groups, CPU support, version guard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_patches.layer_spec import block_spec, layer_spec
    from megatron_patches.mpu import MegatronMpu
    from megatron_patches.version_guard import compatibility

__all__ = ["MegatronMpu", "block_spec", "compatibility", "layer_spec"]

_HOMES = {
    "MegatronMpu": "megatron_patches.mpu",
    "block_spec": "megatron_patches.layer_spec",
    "compatibility": "megatron_patches.version_guard",
    "layer_spec": "megatron_patches.layer_spec",
}


def __getattr__(name: str) -> Any:
    """Import on first use: megatron-core takes seconds, and most commands do not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_HOMES[name])
    return getattr(module, name)
