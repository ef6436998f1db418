"""Tokenizers of the data side: bytes, a ``tokenizer.json``, SentencePiece, and numbers as they stand.

Every class has what megatron-core's ``GPTDatasetConfig`` asks of a tokenizer (``vocab_size``, ``eod``,
``pad``, ``unique_identifiers``) and ``identity()``, by which a dataset is tied to the vocabulary that it was
made with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ds_efficient.errors import UserError

TOKENIZER_TYPES = ("ByteLevelTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer")
EOD_CANDIDATES = ("<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<EOD>")

# megatron-core replaces every token equal to `pad` by 0 and masks its loss. No sample of ours is padded, so
# the id that no text can hold is the only safe one.
NO_PAD = -1

_CUT_CONTEXT = 400  # characters on either side of a cut in a long text
_CUTS_TRIED = 100


class Tokenizer(Protocol):
    """What the scripts need of a tokenizer."""

    vocab_size: int
    eod: int
    pad: int

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """JSON values that enter the hash of megatron-core's index cache."""

    def tokenize(self, text: str) -> np.ndarray:
        """Return the ids of ``text``, without end-of-document, as a 1-D integer array."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return ``tokenize`` of every text."""

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``."""

    def identity(self) -> dict[str, Any]:
        """Return type, vocab_size, eod and sha256 (of the model file, or None)."""


class _Base:
    """Shared part: identity and batches by a loop."""

    vocab_size: int
    eod: int
    pad: int = NO_PAD
    sha256: str | None = None

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return self.identity()

    def identity(self) -> dict[str, Any]:
        return {
            "type": type(self).__name__,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "sha256": self.sha256,
        }

    def tokenize(self, text: str) -> np.ndarray:
        return self.tokenize_batch([text])[0]

    def tokenize_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.tokenize(text) for text in texts]


class ByteLevelTokenizer(_Base):
    """The 256 bytes of UTF-8, and 256 for end of document. Exact for every text."""

    vocab_size = 257
    eod = 256

    def tokenize(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes of ``text`` as uint8."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return the text; end-of-document ids are left out, invalid UTF-8 shows as U+FFFD."""
        return bytes(int(i) for i in ids if int(i) != self.eod).decode("utf-8", errors="replace")


class NullTokenizer(_Base):
    """Text that already consists of numbers, separated by white space; end of document is the last id.

    Args:
        num_ids: ids 0 ... num_ids - 1 may stand in the text; the vocabulary has one more.
    """

    def __init__(self, num_ids: int) -> None:
        self.vocab_size = num_ids + 1
        self.eod = num_ids

    def tokenize(self, text: str) -> np.ndarray:
        """Return the numbers in ``text`` as int64; ValueError for anything else."""
        ids = np.array([int(word) for word in text.split()], dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.eod):
            raise ValueError(f"ids {ids.min()} ... {ids.max()} outside 0 ... {self.eod - 1}")
        return ids

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return the numbers, separated by blanks."""
        return " ".join(str(int(i)) for i in ids if int(i) != self.eod)


class HuggingFaceTokenizer(_Base):
    """A ``tokenizer.json`` read by the library ``tokenizers``.

    Special tokens written out in a document are ordinary text, so that no document can forge an end of
    document. A truncation or padding stored in the file is switched off, because it would lose text without a
    word.
    """

    long_text = 1 << 20  # characters above which a text is encoded in pieces

    def __init__(self, model: Path, eod_token: str | None) -> None:
        library = _import("tokenizers", "HuggingFaceTokenizer")
        path = model / "tokenizer.json" if model.is_dir() else model
        content = _read(path, "a tokenizer.json or a folder that holds one")
        try:
            self._tokenizer = library.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises a bare Exception for everything
            raise UserError(
                f"--tokenizer-model {path}: not a tokenizer.json of the library tokenizers: {error}"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have holes, so the count of tokens is not enough.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eod = _find_eod(vocabulary.get, eod_token, path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)

    def tokenize_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text as int32 arrays."""
        if any(len(text) > self.long_text for text in texts):
            return [self._tokenize_long(text) for text in texts]
        encodings = self._encode(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _tokenize_long(self, text: str) -> np.ndarray:
        """Encode piece by piece: the library takes some 100 bytes of memory for a byte of text."""
        parts, begin = [], 0
        while begin < len(text):
            end = self._cut(text, begin)
            (encoding,) = self._encode([text[begin:end]], add_special_tokens=False)
            parts.append(np.array(encoding.ids, dtype=np.int32))
            begin = end
        return np.concatenate(parts) if parts else np.array([], dtype=np.int32)

    def _cut(self, text: str, begin: int) -> int:
        """Return where a piece may end without changing an id; the end of the text if no such place is found.

        Merges never cross the borders of the pre-tokenizer. The place before a newline is one if the text
        around it has the same ids with and without the cut; that also finds tokenizers that put something in
        front of every text.
        """
        end = len(text)
        if self._tokenizer.pre_tokenizer is None:
            return end
        place = begin + self.long_text
        for _ in range(_CUTS_TRIED):
            place = text.find("\n", place + 1)
            if place < 0:
                return end
            left, right = text[max(begin, place - _CUT_CONTEXT) : place], text[place : place + _CUT_CONTEXT]
            both, one, other = self._encode([left + right, left, right], add_special_tokens=False)
            if both.ids == one.ids + other.ids:
                return place
        return end

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return the text, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


class SentencePieceTokenizer(_Base):
    """A SentencePiece model file. Round trips are exact where the model's own normalisation is."""

    def __init__(self, model: Path, eod_token: str | None) -> None:
        library = _import("sentencepiece", "SentencePieceTokenizer")
        content = _read(model, "a SentencePiece model file")
        self._processor = library.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
            self.vocab_size = int(self._processor.GetPieceSize())
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"--tokenizer-model {model}: not a SentencePiece model: {error}") from None
        if self.vocab_size == 0:
            raise UserError(f"--tokenizer-model {model}: not a SentencePiece model: it has no pieces")
        if eod_token is None and self._processor.eos_id() >= 0:
            self.eod = int(self._processor.eos_id())
        else:
            self.eod = _find_eod(self._piece_id, eod_token, model)
        self.sha256 = hashlib.sha256(content).hexdigest()

    def _piece_id(self, piece: str) -> int | None:
        found = int(self._processor.PieceToId(piece))
        return found if self._processor.IdToPiece(found) == piece else None

    def tokenize_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text as int32 arrays, no begin or end added."""
        encoded = self._processor.Encode(list(texts), out_type=int, num_threads=1)
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return the text; control pieces such as end of document leave nothing."""
        return self._processor.Decode([int(i) for i in ids])


