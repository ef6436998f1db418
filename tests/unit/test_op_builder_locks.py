"""Build locks: one builder at a time, stale locks are recognised, nothing waits for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import locks
from ds_efficient.op_builder.locks import LockTimes, build_lock, read_lock, remove_stale

QUICK = LockTimes(heartbeat=0.05, stale_after=0.4, report_every=0.1, poll=0.01)


def never() -> bool:
    return False


def write_lock(path: Path, *, pid: int, age: float = 0.0, **changes: object) -> None:
    owner = {
        "pid": pid,
        "host": socket.gethostname(),
        "place": locks._place(),
        "process_start": locks._process_start(pid),
    }
    path.write_text(json.dumps({**owner, **changes}))
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_lock_names_its_owner_and_is_gone_afterwards(tmp_path):
    path = tmp_path / "lock"
    with build_lock(path, done=never, times=QUICK) as mine:
        info = read_lock(path, QUICK)
        assert mine and info.pid == os.getpid() and info.host == socket.gethostname() and info.state == "held"
    assert read_lock(path) is None


def test_lock_is_released_when_the_build_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), build_lock(tmp_path / "lock", done=never, times=QUICK):
        raise ZeroDivisionError
    assert not (tmp_path / "lock").exists()


def test_heartbeat_keeps_a_long_build_alive(tmp_path):
    path = tmp_path / "lock"
    with build_lock(path, done=never, times=QUICK):
        time.sleep(3 * QUICK.stale_after)
        assert read_lock(path, QUICK).state == "held"


def test_only_one_of_many_threads_holds_the_lock_at_a_time(tmp_path):
    inside, most, turns = [], [], []

    def work() -> None:
        with build_lock(tmp_path / "lock", done=never, times=QUICK) as mine:
            assert mine
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()
            turns.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(turns) == 8 and max(most) == 1


def test_waiter_goes_on_when_the_other_process_has_built(tmp_path, caplog):
    path = tmp_path / "lock"
    write_lock(path, pid=os.getppid(), place="elsewhere", host="node7")
    started = time.monotonic()

    def done() -> bool:
        os.utime(path)
        return time.monotonic() - started > 3 * QUICK.stale_after

    with caplog.at_level("WARNING"), build_lock(path, done=done, times=QUICK) as mine:
        assert not mine
    reports = [record.getMessage() for record in caplog.records]
    assert len(reports) >= 3 and all(
        "waiting" in text and str(path) in text and "node7" in text for text in reports
    )
    assert path.exists()


def test_lock_of_a_dead_process_is_taken_over_at_once_with_a_warning(tmp_path, dead_pid, caplog):
    path = tmp_path / "lock"
    write_lock(path, pid=dead_pid, process_start="1")
    started = time.monotonic()
    with caplog.at_level("WARNING"), build_lock(path, done=never) as mine:
        assert mine and read_lock(path).pid == os.getpid()
    assert time.monotonic() - started < 2
    assert str(dead_pid) in caplog.text and "has ended" in caplog.text


def test_process_id_used_again_counts_as_dead(tmp_path):
    path = tmp_path / "lock"
    write_lock(path, pid=os.getpid(), process_start="12345")
    assert read_lock(path).state == "owner dead"


@pytest.mark.parametrize(
    "changes",
    [{"place": "elsewhere", "host": "node7"}, {}],
    ids=["owner on another host", "owner alive but frozen"],
)
def test_lock_without_heartbeat_stops_with_path_age_owner_and_remedy(tmp_path, changes):
    path = tmp_path / "lock"
    write_lock(path, pid=os.getppid(), age=300, **changes)
    started = time.monotonic()
    with pytest.raises(OpBuildError) as caught, build_lock(path, done=never, times=QUICK):
        pass
    assert time.monotonic() - started < 2
    text = str(caught.value)
    assert str(path) in text and "30" in text and f"process {os.getppid()} on " in text
    assert f"rm {path}" in text and "prebuild --clean-stale-locks" in text
    assert path.exists(), "a lock whose owner may live is never removed unasked"


def test_lock_from_a_clock_that_is_ahead_is_recognised_by_standing_still(tmp_path):
    path = tmp_path / "lock"
    write_lock(path, pid=1, age=-3600, place="elsewhere")
    with pytest.raises(OpBuildError, match="stale build lock"), build_lock(path, done=never, times=QUICK):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_unreadable_lock_is_judged_by_its_heartbeat(tmp_path, text):
    path = tmp_path / "lock"
    path.write_text(text)
    assert read_lock(path).state == "held"
    os.utime(path, (time.time() - 120,) * 2)
    info = read_lock(path)
    assert info.state == "no heartbeat" and info.pid is None and 119 < info.age < 130


def test_default_times_recognise_a_stale_lock_within_a_minute():
    times = LockTimes()
    assert times.stale_after <= 60 and 3 * times.heartbeat < times.stale_after and times.report_every <= 10


def test_removal_spares_a_lock_that_is_held_and_one_that_is_new(tmp_path, dead_pid):
    path = tmp_path / "lock"
    write_lock(path, pid=dead_pid, process_start="1")
    stale = read_lock(path)
    write_lock(path, pid=os.getpid())
    assert not remove_stale(stale) and path.exists()
    write_lock(path, pid=dead_pid, process_start="1")
    assert remove_stale(stale) and not path.exists()
    assert not remove_stale(stale)
