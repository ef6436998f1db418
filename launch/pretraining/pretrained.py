"""``--pretrained-checkpoint``: start from the weights of a trained dense model, saved on any layout."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from ds_efficient.errors import CheckpointError
from ds_efficient.export.checkpoint_reader import CheckpointReader, plain_name
from pretraining import model
from pretraining.checkpoints import model_facts, tag_to_load
from pretraining.settings import Settings

logger = logging.getLogger(__name__)

_FLAG = "--pretrained-checkpoint"
_VOCABULARY = "padded vocabulary size"


def build_with_weights(
    args: argparse.Namespace, settings: Settings, vocab_size: int, efficiency: Any, tokenizer: Any
) -> Any:
    """Return this rank's part of the model, with initial weights or those of ``--pretrained-checkpoint``.

    Args:
        args: command line.
        settings: reconciled settings.
        vocab_size: padded vocabulary size.
        efficiency: EfficiencyConfig of the run.
        tokenizer: of the run.

    Raises:
        CheckpointError: as `open_pretrained`; before anything is allocated.
    """
    reader = open_pretrained(args, vocab_size, tokenizer)
    built = model.build_model(args, settings, vocab_size, efficiency)
    if reader is not None:
        fill_from(reader, built)
    return built


def open_pretrained(args: argparse.Namespace, vocab_size: int, tokenizer: Any) -> CheckpointReader | None:
    """Return a reader of ``--pretrained-checkpoint``, or None where the run does not start from one.

    A run that resumes from ``--load`` has its own weights.

    Args:
        args: command line.
        vocab_size: padded vocabulary size of this run.
        tokenizer: of this run.

    Raises:
        CheckpointError: no checkpoint there, damaged, sparse, or of another model.
    """
    if args.pretrained_checkpoint is None:
        return None
    tag = tag_to_load(args)
    if tag is not None:
        logger.info("%s has no effect: the run resumes from %s/%s", _FLAG, args.load, tag)
        return None
    reader = CheckpointReader(Path(args.pretrained_checkpoint), flag=f"{_FLAG} DIR/TAG")
    if reader.sparse:
        raise CheckpointError(
            f"{_FLAG} {reader.folder}: its layers are sparse already; go on with it through --load, or name "
            "the checkpoint of a dense run"
        )
    problems = [
        f"saved with {name} {reader.facts[name]}, this run has {value}"
        for name, value in model_facts(args, vocab_size).items()
        if name in reader.facts and reader.facts[name] != value and name != _VOCABULARY
    ]
    known = (reader.about.get("tokenizer") or {}).get("vocab_size")
    if reader.arguments.vocab_size != vocab_size and known != tokenizer.vocab_size:
        problems.append(
            f"saved with {_VOCABULARY} {reader.arguments.vocab_size}, this run has {vocab_size}, and the "
            "tokenizers are not of one size"
        )
    if problems:
        raise CheckpointError(
            f"{_FLAG} {reader.folder}: the checkpoint does not fit this run:\n  " + "\n  ".join(problems)
        )
    return reader


@torch.no_grad()
def fill_from(reader: CheckpointReader, gpt: Any) -> None:
    """Copy this rank's part of every weight into `gpt`, in place; every rank reads for itself.

    Where the vocabulary is padded otherwise, rows that the checkpoint lacks keep their initial values.

    Args:
        reader: of the checkpoint.
        gpt: GPTModel of this rank, no technique applied.

    Raises:
        CheckpointError: a parameter is not in the checkpoint, or has another shape there.
    """
    from megatron.core import parallel_state

    from megatron_patches.initialization import global_name

    layers = gpt.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    tied = bool(gpt.share_embeddings_and_output_weights)
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in gpt.named_parameters():
        whole = reader.tensor(plain_name(global_name(name, offset, tied=tied)))
        cut = size if getattr(parameter, "tensor_model_parallel", False) else 1
        axis = getattr(parameter, "partition_dim", 0) if cut > 1 else 0
        stride = getattr(parameter, "partition_stride", 1) if cut > 1 else 1
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            _copy_vocabulary(whole, parameter, first=rank * parameter.shape[0] if cut > 1 else 0)
            continue
        expected = [*parameter.shape]
        expected[axis] *= cut
        if [*whole.shape] != expected:
            raise CheckpointError(
                f"{_FLAG} {reader.folder}: {name} is {tuple(whole.shape)} there, {tuple(expected)} in this "
                "model"
            )
        parts = whole.chunk(cut * stride, dim=axis)
        parameter.copy_(torch.cat(parts[rank::cut], dim=axis) if cut > 1 else whole)
    logger.info("weights from %s; optimizer and schedule start anew", reader.folder)


def _copy_vocabulary(whole: torch.Tensor, parameter: torch.Tensor, *, first: int) -> None:
    """Copy the rows of the vocabulary that both have."""
    end = min(first + parameter.shape[0], whole.shape[0])
    if end > first:
        parameter[: end - first].copy_(whole[first:end])
