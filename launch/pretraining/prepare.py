"""From text to megatron-core's indexed dataset: worker processes, parts on disk, and their concatenation.

Every block of the input becomes a part in ``<output>.parts/``, whole or absent. A run that was killed finds
the finished parts again. When all are there they are concatenated in the order of the input, so the result
depends neither on the number of workers nor on how often the run was stopped.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ds_efficient.errors import UserError
from pretraining.indexed_file import token_dtype
from pretraining.text_input import Block, Input, Record, cut_blocks, read_block, records
from pretraining.tokenizers import Tokenizer

_BATCH_CHARACTERS = 1 << 18
_REASONS_KEPT = 5


@dataclass(frozen=True)
class Job:
    """What a worker has to know.

    Attributes:
        parts: folder of the parts.
        tokenizer: turns text into ids.
        append_eod: end every document with the end-of-document id.
        json_key: key of the text in a line of JSON.
    """

    parts: Path
    tokenizer: Tokenizer
    append_eod: bool
    json_key: str


def part_path(parts: Path, source: int, number: int, suffix: str) -> Path:
    """Return a file of a part; ``.json`` is written last and makes the part valid."""
    return parts / f"{source:06d}-{number:08d}{suffix}"


def read_part(parts: Path, source: int, number: int) -> dict[str, Any] | None:
    """Return the facts of a finished part, None where it is not finished."""
    try:
        facts = json.loads(part_path(parts, source, number, ".json").read_text())
        whole = os.path.getsize(part_path(parts, source, number, ".bin")) == facts["bin_bytes"]
    except (OSError, ValueError):
        return None
    return facts if whole else None


def encode_inputs(
    job: Job, inputs: list[Input], *, block_bytes: int, workers: int, max_bad: int | None
) -> None:
    """Make every part that is not there yet, with a progress bar in bytes of input.

    Raises:
        UserError: a worker died, the disk is full, or more than ``max_bad`` lines were bad.
    """
    tqdm.monitor_interval = 0  # its thread must not exist when the workers are forked
    bad = 0
    progress = tqdm(
        total=sum(item.size for item in inputs),
        unit="B",
        unit_scale=True,
        desc="tokenize",
        mininterval=0.5,
        smoothing=0.05,
    )

    def count(facts: dict[str, Any]) -> None:
        nonlocal bad
        bad += facts["rejected"]
        progress.update(facts["disk_bytes"])
        if bad:
            progress.set_postfix_str(f"{bad} bad lines", refresh=False)
        if max_bad is not None and bad > max_bad:
            raise UserError(
                f"{bad} bad lines, more than --max-bad-lines {max_bad}; the finished parts are kept in "
                f"{job.parts}. "
                f"First: {'; '.join(facts['reasons'])}. Run again with a larger --max-bad-lines to go on."
            )

    with progress:
        _run(job, _missing_blocks(job.parts, inputs, block_bytes, count), workers, count)


def _missing_blocks(parts: Path, inputs: list[Input], block_bytes: int, count: Any) -> Iterator[Block]:
    """Yield the blocks without a part; tell ``count`` of the others."""
    for source, item in enumerate(inputs):
        finished = _finished_parts(parts, source)
        if finished and finished[-1]["last"]:  # also spares unpacking a compressed file again
            for facts in finished:
                count(facts)
            continue
        for block in cut_blocks(source, item, block_bytes):
            part = read_part(parts, source, block.number)
            if part is None:
                yield block
            else:
                count(part)


def _finished_parts(parts: Path, source: int) -> list[dict[str, Any]]:
    """Return the facts of the unbroken run of parts at the beginning of an input."""
    found: list[dict[str, Any]] = []
    while (facts := read_part(parts, source, len(found))) is not None:
        found.append(facts)
        if facts["last"]:
            break
    return found


def _run(job: Job, blocks: Iterator[Block], workers: int, count: Any) -> None:
    """Send the blocks to worker processes; never more than two a worker are in flight."""
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("fork"), initializer=_start_worker, initargs=(job, os.getpid())
    )
    pending: set[Future[dict[str, Any]]] = set()
    try:
        for block in blocks:
            pending.add(pool.submit(_encode_in_worker, block))
            if len(pending) >= 2 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    count(future.result())
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                count(future.result())
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed (out of memory?); the finished parts are kept in {job.parts}: "
            "run again, "
            "with fewer --workers if memory is short"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_job: Job | None = None


def _start_worker(job: Job, parent: int) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops on Ctrl-C and ends the pool
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    """End an orphan: a worker waits for work for ever when its parent is killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode_in_worker(block: Block) -> dict[str, Any]:
    assert _job is not None
    try:
        return encode_block(_job, block)
    except OSError as error:
        raise UserError(
            f"{error.filename or _job.parts}: {error.strerror}; the finished parts are kept in {_job.parts}: "
            "run again when this is mended"
        ) from None


