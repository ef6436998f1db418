"""Train, validation and test datasets of megatron-core from the command line's arguments."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ds_efficient.errors import UserError
from pretraining.blend import SPLITS, Blend, DataRequest, data_request
from pretraining.broadcast import batch_specs, broadcast_batch
from pretraining.index_cache import ParallelInfo, agree, ensure_cache
from pretraining.indexed_file import IndexedFile, fingerprint, open_indexed, read_sidecar
from pretraining.sampler import PretrainingLoader, make_loader
from pretraining.synthetic import SyntheticDataset
from pretraining.tokenizers import Tokenizer

__all__ = [
    "Datasets",
    "ParallelInfo",
    "PretrainingLoader",
    "batch_specs",
    "broadcast_batch",
    "build_datasets",
    "make_loader",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Datasets:
    """The three splits; None where nothing was asked for, or on ranks that read no data.

    Attributes:
        train, valid, test: samples are dicts as ``batch_specs`` says, without the first dimension.
        attention_mask: samples hold a mask (``--reset-attention-mask``).
        identity: plain values that decide the order of the samples. A checkpoint stores them; on resume
            ``changes_since`` says what differs, because a difference means another order.
    """

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None
    attention_mask: bool
    identity: dict[str, Any]

    def changes_since(self, saved: dict[str, Any]) -> list[str]:
        """Return what decides the order of samples and is not as in ``saved``, one line each."""
        names = sorted(self.identity.keys() | saved.keys())
        return [
            f"{name}: was {saved.get(name)}, is {self.identity.get(name)}"
            for name in names
            if saved.get(name) != self.identity.get(name)
        ]


def build_datasets(args: argparse.Namespace, tokenizer: Tokenizer, parallel: ParallelInfo) -> Datasets:
    """Build the datasets; every rank calls it, torch.distributed initialised unless the data is synthetic.

    Args:
        args: data_path, train_data_path, valid_data_path, test_data_path, split, mock_data, data_cache_path,
            seq_length, seed, reset_position_ids, reset_attention_mask, eod_mask_loss, train_iters (or
            train_samples), eval_iters and global_batch_size, as in Megatron-LM.
        tokenizer: the one the data was prepared with.
        parallel: layout of the ranks.

    Raises:
        UserError: on all ranks, whichever rank found the problem.
    """
    request = data_request(args)
    if request.mock:
        return _synthetic(request, tokenizer, parallel)
    if not torch.distributed.is_initialized():
        raise RuntimeError("megatron-core's datasets need torch.distributed, with a single process too")
    summary: dict[str, Any] = {}
    problem = None
    if parallel.local_rank == 0:
        try:
            summary = _inspect(request, tokenizer)
        except UserError as error:
            problem = str(error)
    agree(problem, parallel)
    summary = _same_on_all_nodes(summary, parallel)
    weights = _weights(request, summary["tokens"])
    identity = {
        **_plain(request),
        "weights": weights,
        "data": summary["fingerprints"],
        "tokenizer": tokenizer.identity(),
    }
    key_material = {**identity, "megatron_core": version("megatron-core")}
    key = hashlib.sha256(json.dumps(key_material, sort_keys=True).encode("utf-8")).hexdigest()[:32]

    def build(cache: str) -> None:
        _build(request, tokenizer, weights, cache, parallel.rank == 0)

    cache = ensure_cache(request.cache, key, build, parallel)
    reads = parallel.reads_data(request.reset_attention_mask)
    splits = _build(request, tokenizer, weights, str(cache), reads)
    checked = [
        None if split is None else CheckedDataset(split, tokenizer.vocab_size, request.reset_attention_mask)
        for split in splits
    ]
    return Datasets(checked[0], checked[1], checked[2], request.reset_attention_mask, identity)


class CheckedDataset(Dataset):
    """Samples of a megatron-core dataset, reduced to the tensors of a batch, their ids checked."""

    def __init__(self, dataset: Dataset, vocab_size: int, attention_mask: bool) -> None:
        self._dataset = dataset
        self._vocab_size = vocab_size
        self._names = list(batch_specs(1, 1, attention_mask=attention_mask))

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return the sample; UserError for an id outside the vocabulary."""
        sample = self._dataset[index]
        largest = max(int(sample["tokens"].max()), int(sample["labels"].max()))
        if largest >= self._vocab_size:
            raise UserError(
                f"sample {index} holds id {largest}, the tokenizer has {self._vocab_size} ids: the data "
                "was prepared "
                "with another tokenizer"
            )
        return {name: sample[name] for name in self._names}


