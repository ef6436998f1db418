"""Text inputs: which files there are, how they are cut into blocks, and the documents in a block.

A block ends at the first end of a document at or after ``block_bytes``, so its borders depend on the content
alone and a run that was killed finds the same blocks again. Uncompressed lines are read by the worker
processes themselves; compressed files are unpacked in one place and their blocks sent to the workers.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ds_efficient.errors import UserError

FORMATS = (".jsonl", ".txt")
COMPRESSIONS = ("", ".gz", ".xz")
SUFFIXES = tuple(form + compression for form in FORMATS for compression in COMPRESSIONS)
TEXT_DOCUMENTS = ("file", "paragraph", "line")
REJECTED_SUFFIX = (
    "_text_document.rejected.jsonl"  # our own list of bad lines, never an input found in a folder
)
LARGEST_DOCUMENT = 1 << 30
_PIECE = 1 << 20
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_BLANK_EDGES = re.compile(r"\A(?:[ \t\r]*\n)+|\r?(?:\n[ \t\r]*)+\Z")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Input:
    """One input file: ``kind`` is jsonl, file, paragraph or line; ``size`` is in bytes on disk."""

    path: str
    kind: str
    compression: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Block:
    """A run of whole documents of one input.

    Attributes:
        source: number of the input.
        number: number of the block in its input.
        offset: first byte, counted in the unpacked text.
        length: bytes of text.
        payload: the text, or None where the worker reads it from ``path``.
        disk_bytes: bytes of the file on disk that were used up, for the progress bar.
        last: the input ends here.
        damage: why nothing could be read after this block, or None.
    """

    source: int
    number: int
    path: str
    kind: str
    offset: int
    length: int
    payload: bytes | None
    disk_bytes: int
    last: bool
    damage: str | None = None


@dataclass(frozen=True)
class Record:
    """A document (``text``) or what could not be one (``reason``); ``line`` counts from 1 in the block."""

    line: int
    offset: int
    raw: bytes
    text: str | None = None
    reason: str | None = None


def find_inputs(paths: Sequence[str], text_document: str) -> tuple[list[Input], list[str]]:
    """Expand folders and check every file.

    Args:
        paths: files, and folders that are searched for known suffixes in sorted order.
        text_document: what a document is in a .txt: the file, a paragraph or a line.

    Returns:
        The inputs in order, and the files in folders that were passed over for their suffix.

    Raises:
        UserError: a path is missing, unreadable, of unknown suffix, given twice, or a folder holds no text.
    """
    inputs: list[Input] = []
    skipped: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            found, passed = _walk(path)
            if not found:
                raise UserError(f"--input {path}: the folder holds no {', '.join(SUFFIXES)}")
            inputs += [_describe(file, text_document) for file in found]
            skipped += passed
        else:
            inputs.append(_describe(path, text_document))
    seen: dict[str, str] = {}
    for item in inputs:
        real = os.path.realpath(item.path)
        if real in seen:
            raise UserError(
                f"--input {item.path}: given twice (also as {seen[real]}); weigh data with blends instead"
            )
        seen[real] = item.path
    return inputs, skipped


def _walk(folder: str) -> tuple[list[str], list[str]]:
    found: list[str] = []
    passed: list[str] = []
    for directory, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.endswith(".parts"))
        for name in sorted(files):
            known = name.endswith(SUFFIXES) and not name.endswith(REJECTED_SUFFIX)
            (found if known else passed).append(os.path.join(directory, name))
    return found, passed


def _describe(path: str, text_document: str) -> Input:
    suffix = next((suffix for suffix in SUFFIXES if path.endswith(suffix)), None)
    try:
        stat = os.stat(path)
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"--input {path}: {error.strerror}") from None
    if suffix is None:
        raise UserError(f"--input {path}: unknown suffix; known are {', '.join(SUFFIXES)}")
    kind = "jsonl" if suffix.startswith(".jsonl") else text_document
    compression = suffix[len(".jsonl" if kind == "jsonl" else ".txt") :]
    if kind == "file" and stat.st_size > LARGEST_DOCUMENT:
        raise UserError(
            f"--input {path}: {stat.st_size} bytes as one document; use --text-document paragraph or line"
        )
    return Input(path, kind, compression, stat.st_size, stat.st_mtime_ns)


def cut_blocks(source: int, item: Input, block_bytes: int) -> Iterator[Block]:
    """Cut an input into blocks of about ``block_bytes``; an empty file gives one empty block."""
    if item.compression == "" and item.kind in ("jsonl", "line"):
        yield from _cut_on_disk(source, item, block_bytes)
    elif item.compression == "" and item.kind == "file":
        yield Block(source, 0, item.path, item.kind, 0, item.size, None, item.size, True)
    else:
        yield from _cut_stream(source, item, block_bytes)


def _cut_on_disk(source: int, item: Input, block_bytes: int) -> Iterator[Block]:
    start, number = 0, 0
    with open(item.path, "rb") as stream:
        while True:
            stream.seek(start + block_bytes - 1)
            while (piece := stream.readline(_PIECE)) and not piece.endswith(b"\n"):
                pass  # a line longer than a piece
            end = min(stream.tell(), item.size) if piece else item.size
            _check_length(item, end - start, block_bytes)
            last = end == item.size
            yield Block(source, number, item.path, item.kind, start, end - start, None, end - start, last)
            if last:
                return
            start, number = end, number + 1


def _cut_stream(source: int, item: Input, block_bytes: int) -> Iterator[Block]:
    buffer = bytearray()
    state = _StreamState()
    start = number = scanned = reported = 0
    for piece in _unpack(item, state):
        buffer += piece
        _check_length(item, len(buffer), block_bytes)
        while (cut := _find_cut(buffer, item.kind, max(block_bytes - 1, scanned))) > 0:
            payload = bytes(buffer[:cut])
            del buffer[:cut]
            scanned = 0
            used, reported = state.disk_bytes - reported, state.disk_bytes
            yield Block(source, number, item.path, item.kind, start, cut, payload, used, False)
            start, number = start + cut, number + 1
        # A blank line may be spread over two pieces: go back to the last newline that could begin one.
        scanned = max(0, buffer.rfind(b"\n", 0, len(buffer))) if item.kind == "paragraph" else len(buffer)
    used = item.size - reported
    yield Block(
        source, number, item.path, item.kind, start, len(buffer), bytes(buffer), used, True, state.damage
    )


def _check_length(item: Input, length: int, block_bytes: int) -> None:
    """Refuse a document that no memory is planned for."""
    if length > LARGEST_DOCUMENT + block_bytes:
        raise UserError(
            f"--input {item.path}: one document has more than {LARGEST_DOCUMENT} bytes; "
            + ("use --text-document paragraph or line" if item.kind != "jsonl" else "is it lines of JSON?")
        )


def _find_cut(buffer: bytearray, kind: str, begin: int) -> int:
    """Return the end of the first document that ends after ``begin``, 0 where none does yet."""
    if kind == "file" or begin >= len(buffer):
        return 0
    if kind == "paragraph":
        match = _BLANK_LINE.search(buffer, begin)
        return match.end() if match else 0
    return buffer.find(b"\n", begin) + 1


@dataclass
class _StreamState:
    disk_bytes: int = 0
    damage: str | None = None


def _unpack(item: Input, state: _StreamState) -> Iterator[bytes]:
    """Yield the unpacked text in pieces; after what comes before damage, ``state.damage`` is set."""
    with open(item.path, "rb") as stream:
        if item.compression == "":
            while piece := stream.read(_PIECE):
                state.disk_bytes += len(piece)
                yield piece
            return
        raw = b""
        if item.size == 0:
            state.damage = f"the {item.compression[1:]} stream is empty"
        while raw or (raw := _refill(stream, state)):
            decoder = zlib.decompressobj(wbits=31) if item.compression == ".gz" else lzma.LZMADecompressor()
            while not decoder.eof:
                try:
                    piece = decoder.decompress(raw, _PIECE)
                except (zlib.error, lzma.LZMAError) as error:
                    state.damage = f"the {item.compression[1:]} stream is damaged: {error}"
                    return
                raw = getattr(decoder, "unconsumed_tail", b"")  # lzma keeps it inside
                if piece:
                    yield piece
                elif not decoder.eof and not raw and not (raw := _refill(stream, state)):
                    state.damage = f"the {item.compression[1:]} stream ends early"
                    return
            raw = decoder.unused_data.lstrip(b"\0") or _refill(stream, state).lstrip(b"\0")


def _refill(stream: Any, state: _StreamState) -> bytes:
    raw = stream.read(_PIECE)
    state.disk_bytes += len(raw)
    return raw


def read_block(block: Block) -> bytes:
    """Return the bytes of a block."""
    if block.payload is not None:
        return block.payload
    with open(block.path, "rb") as stream:
        stream.seek(block.offset)
        data = stream.read(block.length)
    if len(data) != block.length:
        raise UserError(f"--input {block.path}: became shorter while it was read")
    return data


def records(block: Block, data: bytes, json_key: str) -> Iterator[Record]:
    """Yield every document of a block in order, and what could not be read as one."""
    split = {"jsonl": _split_lines, "line": _split_lines, "paragraph": _split_paragraphs, "file": _whole}
    skip = len(_BOM) if block.offset == 0 and data.startswith(_BOM) else 0
    for line, begin, raw in split[block.kind](data, skip):
        if block.damage and begin + len(raw) == len(data) and not _complete(raw, block.kind):
            yield Record(line, block.offset + begin, raw, reason=block.damage)
            return
        if raw.isspace() and block.kind != "file":
            continue
        yield _parse(line, block.offset + begin, raw, block.kind, json_key)
    if block.damage:
        yield Record(data.count(b"\n") + 1, block.offset + len(data), b"", reason=block.damage)


def _complete(raw: bytes, kind: str) -> bool:
    """Whether the last document before damage certainly ended there."""
    if kind == "paragraph":
        return _BLANK_LINE.search(raw) is not None
    return kind != "file" and raw.endswith(b"\n")


def _split_lines(data: bytes, begin: int) -> Iterator[tuple[int, int, bytes]]:
    line = 1
    while begin < len(data):
        end = data.find(b"\n", begin) + 1 or len(data)
        yield line, begin, data[begin:end]
        begin, line = end, line + 1


def _split_paragraphs(data: bytes, begin: int) -> Iterator[tuple[int, int, bytes]]:
    line = 1
    while begin < len(data):
        match = _BLANK_LINE.search(data, begin)
        end = match.end() if match else len(data)
        yield line, begin, data[begin:end]
        line += data.count(b"\n", begin, end)
        begin = end


def _whole(data: bytes, begin: int) -> Iterator[tuple[int, int, bytes]]:
    yield 1, begin, data[begin:]


def _parse(line: int, offset: int, raw: bytes, kind: str, json_key: str) -> Record:
    try:
        text: Any = raw.decode("utf-8")
        if kind == "jsonl":
            text = _json_text(text, json_key)
        elif kind != "file":
            text = _BLANK_EDGES.sub("", text)
        text.encode("utf-8")
    except UnicodeDecodeError as error:
        return Record(line, offset, raw, reason=f"invalid UTF-8 at byte {error.start} of it")
    except UnicodeEncodeError as error:
        return Record(
            line, offset, raw, reason=f"half a surrogate pair at character {error.start} of the text"
        )
    except RecursionError:
        return Record(line, offset, raw, reason="JSON nested too deeply")
    except ValueError as error:
        return Record(line, offset, raw, reason=str(error))
    return Record(line, offset, raw, text=text)


def _json_text(line: str, json_key: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    if json_key not in value:
        raise ValueError(f"no key {json_key!r}; it has {', '.join(map(repr, list(value)[:5])) or 'none'}")
    if not isinstance(value[json_key], str):
        raise ValueError(f"{json_key!r} is a {type(value[json_key]).__name__}, not a string")
    return value[json_key]
