"""Imported once by the fork server of `rank_pool`: what takes seconds, and starts no thread."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.runtime.engine
    import megatron.core
    import megatron.core.datasets.gpt_dataset
    import megatron.core.models.gpt
    import megatron.core.pipeline_parallel
    import pretrain_gpt
    import pretraining.setup

    import megatron_patches.pipeline

__all__ = ["deepspeed", "megatron", "megatron_patches", "pretrain_gpt", "pretraining", "torch"]