def _synthetic(request: DataRequest, tokenizer: Tokenizer, parallel: ParallelInfo) -> Datasets:
    reads = parallel.reads_data(request.reset_attention_mask)
    splits = [
        SyntheticDataset(
            count,
            seq_length=request.seq_length,
            vocab_size=tokenizer.vocab_size,
            seed=request.seed,
            split=index,
            attention_mask=request.reset_attention_mask,
        )
        if count and reads
        else None
        for index, count in enumerate(request.num_samples)
    ]
    identity = {
        "mock": True,
        "seed": request.seed,
        "seq_length": request.seq_length,
        "vocab_size": tokenizer.vocab_size,
    }
    return Datasets(splits[0], splits[1], splits[2], request.reset_attention_mask, identity)


def _plain(request: DataRequest) -> dict[str, Any]:
    """Return the request as JSON values, without the cache's place."""
    return {
        "prefixes": list(request.prefixes),
        "split": list(request.split) if request.split else None,
        "num_samples": list(request.num_samples),
        "seq_length": request.seq_length,
        "seed": request.seed,
        "reset_position_ids": request.reset_position_ids,
        "reset_attention_mask": request.reset_attention_mask,
        "eod_mask_loss": request.eod_mask_loss,
    }


def _inspect(request: DataRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """Check all files of this node; return their tokens and fingerprints."""
    files = {prefix: open_indexed(prefix) for prefix in request.prefixes}
    for file in files.values():
        _check_vocabulary(file, tokenizer)
    for split, name in enumerate(SPLITS):
        if request.num_samples[split]:
            blend = request.blend or (request.blend_per_split or (None,) * 3)[split]
            for prefix in blend.prefixes if blend else ():
                _check_length(files[prefix], request, split, name)
    return {
        "tokens": {prefix: file.num_tokens for prefix, file in files.items()},
        "fingerprints": {prefix: fingerprint(prefix) for prefix in files},
    }


def _check_vocabulary(file: IndexedFile, tokenizer: Tokenizer) -> None:
    sidecar = read_sidecar(file.prefix)
    if sidecar is not None:
        made, used = sidecar["tokenizer"], tokenizer.identity()
        if made != used:
            raise UserError(
                f"data prefix {file.prefix}: made with another vocabulary: {_name(made)}, but the "
                "tokenizer in use is "
                f"{_name(used)}; give that tokenizer, or prepare the data again"
            )
        largest = int(sidecar.get("max_token", -1))
    else:
        logger.warning("%s.json is missing: only the ids can be checked against the tokenizer", file.prefix)
        largest = file.max_token()
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"data prefix {file.prefix}: holds id {largest}, but the tokenizer in use is "
            f"{_name(tokenizer.identity())}; "
            "give the tokenizer that the data was prepared with"
        )


def _name(identity: Any) -> str:
    if not isinstance(identity, dict):
        return str(identity)
    digest = str(identity.get("sha256") or "")[:12]
    return (
        f"{identity.get('type')} of {identity.get('vocab_size')} ids, end of document {identity.get('eod')}"
        + (f", sha256 {digest}..." if digest else "")
    )


