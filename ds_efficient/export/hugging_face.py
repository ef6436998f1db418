"""From a checkpoint of ``launch/pretrain_gpt.py`` to a folder that transformers, or `load_sparse`, reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_efficient.errors import UserError
from ds_efficient.export import formats
from ds_efficient.export.architectures import choose
from ds_efficient.export.checkpoint_reader import CheckpointReader, Linear
from ds_efficient.version import __version__

FORMATS = ("dense", "sparse")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass
class Exported:
    """What was written.

    Attributes:
        folder: it is in.
        architecture: of the Hugging Face model.
        files: names of the files with tensors.
        total_bytes: of the tensors.
        sparse_layers: sparse linear layers in megatron-core's and in Hugging Face's model.
        notes: what the user should know, a sentence each.
    """

    folder: Path
    architecture: str
    files: list[str] = field(default_factory=list)
    total_bytes: int = 0
    sparse_layers: int = 0
    notes: list[str] = field(default_factory=list)


def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    tag: str | None = None,
    format: str = "dense",
    merge_adapters: bool | None = None,
    dtype: str | None = None,
    max_file_bytes: int = formats.MAX_FILE_BYTES,
) -> Exported:
    """Write a checkpoint as a Hugging Face model; `out` appears when everything in it is written.

    Args:
        checkpoint: folder that ``--save`` named, or one checkpoint in it.
        out: folder to make; may exist if it is empty.
        tag: name of the checkpoint; default: the latest.
        format: ``"dense"``, pruned weights are zeros; ``"sparse"``, kept values and masks (`load_sparse`).
        merge_adapters: add active adapters to the dense weights; default: True for dense.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``; default: the precision of the run.
        max_file_bytes: size of a safetensors file.

    Raises:
        UserError: `out` is not empty or cannot be written, the model has no counterpart, or the choices
            contradict each other.
        CheckpointError: the checkpoint is missing or damaged.
    """
    formats.require_safetensors()
    if format not in FORMATS or (dtype is not None and dtype not in DTYPES):
        raise UserError(
            f"format {format!r}, dtype {dtype!r}: allowed: {', '.join(FORMATS)}; {', '.join(DTYPES)}"
        )
    if format == "sparse" and merge_adapters:
        raise UserError(
            "--merge-adapters: merging makes the weights dense, which --format sparse cannot hold; use "
            "--format dense, or --separate-adapters"
        )
    _require_empty(out)
    reader = CheckpointReader(checkpoint, tag, masters=dtype == "fp32")
    architecture = choose(reader)
    if format == "sparse" and not reader.sparse:
        raise UserError(f"--format sparse: {reader.folder} has no sparse layers; use --format dense")
    merge = format == "dense" if merge_adapters is None else merge_adapters
    staging = out.with_name(out.name + ".exporting")
    result = Exported(out, architecture.title)
    try:
        if staging.exists():  # an earlier export was killed
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        chosen = dtype or reader.arguments.precision
        writer = _Writer(staging, format == "sparse", merge, DTYPES[chosen], max_file_bytes, reader)
        for name, content in architecture.entries():
            writer.write(name, content, transposed=architecture.transposed)
        writer.finish(result)
        _write_config(staging, architecture.config(), reader, DTYPES[chosen], result)
        if out.is_dir():
            out.rmdir()
        os.rename(staging, out)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); nothing was kept") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return result


def _require_empty(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists and is not an empty folder; name another one, or remove it")


class _Writer:
    """Writes layer by layer and keeps the description."""

    def __init__(
        self,
        folder: Path,
        sparse: bool,
        merge: bool,
        dtype: torch.dtype,
        max_bytes: int,
        reader: CheckpointReader,
    ) -> None:
        self._folder, self._sparse, self._merge, self._dtype = folder, sparse, merge, dtype
        self._adapters = reader.adapters
        self._reader = reader
        header = {
            "ds_efficient": __version__,
            "format_version": str(formats.FORMAT_VERSION),
            "adapters": "merged" if merge and reader.adapters == "active" else reader.adapters,
        }
        stem = formats.SPARSE_FILES if sparse else formats.DENSE_FILES
        self._main = formats.PartWriter(folder, stem, header, max_bytes)
        self._beside = formats.PartWriter(folder, formats.ADAPTER_FILES, header, max_bytes)
        self._layers: dict[str, dict[str, Any]] = {}
        self._count = 0

    def write(self, name: str, content: Tensor | Linear, *, transposed: bool) -> None:
        """Write one tensor or one linear layer."""
        if isinstance(content, Tensor):
            self._main.add(name, content.to(self._dtype))
            return
        if content.bias is not None:
            self._main.add(f"{name}.bias", content.bias.to(self._dtype))
        self._count += content.mask is not None
        separate = content.up is not None and content.down is not None and not self._merge
        if self._sparse and content.mask is not None:
            self._main.add(f"{name}{formats.VALUES}", content.weight.to(self._dtype), content.pattern)
            self._main.add(f"{name}{formats.MASK}", content.mask)
        else:
            weight = content.dense(merge=self._merge).to(self._dtype)
            self._main.add(f"{name}.weight", weight.t() if transposed else weight)
        if separate:
            assert content.down is not None and content.up is not None
            target = self._main if self._sparse else self._beside
            target.add(f"{name}{formats.DOWN}", content.down.to(self._dtype))
            target.add(f"{name}{formats.UP}", content.up.to(self._dtype))
        if (self._sparse and content.mask is not None) or separate:
            self._layers[name] = {
                "pattern": content.pattern if self._sparse else None,
                "in_features": content.in_features,
                "out_features": content.weight.shape[0],
                "adapter_rank": 0 if not separate or content.down is None else content.down.shape[0],
            }

    def finish(self, result: Exported) -> None:
        """Write what is left, and the description where `load_sparse` needs one."""
        result.files = self._main.finish() + self._beside.finish()
        result.total_bytes = self._main.total_bytes + self._beside.total_bytes
        result.sparse_layers = self._count
        active = self._adapters == "active"
        if self._layers:
            content = {
                "format_version": formats.FORMAT_VERSION,
                "format": "sparse" if self._sparse else "dense",
                "adapters": self._adapters,
                "dtype": _NAMES[self._dtype],
                "files": result.files,
                "layers": self._layers,
            }
            formats.write_json(self._folder / formats.DESCRIPTION, content)
        if active and self._merge:
            result.notes.append("active adapters were merged: the weights of sparse layers are dense now")
        elif active and not self._sparse:
            result.notes.append(
                "adapters are beside the model: ds_efficient.export.load_sparse applies them, "
                "from_pretrained alone does not"
            )
        elif self._adapters == "inactive":
            result.notes.append("adapters were left out: they did not take part yet, so outputs are the same")
        if self._dtype == torch.float32 and self._reader.arguments.precision != "fp32":
            source = (
                "the optimizer's fp32 copies" if self._reader.has_masters else "the half-precision weights"
            )
            result.notes.append(f"fp32 values come from {source}")


def _write_config(
    folder: Path, config: dict[str, Any], reader: CheckpointReader, dtype: torch.dtype, result: Exported
) -> None:
    """Write config.json and, where the run's tokenizer is known and unchanged, the tokenizer's files."""
    config["dtype"] = config["torch_dtype"] = _NAMES[dtype]
    tokenizer = reader.about.get("tokenizer") or {}
    eod = tokenizer.get("eod")
    config["bos_token_id"] = None
    config["eos_token_id"] = eod if isinstance(eod, int) else None
    formats.write_json(folder / "config.json", config)
    arguments = reader.arguments
    if arguments.position_embedding_type == "rope" and arguments.max_position_embeddings is None:
        result.notes.append(
            f"the checkpoint does not tell the longest sequence: config.json says "
            f"{config['max_position_embeddings']}; correct it there"
        )
    if "activation_function" in config and "tanh_gelu" not in reader.about:
        result.notes.append(
            'the checkpoint does not tell how GELU was computed: config.json says "gelu"; after a run on '
            'GPUs without --no-bias-gelu-fusion correct it to "gelu_new"'
        )
    if tokenizer.get("type") != "HuggingFaceTokenizer" or not tokenizer.get("path"):
        return
    path = Path(tokenizer["path"])
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != tokenizer.get("sha256"):
        result.notes.append(f"the tokenizer {path} is missing or has changed since the run: not copied")
        return
    (folder / "tokenizer.json").write_bytes(content)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    added = json.loads(content).get("added_tokens") or []
    for token in added:
        if token.get("id") == eod:
            settings["eos_token"] = token["content"]
    formats.write_json(folder / "tokenizer_config.json", settings)
