"""What DeepSpeed asks of ``mpu=``, answered by megatron-core's parallel_state.

parallel_state cannot be handed over directly: it lacks ``get_model_parallel_world_size``. Two rules matter:

- `get_model_parallel_rank` is the *tensor*-parallel rank. DeepSpeed counts replicated parameters in the
  gradient norm only where it is 0, so the full rank would lose the norms and biases of later pipeline stages.
  Checkpoint files need the full rank instead: `deepspeed_compat.set_checkpoint_rank` sets it.
- Methods named ``*_sequence_parallel_*`` must not exist: for DeepSpeed they mean Ulysses.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


class MegatronMpu:
    """Adapter from megatron-core's process groups to DeepSpeed's ``mpu`` interface."""

    def get_data_parallel_group(self) -> Any:
        """Return the group over which gradients are averaged."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        """Return the data-parallel size."""
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        """Return the rank in the data-parallel group."""
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return the global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_group(self) -> Any:
        """Return the group of all ranks that hold one copy of the model (tensor x pipeline)."""
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        """Return tensor-parallel size times pipeline-parallel size."""
        return (
            self.get_tensor_model_parallel_world_size()
            * parallel_state.get_pipeline_model_parallel_world_size()
        )

    def get_model_parallel_rank(self) -> int:
        """Return the tensor-parallel rank (module docstring says why)."""
        return self.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_group(self) -> Any:
        """Return the tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        """Return the rank in the tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Return the tensor-parallel size."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Return the global rank of the tensor-parallel group's first member."""
        return parallel_state.get_tensor_model_parallel_src_rank()

    def get_pipeline_model_parallel_group(self) -> Any:
        """Return the pipeline-parallel group."""
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_rank(self) -> int:
        """Return the pipeline stage of this rank."""
        return parallel_state.get_pipeline_model_parallel_rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Return the number of pipeline stages."""
        return parallel_state.get_pipeline_model_parallel_world_size()

    def checkpoint_rank(self) -> int:
        """Return the rank within one copy of the model, unique over tensor and pipeline ranks."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return stage * self.get_tensor_model_parallel_world_size() + self.get_tensor_model_parallel_rank()
