"""The log of a run: ``run.jsonl``, one strict JSON object a line, appended and flushed as the run goes.

Kinds of lines: ``run`` (first: configuration, versions, device), ``train``, ``eval``, ``resume`` (step),
``evidence``, ``end``. Readers ignore kinds they do not know.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_efficient.errors import UserError

RUN_LOG = "run.jsonl"
NONFINITE = "nonfinite"


def plain(value: Any, name: str = "", nonfinite: list[str] | None = None) -> Any:
    """Return `value` as JSON has it: numpy and torch scalars as numbers, NaN and infinities as None.

    Args:
        value: numbers, strings, paths, None, and containers, arrays and tensors of them.
        name: dotted name of the value.
        nonfinite: collects the names of values that were not finite.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        if nonfinite is not None:
            nonfinite.append(name)
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item, _join(name, key), nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(item, _join(name, index), nonfinite) for index, item in enumerate(items)]
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and scalars, without importing either
        return plain(value.tolist(), name, nonfinite)
    return str(value)


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


class RunLog:
    """Writer of a run's log; one process of the run has it.

    Args:
        path: the file; it and its folder are made when missing, and lines are added when it exists.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise UserError(
                f"run log {self.path}: cannot be written ({error.strerror}); choose another folder"
            ) from (error)
        self._end_broken_line()

    def _end_broken_line(self) -> None:
        """Begin on a line of its own after a run that was killed while it wrote."""
        if self._file.tell() > 0:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def write(self, kind: str, **fields: Any) -> None:
        """Add one line and flush it.

        Args:
            kind: see the module.
            fields: plain values, numpy or torch scalars; what is not finite becomes null and is named in
                ``"nonfinite"``.
        """
        names: list[str] = []
        record = {"kind": kind, **plain(fields, "", names)}
        if names:
            record[NONFINITE] = names
        line = json.dumps(record, allow_nan=False, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing can be written afterwards."""
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass
class Run:
    """What a run log says, after resumes are sorted out.

    Attributes:
        path: the file.
        name: name of the run's folder.
        start: the ``run`` line; empty when it is missing.
        train: ``train`` lines by rising step.
        evals: ``eval`` lines by split, by rising step.
        resumes: steps from which the run was resumed.
        evidence: what each technique proved, by its name.
        end: the ``end`` line, or None when the run did not end by itself (or still goes on).
        notes: what is odd about the file.
    """

    path: Path
    name: str
    start: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    resumes: list[int] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


class _Reader:
    def __init__(self, path: Path) -> None:
        name = path.resolve().parent.name if path.name == RUN_LOG else path.stem
        self.run = Run(path, name)
        self.train: dict[int, dict[str, Any]] = {}
        self.evals: dict[tuple[str, int], dict[str, Any]] = {}
        self.known = 0

    def take(self, record: dict[str, Any]) -> None:
        """Take one line's object."""
        handler = getattr(self, f"_take_{record.get('kind')}", None)
        if handler is not None:
            self.known += 1
            handler(record)

    def _take_run(self, record: dict[str, Any]) -> None:
        if self.run.start or self.train:
            self.run.notes.append("the file holds several runs; the last one is reported")
            self.train.clear()
            self.evals.clear()
            self.run.resumes, self.run.evidence, self.run.end = [], {}, None
        self.run.start = record

    def _take_train(self, record: dict[str, Any]) -> None:
        self.train[int(record["step"])] = record
        self.run.end = None

    def _take_eval(self, record: dict[str, Any]) -> None:
        self.evals[str(record.get("split", "valid")), int(record["step"])] = record

    def _take_resume(self, record: dict[str, Any]) -> None:
        """Forget what was done after the checkpoint: the resumed run does it again."""
        step = int(record["step"])
        self.run.resumes.append(step)
        self.run.end = None
        self.train = {at: line for at, line in self.train.items() if at <= step}
        self.evals = {key: line for key, line in self.evals.items() if key[1] <= step}

    def _take_evidence(self, record: dict[str, Any]) -> None:
        self.run.evidence |= {
            name: value for name, value in record.items() if name not in ("kind", NONFINITE)
        }

    def _take_end(self, record: dict[str, Any]) -> None:
        self.run.end = record

    def finish(self) -> Run:
        """Return the run."""
        self.run.train = [self.train[step] for step in sorted(self.train)]
        for split, step in sorted(self.evals):
            self.run.evals.setdefault(split, []).append(self.evals[split, step])
        return self.run


def find_log(run: str | os.PathLike[str]) -> Path:
    """Return the log of a run's folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(run)
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run's folder or its {RUN_LOG}")
    log = path / RUN_LOG
    if not log.is_file():
        raise UserError(f"{path}: holds no {RUN_LOG}; give the folder that --run-dir or --save named")
    return log


def read_run(run: str | os.PathLike[str]) -> Run:
    """Read a run's log.

    Lines of before a resume that lie after its checkpoint are left out: the later ones count. Lines that are
    cut off or no JSON are skipped and named in `Run.notes`.

    Args:
        run: the run's folder or the file.

    Raises:
        UserError: no file, an empty file, an unreadable one, or not the log of a run.
    """
    path = find_log(run)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: is empty; the run wrote nothing yet")
    reader = _Reader(path)
    broken: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
            reader.take(record)
        except (ValueError, KeyError, TypeError):
            broken.append(number)
    if reader.known == 0:
        raise UserError(f"{path}: is not the log of a run: no line of it has a known kind")
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        last = max(number for number, line in enumerate(lines, 1) if line.strip())
        why = " (the last line is cut off)" if broken == [last] else ""
        reader.run.notes.append(f"skipped {len(broken)} unreadable line(s): {shown}{why}")
    return reader.finish()