def encode_block(job: Job, block: Block) -> dict[str, Any]:
    """Write the part of one block: tokens, lengths, rejected documents, and last its facts."""
    data = read_block(block)
    writer = _PartWriter(job, block)
    try:
        batch: list[Record] = []
        size = 0
        for record in records(block, data, job.json_key):
            if record.text is None:
                writer.reject(record, record.reason or "")
                continue
            batch.append(record)
            size += len(record.text)
            if size >= _BATCH_CHARACTERS:
                writer.add(batch)
                batch, size = [], 0
        writer.add(batch)
        return writer.commit(data)
    except BaseException:
        writer.discard()
        raise


class _PartWriter:
    """Collects one part under temporary names and gives the final names at the end."""

    def __init__(self, job: Job, block: Block) -> None:
        self._job = job
        self._block = block
        self._dtype = token_dtype(job.tokenizer.vocab_size)
        self._end = np.array([job.tokenizer.eod] if job.append_eod else [], self._dtype)
        self._temporary = part_path(job.parts, block.source, block.number, f".{os.getpid()}.tmp")
        self._stream = open(self._temporary, "wb")
        self._lengths: list[int] = []
        self._rejected: list[tuple[Record, str]] = []
        self._empty = self._text_bytes = 0
        self._largest = -1

    def add(self, batch: list[Record]) -> None:
        """Tokenize and write documents; what the tokenizer refuses is rejected."""
        texts = [record.text or "" for record in batch]
        try:
            encoded: list[Any] = list(self._job.tokenizer.tokenize_batch(texts))
        except (ValueError, TypeError):
            encoded = [self._encode_one(text) for text in texts]
        for record, text, ids in zip(batch, texts, encoded, strict=True):
            if isinstance(ids, str):
                self.reject(record, ids)
            elif len(ids) == 0:
                self._empty += 1
            else:
                self._stream.write(ids.astype(self._dtype, copy=False).tobytes())
                self._stream.write(self._end.tobytes())
                self._lengths.append(len(ids) + len(self._end))
                self._largest = max(self._largest, int(ids.max()))
                self._text_bytes += len(text.encode("utf-8"))

    def _encode_one(self, text: str) -> np.ndarray | str:
        try:
            return self._job.tokenizer.tokenize(text)
        except (ValueError, TypeError) as error:
            return f"the tokenizer refuses it: {error}"

    def reject(self, record: Record, reason: str) -> None:
        """Note a document that was left out, and why."""
        self._rejected.append((record, reason))

    def commit(self, data: bytes) -> dict[str, Any]:
        """Give the part its names; ``.json`` comes last and makes it valid."""
        job, block = self._job, self._block
        self._rejected.sort(key=lambda pair: pair[0].offset)
        self._sync(self._stream)
        size = os.path.getsize(self._temporary)
        os.replace(self._temporary, part_path(job.parts, block.source, block.number, ".bin"))
        self._replace(".lengths", np.array(self._lengths, np.int32).tobytes())
        if self._rejected:
            lines = (_rejected_line(block, record, reason) for record, reason in self._rejected)
            self._replace(".rejected", "".join(lines).encode("utf-8"))
        facts = {
            "documents": len(self._lengths),
            "tokens": int(sum(self._lengths)),
            "text_bytes": self._text_bytes,
            "empty": self._empty,
            "rejected": len(self._rejected),
            "reasons": [f"{block.path}: {reason}" for _, reason in self._rejected[:_REASONS_KEPT]],
            "newlines": data.count(b"\n"),
            "max_token": max(self._largest, job.tokenizer.eod if job.append_eod and self._lengths else -1),
            "bin_bytes": size,
            "disk_bytes": block.disk_bytes,
            "last": block.last,
        }
        self._replace(".json", json.dumps(facts).encode("utf-8"))
        return facts

    def discard(self) -> None:
        """Remove what is unfinished."""
        self._stream.close()
        self._temporary.unlink(missing_ok=True)

    def _replace(self, suffix: str, content: bytes) -> None:
        with open(self._temporary, "wb") as stream:
            stream.write(content)
            self._sync(stream)
        os.replace(
            self._temporary, part_path(self._job.parts, self._block.source, self._block.number, suffix)
        )

    @staticmethod
    def _sync(stream: Any) -> None:
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()


def _rejected_line(block: Block, record: Record, reason: str) -> str:
    """Return one line of the list of bad documents; ``line`` still counts from the block's beginning."""
    entry = {
        "file": block.path,
        "line": record.line,
        "offset": record.offset,
        "reason": reason,
        "raw_base64": base64.b64encode(record.raw).decode("ascii"),
    }
    return json.dumps(entry) + "\n"
