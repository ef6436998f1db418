"""Build locks that cannot hang: each names its owner, shows a heartbeat, and is recognised when it is stale.

A lock is a small JSON file made with O_EXCL, which works on local and network file systems. While the owner
builds, a thread of it touches the file every few seconds. A process that waits

- goes on as soon as the lock is gone,
- takes the lock over, with a warning, when the owner was a process of this host and is dead,
- stops with `OpBuildError` (path, age, owner, remedy) when the heartbeat stopped and the owner cannot be
  examined from here (another host, another container) or is alive but frozen.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_efficient.errors import OpBuildError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LockTimes:
    """Times in seconds.

    Attributes:
        heartbeat: the owner touches the lock this often.
        stale_after: a lock not touched for this long is stale.
        report_every: a waiting process says so this often.
        poll: a waiting process looks this often.
    """

    heartbeat: float = 5.0
    stale_after: float = 60.0
    report_every: float = 5.0
    poll: float = 0.1


@dataclass(frozen=True)
class LockInfo:
    """What a lock file says.

    Attributes:
        path: the file.
        pid: process id of the owner, or None where the file does not say.
        host: name of the owner's host, or ``"unknown"``.
        age: seconds since the last heartbeat.
        stamp: its time stamp in nanoseconds.
        state: ``"held"``, ``"owner dead"`` (a process of this host that has ended), or ``"no heartbeat"``.
    """

    path: Path
    pid: int | None
    host: str
    age: float
    stamp: int
    state: str

    @property
    def stale(self) -> bool:
        """Whether nobody builds under this lock any more."""
        return self.state != "held"

    def describe(self) -> str:
        """One line: path, owner, age, state."""
        owner = f"process {self.pid} on {self.host}" if self.pid else "an unknown process"
        return f"{self.path}: {owner}, last sign of life {self.age:.0f} s ago, {self.state}"


def read_lock(path: Path, times: LockTimes | None = None) -> LockInfo | None:
    """Read a lock file; None when there is none."""
    times = times or LockTimes()
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # opening makes NFS ask the server
            text = file.read()
            stamp = os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    age = max(0.0, time.time() - stamp / 1e9)
    try:
        owner = json.loads(text)
        pid, host = int(owner["pid"]), str(owner["host"])
        same_place = owner["place"] == _place()
        alive = _process_start(pid) == owner["process_start"] if same_place else None
    except (ValueError, KeyError, TypeError):  # the owner died while it wrote, or this is not our file
        pid, host, alive = None, "unknown", None
    if alive is False:
        state = "owner dead"
    else:
        state = "no heartbeat" if age > times.stale_after else "held"
    return LockInfo(path, pid, host, age, stamp, state)


@contextlib.contextmanager
def build_lock(path: Path, *, done: Callable[[], bool], times: LockTimes | None = None) -> Iterator[bool]:
    """Hold the lock at ``path``.

    Args:
        path: lock file; its folder exists.
        done: asked while waiting; True when the thing to be built is there.
        times: waiting and heartbeat times.

    Yields:
        True when the lock is held and the build is up to the caller, False when another process did it.

    Raises:
        OpBuildError: the lock is stale and its owner cannot be shown to be dead.
    """
    times = times or LockTimes()
    owner = _owner()
    if not _acquire(path, owner, done, times):
        yield False
        return
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, times.heartbeat, stop), daemon=True)
    thread.start()
    try:
        yield True
    finally:
        stop.set()
        thread.join()
        _release(path, owner)


def remove_stale(info: LockInfo) -> bool:
    """Remove a stale lock if it is still the same and still stale; return whether it was removed."""
    with _guard(info.path):
        now = read_lock(info.path)
        if now is None or not now.stale:
            return False
        info.path.unlink(missing_ok=True)
        return True


def _acquire(path: Path, owner: str, done: Callable[[], bool], times: LockTimes) -> bool:
    waiting_since = last_report = stands_since = time.monotonic()
    stamp: int | None = None
    while True:
        if done():
            return False
        if _create(path, owner):
            return True
        info = read_lock(path, times)
        if info is None:
            continue
        now = time.monotonic()
        if info.stamp != stamp:
            stamp, stands_since = info.stamp, now
        if info.state == "owner dead":
            _take_over(path, times)
            continue
        # Clocks of two hosts may differ: an old time stamp alone is not enough, it must also stand still for
        # three beats.
        still = now - stands_since
        if still > times.stale_after or (info.stale and still > min(times.stale_after, 3 * times.heartbeat)):
            raise OpBuildError(
                f"stale build lock {info.describe()}. If no build runs there any more, remove it with "
                f"`rm {path}` or `ds_efficient prebuild --clean-stale-locks`, then run again"
            )
        if now - last_report >= times.report_every:
            last_report = now
            logger.warning("waiting %.0f s for a kernel build: %s", now - waiting_since, info.describe())
        time.sleep(times.poll)


def _owner() -> str:
    return json.dumps(
        {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "place": _place(),
            "process_start": _process_start(os.getpid()),
            "started": time.time(),
            "token": uuid.uuid4().hex,
        }
    )


def _create(path: Path, owner: str) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(owner)
    return True


def _release(path: Path, owner: str) -> None:
    """Remove our own lock, and never one that somebody made after ours was removed by hand."""
    with _guard(path), contextlib.suppress(FileNotFoundError):
        if path.read_text(encoding="utf-8") == owner:
            path.unlink()


def _take_over(path: Path, times: LockTimes) -> None:
    with _guard(path):
        info = read_lock(path, times)
        if info is not None and info.state == "owner dead":
            logger.warning("removing the build lock of a process that has ended: %s", info.describe())
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Serialise the removal of locks, so that nobody removes one that was made a moment ago."""
    with open(path.with_name(path.name + ".guard"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a network file system without flock: removal is then only as safe as its re-check
            logger.debug("no flock on %s", path.parent)
        yield


def _beat(path: Path, interval: float, stop: threading.Event) -> None:
    while not stop.wait(interval):
        with contextlib.suppress(OSError):
            os.utime(path)


def _place() -> str:
    """Identifies the host, its boot and its process-id space: process ids mean something only within one."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _process_start(pid: int) -> str:
    """Start time of a process, ``""`` when there is none; differs for a later one with its id."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "" if Path("/proc/self/stat").exists() else "alive"
