"""A text corpus that every machine has: source, help topics and licence of the running Python.

Nothing is downloaded. Which file goes to training and which to validation depends on a hash of its path, so
no file is in both, and the same Python always gives the same corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ds_efficient.errors import UserError

END_OF_TEXT = "<|endoftext|>"
CORPUS_FORMAT = 1
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "_bundled", "node_modules"}
_TESTS = {"test", "tests", "idle_test"}
_PROSE = (".txt", ".rst", ".md")
_LEAST_BYTES = 200  # shorter files are empty __init__.py and the like
_LEAST_CORPUS_BYTES = 100_000


@dataclass(frozen=True)
class Document:
    """One text and where it comes from, relative to the standard library."""

    source: str
    text: str

    @property
    def order(self) -> str:
        """Hash of the source: the place in the corpus, and the split."""
        return _hash(self.source)


def _hash(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8")).hexdigest()


def collect(max_bytes: int) -> list[Document]:
    """Return distinct documents of the standard library, about ``max_bytes`` of UTF-8, in hash order.

    Library and prose come before its tests, which many installations lack. Reads no more files than needed.

    Raises:
        UserError: the library holds too little text.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[bytes] = set()
    chosen: list[Document] = []
    size = 0
    for source, read in _sources(root):
        text = read()
        content = text.encode("utf-8") if text is not None else b""
        digest = hashlib.sha256(content).digest()
        if text is None or len(content) < _LEAST_BYTES or digest in seen or size + len(content) > max_bytes:
            continue
        seen.add(digest)
        size += len(content)
        chosen.append(Document(source, text))
        if max_bytes - size < _LEAST_BYTES + max_bytes // 100:
            break
    if size < _LEAST_CORPUS_BYTES:
        raise UserError(
            f"{root}: found only {size} bytes of text; --max-megabytes is too small, or this Python has no "
            "library source (install the full python3 package)"
        )
    return sorted(chosen, key=lambda document: document.order)


def _sources(root: Path) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Yield name and reader of every text: library and help topics by hash, then the tests by hash."""
    library: dict[str, Callable[[], str | None]] = {}
    tests: dict[str, Callable[[], str | None]] = {}
    for path in _files(root):
        relative = path.relative_to(root)
        if relative.as_posix() != "pydoc_data/topics.py":  # its texts come one by one
            group = tests if _TESTS & set(relative.parts) else library
            group[relative.as_posix()] = partial(_read, path)
    for name, text in _topics().items():
        library[f"pydoc_data/topics/{name}"] = partial(str, text)
    for group in (library, tests):
        yield from sorted(group.items(), key=lambda item: _hash(item[0]))


def _files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _LEFT_OUT)
        if Path(folder) == root / "encodings":
            names = [name for name in names if not name.startswith(("cp", "iso8859", "mac_", "koi8", "kz"))]
        yield from (Path(folder, name) for name in sorted(names) if name.endswith((".py", *_PROSE)))


def _read(path: Path) -> str | None:
    """Return the text, None for what is not UTF-8: some files test other encodings."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return dict(topics)


def is_validation(document: Document, percent: float) -> bool:
    """Whether a document belongs to validation: by another part of its hash than its order."""
    return int(document.order[-8:], 16) / 2**32 < percent / 100


def write_jsonl(stream: BinaryIO, documents: Iterable[Document]) -> None:
    """Write one object a line: text, source."""
    for document in documents:
        stream.write(json.dumps({"text": document.text, "source": document.source}).encode("ascii") + b"\n")


def train_tokenizer(stream: BinaryIO, texts: Iterable[str], vocab_size: int) -> None:
    """Train a byte-level BPE on ``texts`` and write its tokenizer.json.

    Raises:
        UserError: the vocabulary is smaller than the bytes and the special token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise UserError(
            f"--vocab-size {vocab_size}: must be at least {len(alphabet) + 1}: the bytes and {END_OF_TEXT}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    stream.write(tokenizer.to_str(pretty=False).encode("utf-8"))


@dataclass(frozen=True)
class CorpusFiles:
    """Where the corpus is."""

    folder: Path

    @property
    def train(self) -> Path:
        """Documents to train on."""
        return self.folder / "train.jsonl"

    @property
    def valid(self) -> Path:
        """Documents to evaluate on."""
        return self.folder / "valid.jsonl"

    @property
    def tokenizer(self) -> Path:
        """tokenizer.json."""
        return self.folder / "tokenizer.json"

    @property
    def facts(self) -> Path:
        """Written last: the corpus is complete."""
        return self.folder / "corpus.json"

    @property
    def unfinished(self) -> Path:
        """There while the other files are ours but not all written."""
        return self.folder / "corpus.unfinished"


def build(
    folder: Path,
    *,
    max_megabytes: float,
    vocab_size: int,
    valid_percent: float,
    overwrite: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write train.jsonl, valid.jsonl, tokenizer.json and corpus.json, unless they are there already.

    Returns:
        The facts in corpus.json.

    Raises:
        UserError: other files of these names are there, or an argument is out of range.
    """
    if not 0 < valid_percent < 50:
        raise UserError(f"--valid-percent {valid_percent}: must be above 0 and below 50")
    files = CorpusFiles(folder)
    arguments = {
        "format": CORPUS_FORMAT,
        "python": platform.python_version(),
        "max_megabytes": max_megabytes,
        "vocab_size": vocab_size,
        "valid_percent": valid_percent,
    }
    existing = [path for path in (files.train, files.valid, files.tokenizer, files.facts) if path.exists()]
    if existing and not overwrite:
        facts = _facts(files.facts)
        if len(existing) == 4 and facts.get("arguments") == arguments:
            say(f"{folder}: the corpus is complete already; kept")
            return facts
        if facts or not files.unfinished.exists():
            raise UserError(
                f"{existing[0]}: exists and is not of this corpus; choose another folder or add --overwrite"
            )
    folder.mkdir(parents=True, exist_ok=True)
    files.unfinished.touch()
    files.facts.unlink(missing_ok=True)
    say(f"collecting text of Python {platform.python_version()}")
    documents = collect(int(max_megabytes * 1e6))
    train = [document for document in documents if not is_validation(document, valid_percent)]
    valid = [document for document in documents if is_validation(document, valid_percent)]
    if not valid:
        raise UserError(f"--valid-percent {valid_percent}: leaves no document for validation; raise it")
    _atomic(files.train, lambda stream: write_jsonl(stream, train))
    _atomic(files.valid, lambda stream: write_jsonl(stream, valid))
    say(f"training a tokenizer of {vocab_size} ids")
    _atomic(
        files.tokenizer, lambda stream: train_tokenizer(stream, (item.text for item in train), vocab_size)
    )
    facts = {"arguments": arguments, "train": _count(train), "valid": _count(valid)}
    _atomic(files.facts, lambda stream: stream.write(json.dumps(facts, indent=1).encode("ascii") + b"\n"))
    files.unfinished.unlink()
    return facts


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _count(documents: list[Document]) -> dict[str, int]:
    return {
        "documents": len(documents),
        "bytes": sum(len(document.text.encode("utf-8")) for document in documents),
    }


def _atomic(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            fill(stream)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
