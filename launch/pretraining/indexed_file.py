"""megatron-core's indexed dataset on disk: its header, a writer in a stream, and the sidecar beside it.

``<prefix>.bin`` holds the token ids of all documents one after another; ``<prefix>.idx`` a header, the length
of every sequence (int32), where it starts (int64, bytes), and the sequence at which every document ends
(int64). ``<prefix>.json``, ours, says which tokenizer made them. megatron-core's own builder keeps Python
lists of all lengths and imports torch; this writer needs neither, and a test holds its bytes equal to that
builder's.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ds_efficient.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
CODES = {name: code for code, name in DTYPES.items()}
_UINT16_LIMIT = 65500  # megatron-core's own limit: DType.optimal_dtype


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that megatron-core chooses for a vocabulary: uint16 below 65500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_LIMIT else np.int32)


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """Return ``prefix + suffix``; dots inside the prefix stay."""
    return Path(f"{prefix}{suffix}")


def write_index(stream: BinaryIO, dtype: np.dtype, lengths: Iterable[np.ndarray]) -> int:
    """Write an index in which every sequence is a document.

    Args:
        stream: seekable binary stream, at its start.
        dtype: of the tokens.
        lengths: int32 arrays, one after another; iterated three times, so no iterator.

    Returns:
        Number of documents.
    """
    count = sum(len(part) for part in lengths)
    stream.write(HEADER.pack(MAGIC, 1, CODES[dtype.name], count, count + 1))
    for part in lengths:
        stream.write(part.astype(np.int32, copy=False).tobytes())
    offset = 0
    for part in lengths:
        ends = offset + np.cumsum(part, dtype=np.int64) * dtype.itemsize
        if len(part):
            stream.write(np.concatenate([np.array([offset], np.int64), ends[:-1]]).tobytes())
            offset = int(ends[-1])
    step = 1 << 20
    for start in range(0, count + 1, step):
        stream.write(np.arange(start, min(start + step, count + 1), dtype=np.int64).tobytes())
    return count


@dataclass(frozen=True)
class IndexedFile:
    """A dataset whose two files were found whole.

    Attributes:
        prefix: path without ``.bin`` or ``.idx``.
        dtype: of the tokens.
        lengths: int32, tokens of every sequence; mapped from the file.
        num_documents: documents.
        bin_bytes: size of the ``.bin``.
    """

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    num_documents: int
    bin_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the dataset."""
        return self.bin_bytes // self.dtype.itemsize

    def max_token(self, limit_bytes: int = 1 << 28) -> int:
        """Return the largest id in the first ``limit_bytes`` of the tokens."""
        largest = -1
        with open(f"{self.prefix}.bin", "rb") as stream:
            left = min(limit_bytes, self.bin_bytes)
            while left > 0:
                block = np.fromfile(stream, self.dtype, count=min(left, 1 << 24) // self.dtype.itemsize)
                if not block.size:
                    break
                largest = max(largest, int(block.max()))
                left -= block.nbytes
        return largest


def open_indexed(prefix: str) -> IndexedFile:
    """Check both files against each other and return what the index says.

    Raises:
        UserError: a file is missing, empty, not an index, or shorter or longer than the index says.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [str(path) for path in (data, idx) if not path.is_file()]
    if missing:
        hint = " (give the prefix, without .bin or .idx)" if prefix.endswith((".bin", ".idx")) else ""
        raise UserError(f"data prefix {prefix}: no such dataset; looked for {' and '.join(missing)}{hint}")
    try:
        with open(idx, "rb") as stream:
            raw = stream.read(HEADER.size)
        idx_bytes, bin_bytes = idx.stat().st_size, data.stat().st_size
    except OSError as error:
        raise UserError(f"data prefix {prefix}: cannot read {idx}: {error.strerror}") from None
    if len(raw) < HEADER.size or raw[: len(MAGIC)] != MAGIC:
        raise UserError(f"{idx}: not an index of megatron-core ({idx_bytes} bytes); prepare the data again")
    _, version, code, count, num_ends = HEADER.unpack(raw)
    if version != 1 or code not in DTYPES:
        raise UserError(
            f"{idx}: version {version}, dtype code {code}: only version 1, codes 1 to 8 are known"
        )
    wanted = HEADER.size + count * 12 + num_ends * 8
    # An index made for several modes has one more byte a sequence.
    if idx_bytes not in (wanted, wanted + count):
        raise UserError(
            f"{idx}: has {idx_bytes} bytes, its header asks for {wanted}: truncated; prepare the data again"
        )
    if count == 0:
        raise UserError(f"data prefix {prefix}: the dataset is empty (0 sequences)")
    dtype = np.dtype(DTYPES[code])
    lengths = np.memmap(idx, np.int32, mode="r", offset=HEADER.size, shape=(count,))
    tokens = int(np.sum(lengths, dtype=np.int64))
    if bin_bytes != tokens * dtype.itemsize:
        raise UserError(
            f"{data}: has {bin_bytes} bytes, the index asks for {tokens * dtype.itemsize} ({tokens} tokens "
            "of "
            f"{dtype.itemsize} bytes): truncated or of another index; prepare the data again"
        )
    if tokens == 0:
        raise UserError(f"data prefix {prefix}: the dataset is empty (0 tokens)")
    return IndexedFile(prefix, dtype, lengths, num_ends - 1, bin_bytes)


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """Return the sidecar of a dataset, None where it has none.

    Raises:
        UserError: the sidecar is there but damaged.
    """
    path = Path(f"{prefix}.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; prepare the data again") from None
    if not isinstance(content, dict) or "tokenizer" not in content:
        raise UserError(f"{path}: not a sidecar of prepare_data.py; move it away or prepare the data again")
    return content


def fingerprint(prefix: str) -> str:
    """Return a hash that changes when the dataset is prepared again: sizes, ends of both files, sidecar.

    Whole files are not read: they may have terabytes.
    """
    digest = hashlib.sha256()
    edge = 1 << 18
    for suffix in (".idx", ".bin"):
        path = f"{prefix}{suffix}"
        size = os.path.getsize(path)
        digest.update(f"{suffix}{size};".encode())
        with open(path, "rb") as stream:
            digest.update(stream.read(edge))
            stream.seek(max(0, size - edge))
            digest.update(stream.read(edge))
    sidecar = Path(f"{prefix}.json")
    if sidecar.is_file():
        digest.update(sidecar.read_bytes())
    return digest.hexdigest()
