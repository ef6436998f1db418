"""Synthetic tokens for ``--mock-data``: a function of seed, split and index alone."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset


class SyntheticDataset(Dataset):
    """Independent ids, small ones more frequent: id = floor(vocab_size * u**3), so that a loss can fall.

    Args:
        num_samples: length of the dataset.
        seq_length: tokens a sample.
        vocab_size: ids are below it.
        seed: of the run.
        split: 0 train, 1 valid, 2 test.
        attention_mask: also give a causal mask, True where attention is cut off.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seq_length: int,
        vocab_size: int,
        seed: int,
        split: int,
        attention_mask: bool = False,
    ) -> None:
        self._num_samples = num_samples
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        self._key = (seed % 2**64, split)
        self._attention_mask = attention_mask

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return tokens, labels, position_ids (int64, [seq_length]) and loss_mask (float32)."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        # The counter's upper words hold the index; the lower ones advance within a sample.
        bits = np.random.Philox(
            key=np.array(self._key, np.uint64), counter=np.array([0, 0, 0, index], np.uint64)
        )
        uniform = np.random.Generator(bits).random(self._seq_length + 1)
        ids = torch.from_numpy(np.floor(self._vocab_size * uniform**3).astype(np.int64))
        sample = {
            "tokens": ids[:-1].clone(),
            "labels": ids[1:].clone(),
            "loss_mask": torch.ones(self._seq_length, dtype=torch.float32),
            "position_ids": torch.arange(self._seq_length, dtype=torch.int64),
        }
        if self._attention_mask:
            shape = (1, self._seq_length, self._seq_length)
            sample["attention_mask"] = torch.ones(shape, dtype=torch.bool).triu(diagonal=1)
        return sample