def build_tokenizer(
    tokenizer_type: str, model: str | Path | None, vocab_size: int | None, eod_token: str | None = None
) -> Tokenizer:
    """Return the tokenizer that the command line asks for.

    Args:
        tokenizer_type: one of ``TOKENIZER_TYPES``.
        model: path of the model file; a folder holding tokenizer.json will do for HuggingFaceTokenizer.
        vocab_size: ids in the text for NullTokenizer; for the others a check, if given.
        eod_token: the end-of-document token, where the well-known names are not in the vocabulary.

    Raises:
        UserError: unknown type, missing or unreadable model, no end-of-document token, another vocabulary
        size.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise UserError(f"--tokenizer-type {tokenizer_type}: must be one of {', '.join(TOKENIZER_TYPES)}")
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None or vocab_size < 1:
            raise UserError(f"--vocab-size {vocab_size}: NullTokenizer needs it, at least 1")
        return NullTokenizer(vocab_size)
    if tokenizer_type == "ByteLevelTokenizer":
        if model is not None:
            raise UserError(
                f"--tokenizer-model {model}: ByteLevelTokenizer has no model; did you mean "
                "HuggingFaceTokenizer "
                "or SentencePieceTokenizer?"
            )
        tokenizer: Tokenizer = ByteLevelTokenizer()
    elif model is None:
        raise UserError(f"--tokenizer-model: missing; {tokenizer_type} needs the path of its model")
    elif tokenizer_type == "HuggingFaceTokenizer":
        tokenizer = HuggingFaceTokenizer(Path(model), eod_token)
    else:
        tokenizer = SentencePieceTokenizer(Path(model), eod_token)
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: {tokenizer_type} has {tokenizer.vocab_size} ids; leave the "
            "argument out, "
            "the vocabulary is padded for you"
        )
    return tokenizer


@cache
def _import(module: str, tokenizer_type: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise UserError(
            f"--tokenizer-type {tokenizer_type}: needs the package {module} (pip install {module}): {error}"
        ) from None


def _read(path: Path, wanted: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--tokenizer-model {path}: {error.strerror}; give {wanted}") from None
    if not content:
        raise UserError(f"--tokenizer-model {path}: the file is empty; give {wanted}")
    return content


def _find_eod(lookup: Any, eod_token: str | None, path: Path) -> int:
    """Return the id of the end-of-document token, asked for or well known."""
    candidates = EOD_CANDIDATES if eod_token is None else (eod_token,)
    for token in candidates:
        found = lookup(token)
        if found is not None:
            return int(found)
    if eod_token is not None:
        raise UserError(f"--eod-token {eod_token}: not in the vocabulary of {path}")
    raise UserError(
        f"--tokenizer-model {path}: no end-of-document token: none of {', '.join(EOD_CANDIDATES)} is in the "
        "vocabulary; name it with --eod-token"
    )
