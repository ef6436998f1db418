"""Lets megatron-core run on machines without a GPU.

megatron-core names CUDA in seven places that a GPT model on gloo would reach. `install` replaces each of
them by its CPU counterpart; it does nothing where a GPU is present, and doing it twice is harmless.
Nothing here changes a result: devices and random-number states only.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Iterator
from typing import Any

import torch

logger = logging.getLogger(__name__)

_MARKER = "_ds_efficient_cpu_compat"


def install() -> list[str]:
    """Replace the CUDA-only places of megatron-core on a machine without a GPU.

    Call before any megatron-core model is built.

    Returns:
        Names of what was replaced; empty with a GPU, or when done before.
    """
    if torch.cuda.is_available() or getattr(torch.cuda, _MARKER, False):
        return []
    replaced = [*_patch_torch(), *_patch_rng(), *_patch_masks(), *_patch_schedules()]
    setattr(torch.cuda, _MARKER, True)
    logger.info("megatron-core on the CPU: replaced %s", ", ".join(replaced))
    return replaced


def _patch_torch() -> list[str]:
    """Scratch buffers ask for the current CUDA device; the pipeline synchronises it; tied embeddings move."""
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    return ["torch.cuda.current_device", "torch.cuda.synchronize", "torch.Tensor.cuda"]


def _patch_rng() -> list[str]:
    """Dropout streams live in CUDA generators; here they live in the CPU generator."""
    from megatron.core.tensor_parallel import random as mcore_random

    class CpuRngStatesTracker(mcore_random.CudaRNGStatesTracker):  # type: ignore[misc]
        """Named random streams on the CPU generator, with nested forks."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._active: str | None = None

        def add(self, name: str, seed: int) -> None:
            """Create the stream `name`, seeded by `seed`; both must be new."""
            if seed in self.seeds_:
                raise ValueError(f"random stream {name!r}: seed {seed} already exists; choose another offset")
            if name in self.states_:
                raise ValueError(f"random stream {name!r} already exists")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            """Run the block on stream `name`, then go on with the stream that was active."""
            if name not in self.states_:
                raise ValueError(f"random stream {name!r} does not exist; seed megatron-core first")
            outer_name, outer_state = self._active, torch.get_rng_state()
            if outer_name is not None:
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._active = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                self._active = outer_name
                torch.set_rng_state(self.states_[outer_name] if outer_name is not None else outer_state)

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    mcore_random._CUDA_RNG_STATE_TRACKER = CpuRngStatesTracker()
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
    return ["the RNG tracker", "its get and set of a state"]


def _patch_masks() -> list[str]:
    """The default causal mask is created on the literal device "cuda"."""
    from megatron.core.fusions import fused_softmax
    from megatron.core.transformer import utils

    def causal_mask(size: int) -> torch.Tensor:
        return torch.ones(size, size, dtype=torch.bool).triu(1)

    for module in (utils, fused_softmax):  # the second imported the function by name
        if hasattr(module, "get_default_causal_mask"):
            module.get_default_causal_mask = causal_mask
    return ["the default causal mask"]


def _patch_schedules() -> list[str]:
    """The schedules count tokens in a tensor on the literal device "cuda"."""
    from megatron.core.pipeline_parallel import schedules

    class TorchOnCpu(types.ModuleType):
        """`torch`, but `zeros` ignores the device."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def zeros(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            """Return zeros on the CPU."""
            return torch.zeros(*args, **kwargs)

    schedules.torch = TorchOnCpu("torch")
    return ["the schedules' token counter"]
