"""Trained models for other programs: Hugging Face folders, sparse inference, and a reader of checkpoints."""

from ds_efficient.export.checkpoint_reader import CheckpointReader
from ds_efficient.export.hugging_face import Exported, export_hf
from ds_efficient.export.sparse_loader import load_sparse

__all__ = ["CheckpointReader", "Exported", "export_hf", "load_sparse"]
