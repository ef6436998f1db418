"""Hosts of a cluster on one machine: network namespaces joined by veth pairs, with no way to the outside.

Each namespace has loopback and one interface, whose other end is in the other namespace, so what runs
inside can reach nothing but its partner. Names carry the process that made them; what a killed process left
behind is removed by the next one. Needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN) and iproute2.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "veth0"
_PREFIX = "dse"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-(\d+)-\d+")
_numbers = itertools.count()


class HostError(AssertionError):
    """A command on a host failed or took too long; the message names the host and ends with its log."""


@dataclass(frozen=True)
class Host:
    """One namespace.

    Attributes:
        name: host name that processes inside see, and the hostfile's name.
        namespace: name for ``ip netns``.
        address: IPv4 address of `INTERFACE` inside.
    """

    name: str
    namespace: str
    address: str


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


def _start_time(pid: int) -> int | None:
    """Return when a process started (clock ticks since boot), None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def namespaces() -> list[str]:
    """Return the names of all namespaces this module made, of every process."""
    words = (line.split() for line in _ip("netns", "list").splitlines())
    return [line[0] for line in words if line and _NAME.fullmatch(line[0])]


def remove(namespace: str) -> None:
    """Kill what runs in a namespace of ours and delete it, with its interface."""
    assert _NAME.fullmatch(namespace), namespace
    with contextlib.suppress(subprocess.CalledProcessError):
        for pid in _ip("netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    with contextlib.suppress(subprocess.CalledProcessError):
        _ip("netns", "delete", namespace)


def remove_stale() -> list[str]:
    """Remove the namespaces of processes that have ended; return their names."""
    stale = []
    for name in namespaces():
        match = _NAME.fullmatch(name)
        assert match is not None
        if _start_time(int(match[1])) != int(match[2]):
            stale.append(name)
            remove(name)
    return stale


@functools.cache
def why_not() -> str | None:
    """Return why hosts cannot be made here, None if they can."""
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if os.geteuid() != 0:
        return "not root: network namespaces need CAP_NET_ADMIN"
    probe = _new_name(9)
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", INTERFACE, "type", "veth", "peer", "name", "veth1")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        detail = str(getattr(error, "stderr", "") or error).strip()
        return f"network namespaces or veth pairs cannot be made here: {detail}"
    finally:
        remove(probe)
    return None


def _new_name(index: int) -> str:
    pid = os.getpid()
    return f"{_PREFIX}-{pid}-{_start_time(pid)}-{next(_numbers)}-{index}"


class TwoHosts:
    """Two hosts joined by one cable; a context manager.

    Args:
        logs: folder for one log a host.
        names: host names.
    """

    def __init__(self, logs: Path, names: tuple[str, str] = ("alpha", "beta")) -> None:
        self._logs = logs
        number = next(_numbers)
        pid = os.getpid()
        self.hosts = tuple(
            Host(name, f"{_PREFIX}-{pid}-{_start_time(pid)}-{number}-{index}", f"10.77.0.{index + 1}")
            for index, name in enumerate(names)
        )

    def __enter__(self) -> TwoHosts:
        remove_stale()
        self._logs.mkdir(parents=True, exist_ok=True)
        first, second = (host.namespace for host in self.hosts)
        try:
            for host in self.hosts:
                _ip("netns", "add", host.namespace)
            # Both ends are born inside: nothing ever shows in the machine's own namespace.
            ends = ("type", "veth", "peer", "name", INTERFACE, "netns", second)
            _ip("-n", first, "link", "add", INTERFACE, *ends)
            for host in self.hosts:
                _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
                _ip("-n", host.namespace, "link", "set", "lo", "up")
                _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill everything inside and remove both hosts."""
        for host in self.hosts:
            remove(host.namespace)

    def shape(self, rate: str) -> None:
        """Limit what each host sends, for example to ``"100mbit"`` (tc-tbf(8)); replaces an earlier limit.

        Raises:
            subprocess.CalledProcessError: the kernel has no token bucket filter, or the rate is malformed.
        """
        limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        for host in self.hosts:
            command = ["tc", "-n", host.namespace, "qdisc", "replace", "dev", INTERFACE, "root", *limit]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)

    def command(self, index: int, arguments: Sequence[str]) -> list[str]:
        """Return `arguments` as a command that runs on host `index`, under that host's name."""
        host = self.hosts[index]
        rename = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host.name]
        return ["ip", "netns", "exec", host.namespace, *rename, *arguments]

    def log(self, index: int) -> Path:
        """Return the log of host `index`."""
        return self._logs / f"{self.hosts[index].name}.log"

    def run(
        self,
        commands: Sequence[Sequence[str]],
        *,
        timeout: float,
        env: Sequence[Mapping[str, str]] = ({}, {}),
        cwd: Path | None = None,
        expect: int = 0,
    ) -> list[str]:
        """Run one command on each host at the same time; return what each wrote.

        Args:
            commands: of host 0 and host 1.
            timeout: seconds for both.
            env: additions to the environment, for each host.
            cwd: working folder.
            expect: exit status that both must have.

        Raises:
            HostError: another exit status, or the time is over; everything is dead by then.
        """
        network = {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
        processes = []
        try:
            for index, command in enumerate(commands):
                with self.log(index).open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            self.command(index, command),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            cwd=cwd,
                            env={**os.environ, **network, **env[index]},
                            start_new_session=True,
                        )
                    )
            self._wait(processes, time.monotonic() + timeout, timeout, expect)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [self.log(index).read_text(errors="replace") for index in range(len(commands))]

    def _wait(
        self, processes: Sequence[subprocess.Popen[bytes]], end: float, timeout: float, expect: int
    ) -> None:
        running = dict(enumerate(processes))
        while running:
            for index, process in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                if status != expect:
                    raise HostError(self._story(index, f"exit status {status}, expected {expect}"))
                del running[index]
            if running and time.monotonic() > end:
                names = ", ".join(self.hosts[index].name for index in running)
                stories = [self._story(index, f"still running after {timeout:.0f} s") for index in running]
                raise HostError(f"time is over on {names}\n" + "\n".join(stories))
            time.sleep(0.1)

    def _story(self, index: int, what: str) -> str:
        lines = self.log(index).read_text(errors="replace").splitlines()
        host = self.hosts[index]
        return f"host {host.name} ({host.address}): {what}; its log ends with\n  " + "\n  ".join(lines[-25:])


def deepspeed_commands(
    hosts: TwoHosts, folder: Path, script: Sequence[str], slots: int = 1
) -> list[list[str]]:
    """Return the commands that start `script` with DeepSpeed's launcher on each host, without ssh.

    Args:
        hosts: where.
        folder: gets the hostfile.
        script: path and arguments.
        slots: processes a host.
    """
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts.hosts))
    launch = f"--hostfile {hostfile} --no_ssh --master_addr {hosts.hosts[0].address} --master_port 29500"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *launch.split()]
    return [[*launcher, "--node_rank", str(rank), *script] for rank in range(len(hosts.hosts))]
