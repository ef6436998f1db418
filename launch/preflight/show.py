"""The report of ``check_cluster.py`` as tables and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preflight.facts import Facts
from preflight.measure import Clock, Folder, Reduction
from preflight.verdict import Verdict, differing, hosts_of, ranges


@dataclass(frozen=True)
class Report:
    """Everything that was found out.

    Attributes:
        facts: of every rank, in rank order.
        backend: of the all-reduce.
        clocks: by host, against rank 0's.
        folders: what it is for, then by host.
        reductions: by size; empty with one rank.
        verdict: problems and warnings.
    """

    facts: Sequence[Facts]
    backend: str
    clocks: Mapping[str, Clock]
    folders: Mapping[str, Mapping[str, Folder]]
    reductions: Sequence[Reduction]
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "ok": not self.verdict.problems,
            "problems": self.verdict.problems,
            "warnings": self.verdict.warnings,
            "world_size": len(self.facts),
            "backend": self.backend,
            "ranks": [dataclasses.asdict(fact) for fact in self.facts],
            "clocks": {host: dataclasses.asdict(clock) for host, clock in self.clocks.items()},
            "folders": {
                what: {host: dataclasses.asdict(folder) for host, folder in seen.items()}
                for what, seen in self.folders.items()
            },
            "all_reduce": [dataclasses.asdict(reduction) for reduction in self.reductions],
        }


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with aligned columns; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _size(nbytes: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:g} {unit}"
        nbytes /= 1024  # type: ignore[assignment]
    return f"{nbytes:g} GiB"


def _host_rows(report: Report) -> list[list[str]]:
    rows = [["host", "ranks", "device", "driver", "clock", "kernel cache", "ops"]]
    cache = report.folders["kernel cache"]
    for number, (host, ranks) in enumerate(hosts_of(report.facts).items()):
        members = [fact for fact in report.facts if fact.host == host]
        kinds = {
            f"{fact.device.get('name', fact.device['kind'])} {fact.device.get('memory_gib', '')}".strip()
            for fact in members
        }
        clock, folder = report.clocks.get(host), cache.get(host)
        states = [state.partition(":")[0] for fact in members for state in fact.ops.values()]
        rows.append(
            [
                host,
                ranges(ranks),
                f"{len(members)} x {' / '.join(sorted(kinds))}",
                members[0].device.get("driver", "-"),
                "reference" if number == 0 else "-" if clock is None else f"{clock.offset:+.4f} s",
                "-" if folder is None else f"{'shared' if folder.shared else 'own'} ({folder.filesystem})",
                ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "-",
            ]
        )
    return rows


def render(report: Report) -> str:
    """Return the report for a terminal."""
    facts = report.facts
    hosts = hosts_of(facts)
    lines = [
        f"check_cluster: {len(facts)} ranks on {len(hosts)} hosts, all-reduce over {report.backend}",
        "hosts",
    ]
    lines += table(_host_rows(report))
    lines.append("versions")
    for name, value in facts[0].versions.items():
        difference = differing(facts, lambda fact, name=name: fact.versions.get(name))  # type: ignore[misc]
        lines.append(f"  {name:<18} {value if difference is None else 'DIFFERS: ' + difference}")
    unavailable = {name: state for name, state in facts[0].ops.items() if state.startswith("unavailable")}
    if unavailable:
        lines.append(f"ops that cannot be built on {facts[0].host}")
        lines += [f"  {name}: {state.partition(': ')[2]}" for name, state in unavailable.items()]
    if report.reductions:
        heading = ["all-reduce", "time", "algorithm", "bus", "result"]
        rows = [
            [
                _size(item.nbytes),
                f"{1e3 * item.seconds:.3f} ms",
                f"{item.algorithm_gbps:.3f} GB/s",
                f"{item.bus_gbps:.3f} GB/s",
                "right" if item.correct else "WRONG",
            ]
            for item in report.reductions
        ]
        lines += table([heading, *rows])
    lines += [f"warning: {warning}" for warning in report.verdict.warnings]
    lines += [f"PROBLEM: {problem}" for problem in report.verdict.problems]
    count = len(report.verdict.problems)
    lines.append("ready to train" if count == 0 else f"not ready: {count} problem{'' if count == 1 else 's'}")
    return "\n".join(lines)
