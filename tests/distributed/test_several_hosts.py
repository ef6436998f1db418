"""Training over two hosts: two network namespaces, one launcher in each, no ssh."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import two_hosts
from rank_pool import RankPool
from tiny_runs import MODEL, Outcome, deepspeed_json, read_records, train
from two_hosts import HostError, TwoHosts, deepspeed_commands

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 4

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(two_hosts.why_not() is not None, reason=str(two_hosts.why_not())),
]


@pytest.mark.slow
def test_two_hosts_train_like_one_host_with_two_ranks(
    ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    config = deepspeed_json(zero_optimization={"stage": 1})
    one = train(ranks, 2, tmp_path / "one", config=config, steps=STEPS)
    sizes = f"--train-iters {STEPS} --global-batch-size 8 --micro-batch-size 2".split()
    output = (
        f"--deepspeed_config {tmp_path}/one/ds.json --run-dir {tmp_path}/two --log-interval 1 --eval-iters 0"
    )
    script = [str(REPOSITORY / "launch/pretrain_gpt.py"), *MODEL, *sizes, *output.split()]
    with TwoHosts(tmp_path / "logs") as hosts:
        logs = hosts.run(deepspeed_commands(hosts, tmp_path, script), timeout=240, cwd=tmp_path)
    two = Outcome([0, 0], read_records(tmp_path / "two"))
    assert len(one.losses) == STEPS
    assert two.losses == one.losses and two.norms == one.norms  # a sum of two numbers has one order only
    assert two.losses[-1] < two.losses[0]
    assert f"step {STEPS}/{STEPS}" in logs[0]
    assert f"step {STEPS}/{STEPS}" not in logs[1]  # only rank 0 logs


def test_hosts_see_each_other_and_nothing_else(tmp_path: Path) -> None:
    with TwoHosts(tmp_path) as hosts:
        show = ["sh", "-c", "hostname; ip -o link; ip route"]
        for host, text in zip(hosts.hosts, hosts.run([show, show], timeout=30), strict=True):
            lines = text.splitlines()
            assert lines[0] == host.name
            interfaces = {line.split(":")[1].strip().partition("@")[0] for line in lines if ": " in line}
            assert {name for name in interfaces if "lo" == name or "veth" in name} == {"lo", "veth0"}
            routes = [line for line in lines if "dev" in line.split() and ":" not in line]
            assert len(routes) == 1 and routes[0].startswith("10.77.0.0/24 ")
        assert sorted(host.namespace for host in hosts.hosts) == sorted(
            set(two_hosts.namespaces()) & {host.namespace for host in hosts.hosts}
        )
    assert not set(two_hosts.namespaces()) & {host.namespace for host in hosts.hosts}


def test_failing_host_is_named_with_its_log_and_the_other_one_stopped(tmp_path: Path) -> None:
    with TwoHosts(tmp_path) as hosts:
        bad = ["sh", "-c", "echo no such dataset; exit 3"]
        begin = time.monotonic()
        with pytest.raises(HostError, match=r"host beta .*exit status 3(.|\n)*no such dataset"):
            hosts.run([["sleep", "60"], bad], timeout=50)
        with pytest.raises(HostError, match=r"time is over on alpha\n(.|\n)*still here"):
            hosts.run([["sh", "-c", "echo still here; sleep 60"], ["true"]], timeout=1)
        assert time.monotonic() - begin < 30
        for host in hosts.hosts:
            assert two_hosts._ip("netns", "pids", host.namespace).split() == []


def test_namespaces_of_a_killed_process_are_removed_by_the_next_one(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from two_hosts import TwoHosts\n"
        "hosts = TwoHosts(Path(sys.argv[1])).__enter__(); print(*(host.namespace for host in hosts.hosts))\n"
        "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    left = killed.stdout.split()
    assert len(left) == 2 and set(left) <= set(two_hosts.namespaces())
    with TwoHosts(tmp_path) as hosts:
        assert not set(left) & set(two_hosts.namespaces())
        assert {host.namespace for host in hosts.hosts} <= set(two_hosts.namespaces())


_SEND = """
import socket, sys, time
server, address, size = sys.argv[1] == "server", sys.argv[2], int(sys.argv[3])
if server:
    with socket.create_server((address, 5000)) as listener:
        connection, _ = listener.accept()
        begin, received = time.perf_counter(), 0
        while received < size:
            received += len(connection.recv(1 << 16))
        print(8 * received / (time.perf_counter() - begin))
        connection.sendall(b"x")
else:
    for _ in range(100):
        try:
            connection = socket.create_connection((address, 5000)); break
        except OSError:
            time.sleep(0.1)
    connection.sendall(bytes(size)); connection.recv(1)
"""


def bits_per_second(hosts: TwoHosts, size: int) -> float:
    program = [sys.executable, "-c", _SEND]
    address = hosts.hosts[0].address
    sides = [[*program, side, address, str(size)] for side in ("server", "client")]
    return float(hosts.run(sides, timeout=60)[0])


def test_shape_limits_the_bandwidth(tmp_path: Path) -> None:
    with TwoHosts(tmp_path) as hosts:
        free = bits_per_second(hosts, 8_000_000)
        try:
            hosts.shape("40mbit")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"tc cannot shape here: {getattr(error, 'stderr', error)}")
        shaped = bits_per_second(hosts, 4_000_000)
    # 256 kB pass at once; of 4 MB that is 7 %.
    assert 20e6 < shaped < 46e6
    assert free > 5 * shaped
