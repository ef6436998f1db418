"""What the kernel cache holds: each op's state, our build locks, those of torch's JIT builds."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import compile as compiler
from ds_efficient.op_builder import toolchain
from ds_efficient.op_builder.all_ops import ALL_OPS, OpSpec
from ds_efficient.op_builder.locks import LockInfo, read_lock, remove_stale

TORCH_LOCK_QUIET = 900.0  # seconds without any change in the folder after which torch's lock counts as stale


@dataclass(frozen=True)
class OpState:
    """State of one native op here.

    Attributes:
        name: full name, for example ``"ds_efficient_keyed_random_cpu"``.
        title: one line.
        state: ``"built"``, ``"buildable"`` or ``"unavailable"``.
        detail: path of the library, or why the op cannot be built.
    """

    name: str
    title: str
    state: str
    detail: str


def op_state(spec: OpSpec) -> OpState:
    """State of one op; compiles nothing."""
    try:
        path = compiler.find_built(spec)
    except OpBuildError as error:
        return OpState(spec.full_name, spec.title, "unavailable", str(error))
    if path is not None:
        return OpState(spec.full_name, spec.title, "built", str(path))
    reason = compiler.why_not(spec)
    if reason is None:
        return OpState(
            spec.full_name, spec.title, "buildable", "at first use, or now with `ds_efficient prebuild`"
        )
    if spec.device == "cpu":
        reason += "; until then the plain torch code runs on the CPU (the same results)"
    return OpState(spec.full_name, spec.title, "unavailable", reason)


def op_states() -> list[OpState]:
    """State of every op."""
    return [op_state(spec) for spec in ALL_OPS.values()]


def own_locks() -> list[LockInfo]:
    """Locks of our builds, of every Python and torch version in the cache."""
    paths = sorted((toolchain.extensions_root() / "ds_efficient").glob("*/*/lock"))
    return [info for info in map(read_lock, paths) if info is not None]


def torch_locks() -> list[LockInfo]:
    """Lock files of torch's JIT builds, with which a killed build makes every later one wait for ever.

    They name no owner. One counts as held while a process of this host works in its folder or something
    there changed in the last 15 minutes.
    """
    root = toolchain.extensions_root()
    found = []
    for path in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        if path.relative_to(root).parts[0] == "ds_efficient":
            continue
        try:
            age = max(0.0, time.time() - path.stat().st_mtime)
            changed = max(entry.stat().st_mtime for entry in path.parent.iterdir())
        except OSError:
            continue
        quiet = time.time() - changed > TORCH_LOCK_QUIET
        state = "no heartbeat" if quiet and not _works_in(path.parent) else "held"
        found.append(LockInfo(path, None, "unknown", age, path.stat().st_mtime_ns, state))
    return found


def clean_stale_locks() -> list[str]:
    """Remove the stale locks, ours and torch's, and return what was removed (one line each).

    Raises:
        OpBuildError: a lock cannot be removed.
    """
    removed = []
    for own, locks in ((True, own_locks()), (False, torch_locks())):
        for info in locks:
            try:
                if not info.stale or (own and not remove_stale(info)):
                    continue
                if not own:
                    info.path.unlink(missing_ok=True)
            except OSError as error:
                raise OpBuildError(
                    f"cannot remove the stale lock {info.path}: {error.strerror or error}"
                ) from error
            removed.append(info.describe())
    for leftover in (toolchain.extensions_root() / "ds_efficient").glob("*/*/work-*"):
        if not (leftover.parent / "lock").exists():  # objects of a build that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    return removed


def _works_in(folder: Path) -> bool:
    target = str(folder.resolve())
    for process in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(process) == target:
                return True
        except OSError:
            continue
    return False
