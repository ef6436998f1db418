"""Compares what the ranks say: problems that break training, warnings, values that differ and whose."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from preflight.facts import Facts
from preflight.measure import Clock, Folder, Reduction

CLOCK_LIMIT = 1.0  # seconds
MUST_AGREE = ("torch", "CUDA of torch", "NCCL", "deepspeed", "megatron-core", "ds_efficient", "code")
_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "fuse", "9p")
_SHOWN_HOSTS = 20


@dataclass
class Verdict:
    """Lines for the user; training can start where there are no problems."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def ranges(numbers: Sequence[int]) -> str:
    """Return ``"0-3, 6"`` for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def distinct_hosts(facts: Sequence[Facts]) -> list[Facts]:
    """Give hosts of one name (containers, say) a number: each first local rank begins a host."""
    seen: Counter[str] = Counter()
    named = []
    for fact in facts:
        seen[fact.host] += fact.local_rank == 0
        number = seen[fact.host]
        named.append(replace(fact, host=f"{fact.host}#{number}") if number > 1 else fact)
    return named


def hosts_of(facts: Sequence[Facts]) -> dict[str, list[int]]:
    """Return the ranks of each host, in the order of their first rank."""
    hosts: dict[str, list[int]] = {}
    for fact in facts:
        hosts.setdefault(fact.host, []).append(fact.rank)
    return hosts


def differing(facts: Sequence[Facts], value: Callable[[Facts], str | None]) -> str | None:
    """Describe who has which value, or return None where all agree.

    The value of most ranks comes first: ``"2.13.0 on alpha; 2.12.0 on beta (rank 5)"``.
    """
    groups: dict[str | None, list[Facts]] = defaultdict(list)
    for fact in facts:
        groups[value(fact)].append(fact)
    if len(groups) == 1:
        return None
    everybody = hosts_of(facts)
    parts = []
    for shown, members in sorted(groups.items(), key=lambda group: -len(group[1])):
        hosts = hosts_of(members)
        names = [
            host if len(ranks) == len(everybody[host]) else f"{host} (rank {ranges(ranks)})"
            for host, ranks in hosts.items()
        ]
        more = f" and {len(names) - _SHOWN_HOSTS} more" if len(names) > _SHOWN_HOSTS else ""
        parts.append(f"{'unset' if shown is None else shown} on {', '.join(names[:_SHOWN_HOSTS])}{more}")
    return "; ".join(parts)


def _entry(group: str, name: str) -> Callable[[Facts], str | None]:
    return lambda fact: getattr(fact, group).get(name)


def _op_state(name: str) -> Callable[[Facts], str | None]:
    return lambda fact: fact.ops.get(name, "unknown").partition(":")[0]


def compare_facts(facts: Sequence[Facts], expected_world: int | None) -> Verdict:
    """Compare versions, devices, environment and ops of all ranks."""
    verdict = Verdict()
    if expected_world is not None and len(facts) != expected_world:
        verdict.problems.append(
            f"world size: {len(facts)} ranks, --expect-world {expected_world}; hosts: "
            + ", ".join(f"{host} {len(ranks)}" for host, ranks in hosts_of(facts).items())
        )
    _compare_versions(facts, verdict)
    _compare_devices(facts, verdict)
    for name in sorted({name for fact in facts for name in fact.environment}):
        difference = differing(facts, _entry("environment", name))
        if difference:
            verdict.warnings.append(f"{name}: {difference}")
    leaders = [fact for fact in facts if fact.local_rank == 0]
    for name in sorted({name for fact in leaders for name in fact.ops}):
        difference = differing(leaders, _op_state(name))
        if difference:
            verdict.warnings.append(f"op {name}: {difference}; run `ds_efficient prebuild` on each host")
    return verdict


def _compare_versions(facts: Sequence[Facts], verdict: Verdict) -> None:
    for name in sorted({name for fact in facts for name in fact.versions}):
        difference = differing(facts, _entry("versions", name))
        if difference is None:
            continue
        minor = {fact.versions["python"].rpartition(".")[0] for fact in facts}
        if name in MUST_AGREE or (name == "python" and len(minor) > 1):
            remedy = "install the same" if name != "code" else "bring the clones to the same state"
            verdict.problems.append(f"{name}: {difference}; {remedy} everywhere")
        else:
            verdict.warnings.append(f"{name}: {difference}")


def _compare_devices(facts: Sequence[Facts], verdict: Verdict) -> None:
    difference = differing(facts, lambda fact: fact.device["kind"])
    if difference:
        verdict.problems.append(f"device: {difference}; torch sees no GPU on some ranks")
    for name in ("name", "memory_gib", "driver"):
        difference = differing(facts, _entry("device", name))
        if difference and not any("GPUs visible" in fact.device.get("name", "") for fact in facts):
            verdict.warnings.append(f"GPU {name}: {difference}")
    owners: dict[tuple[str, str], list[int]] = defaultdict(list)
    for fact in facts:
        if "GPUs visible" in fact.device.get("name", ""):
            verdict.problems.append(f"rank {fact.rank} on {fact.host}: no GPU ({fact.device['name']})")
        elif fact.device.get("uuid", "unknown") != "unknown":
            owners[fact.host, fact.device["uuid"]].append(fact.rank)
    for (host, uuid), ranks in owners.items():
        if len(ranks) > 1:
            verdict.problems.append(f"ranks {ranges(ranks)} on {host}: share one GPU ({uuid})")


def judge_clocks(clocks: Mapping[str, Clock]) -> Verdict:
    """Warn about clocks more than a second from rank 0's."""
    verdict = Verdict()
    for host, clock in clocks.items():
        if abs(clock.offset) > CLOCK_LIMIT + clock.error:
            verdict.warnings.append(
                f"clock of {host}: {clock.offset:+.3f} s from rank 0's (+-{clock.error:.3f} s); "
                "build locks and logs of several hosts mislead; start NTP (chrony)"
            )
    return verdict


def judge_folder(what: str, folders: Mapping[str, Folder], *, required: bool) -> Verdict:
    """Judge a folder from what each host's first rank saw.

    Args:
        what: name for messages.
        folders: by host, rank 0's first.
        required: whether every host must see the same folder.
    """
    verdict = Verdict()
    target = verdict.problems if required else verdict.warnings
    for host, folder in folders.items():
        if folder.problem:
            target.append(f"{what} {folder.path} on {host}: {folder.problem}")
    apart = [host for host, folder in folders.items() if not folder.shared]
    if apart and required:
        first = next(iter(folders))
        verdict.problems.append(
            f"{what}: not the same folder as on {first}: {', '.join(apart)}; use shared storage"
        )
    elif not required and len(folders) > 1:
        network = {f.filesystem for f in folders.values() if f.filesystem.startswith(_NETWORK_FILESYSTEMS)}
        if network and not apart:
            verdict.warnings.append(
                f"{what}: shared by all hosts over {', '.join(sorted(network))}, where locks of torch's "
                "own JIT builds may outlive their process; build before the run (`ds_efficient prebuild`), "
                "or set TORCH_EXTENSIONS_DIR to a local folder"
            )
    return verdict


def judge_reductions(reductions: Sequence[Reduction]) -> Verdict:
    """A wrong sum is a problem."""
    wrong = [f"{reduction.nbytes} bytes" for reduction in reductions if not reduction.correct]
    problems = (
        [f"all-reduce: wrong sum at {', '.join(wrong)}; the network or its library is broken"]
        if wrong
        else []
    )
    return Verdict(problems)