def _check_length(file: IndexedFile, request: DataRequest, split: int, name: str) -> None:
    """Refuse a split too short for one sample: megatron-core would hang on one without tokens."""
    begin, end = 0, len(file.lengths)
    if request.split is not None:
        from megatron.core.datasets.blended_megatron_dataset_config import (
            convert_split_vector_to_split_matrix,
            parse_and_normalize_split,
        )

        text = ",".join(map(str, request.split))
        shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(text))[split]
        begin, end = (round(share * len(file.lengths)) for share in shares)
    tokens = int(np.sum(file.lengths[begin:end], dtype=np.int64))
    if tokens < request.seq_length + 1:
        raise UserError(
            f"data prefix {file.prefix}: its {name} part has {tokens} tokens in {end - begin} of "
            f"{len(file.lengths)} "
            f"documents, one sample of --seq-length {request.seq_length} takes {request.seq_length + 1}; "
            "shorten "
            "--seq-length, change --split (whole documents are split), or give more data"
        )


def _same_on_all_nodes(summary: dict[str, Any], parallel: ParallelInfo) -> dict[str, Any]:
    """Return rank 0's summary, after comparing those of all nodes."""
    if parallel.world_size == 1:
        return summary
    summaries: list[dict[str, Any]] = [{}] * parallel.world_size
    torch.distributed.all_gather_object(summaries, summary, group=parallel.host_group)
    for rank, other in enumerate(summaries):
        for prefix in other.get("fingerprints", {}):
            if other["fingerprints"][prefix] != summaries[0]["fingerprints"][prefix]:
                raise UserError(
                    f"data prefix {prefix}: the files of the node of rank {rank} are not those of rank 0's "
                    "node; copy "
                    "them again"
                )
    return summaries[0]


def _weights(request: DataRequest, tokens: dict[str, int]) -> list[list[float] | None]:
    """Return the weights of the blend (or each split's): as given, else by tokens; None for one prefix."""

    def weigh(blend: Blend | None) -> list[float] | None:
        if blend is None or len(blend.prefixes) == 1:
            return None
        return list(blend.weights or map(float, (tokens[prefix] for prefix in blend.prefixes)))

    return [weigh(blend) for blend in (request.blend_per_split or (request.blend,))]


def _build(
    request: DataRequest, tokenizer: Tokenizer, weights: Sequence[list[float] | None], cache: str, reads: bool
) -> list[Any]:
    """Let megatron-core build the splits that samples are wanted of; None elsewhere."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    def pair(blend: Blend | None, weight: list[float] | None) -> tuple[list[str], list[float] | None] | None:
        return None if blend is None else (list(blend.prefixes), weight)

    wanted = [count > 0 for count in request.num_samples]
    source: dict[str, Any] = {"blend": pair(request.blend, weights[0])}
    if request.split is not None:
        source["split"] = ",".join(map(str, request.split))
    if request.blend_per_split is not None:
        blends = zip(request.blend_per_split, weights, wanted, strict=True)
        source = {"blend_per_split": [pair(blend, weight) if use else None for blend, weight, use in blends]}
        if not any(source["blend_per_split"]):
            return [None] * len(SPLITS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = GPTDatasetConfig(
            random_seed=request.seed,
            sequence_length=request.seq_length,
            path_to_cache=cache,
            tokenizer=tokenizer,  # type: ignore[arg-type]
            reset_position_ids=request.reset_position_ids,
            reset_attention_mask=request.reset_attention_mask,
            eod_mask_loss=request.eod_mask_loss,
            # Without the mask, megatron-core would ignore reset_attention_mask in silence.
            create_attention_mask=request.reset_attention_mask,
            **source,
        )
        if config.split_matrix is not None and request.blend is not None:
            config.split_matrix = [
                share if use else None for share, use in zip(config.split_matrix, wanted, strict=True)
            ]
        return BlendedMegatronDatasetBuilder(
            GPTDataset, list(request.num_samples), lambda: reads, config
        ).build()
