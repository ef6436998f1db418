"""The preflight: it passes a sound cluster, and in others names what is wrong, with host and rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import check_cluster
import pytest
import two_hosts
from hypothesis import given
from hypothesis import strategies as st
from preflight import measure, verdict
from preflight.facts import Facts
from rank_pool import RankPool, free_port
from two_hosts import TwoHosts

SCRIPT = str(Path(__file__).resolve().parents[2] / "launch/check_cluster.py")
VERSIONS = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "megatron-core": "0.16.1",
    "numpy": "2.1",
}


def facts_of(rank: int, **versions: str) -> Facts:
    """Return facts of a cluster of two hosts with two GPUs each."""
    gpu = {"kind": "cuda", "name": "H100", "memory_gib": "79.1", "uuid": f"GPU-{rank % 2}", "driver": "580"}
    host = ("alpha", "beta")[rank // 2]
    ops = {"ds_efficient_op_cuda": "built"} if rank % 2 == 0 else {}
    return Facts(rank, rank % 2, host, {**VERSIONS, **versions}, gpu, {"NCCL_DEBUG": "WARN"}, ops)


def cluster() -> list[Facts]:
    return [facts_of(rank) for rank in range(4)]


def test_equal_ranks_give_no_complaint() -> None:
    found = verdict.compare_facts(cluster(), expected_world=4)
    assert (found.problems, found.warnings) == ([], [])


@pytest.mark.parametrize(
    ("name", "other"),
    [("torch", "2.12.0"), ("deepspeed", "0.19.9"), ("megatron-core", "not installed"), ("python", "3.12.1")],
)
def test_version_that_must_agree_is_a_problem_with_host_and_rank(name: str, other: str) -> None:
    facts = cluster()
    facts[3] = facts_of(3, **{name: other})
    (problem,) = verdict.compare_facts(facts, None).problems
    assert problem.startswith(f"{name}: {VERSIONS[name]} on alpha, beta (rank 2); {other} on beta (rank 3);")
    facts[2] = facts_of(2, **{name: other})
    (problem,) = verdict.compare_facts(facts, None).problems
    assert problem.startswith(f"{name}: {VERSIONS[name]} on alpha; {other} on beta;")


def test_harmless_differences_are_warnings() -> None:
    facts = cluster()
    facts[1] = facts_of(1, numpy="2.2", python="3.11.9")
    facts[2] = replace(facts[2], environment={}, ops={"ds_efficient_op_cuda": "unavailable: no nvcc"})
    facts[3] = replace(facts[3], device={**facts[3].device, "driver": "570"})
    found = verdict.compare_facts(facts, 4)
    assert found.problems == []
    assert [warning.partition(":")[0] for warning in found.warnings] == [
        "numpy", "python", "GPU driver", "NCCL_DEBUG", "op ds_efficient_op_cuda",
    ]  # fmt: skip
    assert "NCCL_DEBUG: WARN on alpha, beta (rank 3); unset on beta (rank 2)" in found.warnings


def test_wrong_world_size_missing_gpus_and_shared_gpus_are_problems() -> None:
    facts = cluster()
    facts[1] = replace(facts[1], device={**facts[1].device, "uuid": "GPU-0"})
    facts[3] = replace(facts[3], device={"kind": "cpu"})
    problems = verdict.compare_facts(facts, 8).problems
    assert any(
        p.startswith("world size: 4 ranks, --expect-world 8; hosts: alpha 2, beta 2") for p in problems
    )
    assert (
        "device: cuda on alpha, beta (rank 2); cpu on beta (rank 3); torch sees no GPU on some ranks"
        in problems
    )
    assert "ranks 0-1 on alpha: share one GPU (GPU-0)" in problems
    facts[3] = replace(facts[3], device={"kind": "cuda", "name": "none: local rank 1, 1 GPUs visible"})
    assert any("rank 3 on beta: no GPU" in problem for problem in verdict.compare_facts(facts, 4).problems)


def test_hosts_of_one_name_are_told_apart() -> None:
    facts = [replace(fact, host="node") for fact in cluster()]
    assert [fact.host for fact in verdict.distinct_hosts(facts)] == ["node", "node", "node#2", "node#2"]


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_every_number_once(numbers: set[int]) -> None:
    found: list[int] = []
    for part in filter(None, verdict.ranges(sorted(numbers)).split(", ")):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    assert found == sorted(numbers)


def test_clock_folder_and_reduction_judgements() -> None:
    near, far = measure.Clock(0.9, 0.01), measure.Clock(-3.0, 0.01)
    assert verdict.judge_clocks({"alpha": near}).warnings == []
    assert "clock of beta: -3.000 s" in verdict.judge_clocks({"alpha": near, "beta": far}).warnings[0]
    here, there = measure.Folder("/runs", True, "ext4"), measure.Folder("/runs", False, "ext4")
    seen = {"alpha": here, "beta": there}
    assert verdict.judge_folder("kernel cache", seen, required=False) == verdict.Verdict()
    (problem,) = verdict.judge_folder("--shared /runs", seen, required=True).problems
    assert "not the same folder as on alpha: beta" in problem
    nfs = {host: measure.Folder("/home/x", True, "nfs4") for host in seen}
    assert "nfs4" in verdict.judge_folder("kernel cache", nfs, required=False).warnings[0]
    assert verdict.judge_folder("--shared /runs", nfs, required=True) == verdict.Verdict()
    right, wrong = (measure.Reduction(64, 1e-3, good, 1.0, 1.0) for good in (True, False))
    assert verdict.judge_reductions([right]).problems == []
    assert "wrong sum at 64 bytes" in verdict.judge_reductions([right, wrong]).problems[0]


def test_filesystem_is_that_of_the_longest_mount_point() -> None:
    assert measure.filesystem_of(Path("/proc/self")) == "proc"
    assert measure.filesystem_of(Path("/no/such/folder")) == measure.filesystem_of(Path("/"))


def test_rank_that_does_not_come_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(free_port())
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "3"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
    ):
        monkeypatch.setenv(name, value)
    assert check_cluster.run(["--timeout", "1"]) == 2
    assert "2 of 3 ranks did not arrive within 1 s: 1-2" in capsys.readouterr().err


def test_unreachable_rank_0_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(free_port())
    for name, value in (
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
    ):
        monkeypatch.setenv(name, value)
    assert check_cluster.run(["--timeout", "1"]) == 2
    error = capsys.readouterr().err
    assert f"no connection to rank 0 at 127.0.0.1:{port}" in error and "MASTER_ADDR" in error
    assert "Traceback" not in error


@pytest.mark.distributed
def test_two_ranks_of_one_host(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    output, runs = tmp_path / "report.json", tmp_path / "runs"
    arguments = ["--json", output, "--max-bytes", 65536, "--shared", runs]
    assert ranks(2).run("cluster_ranks:check", [*arguments, "--expect-world", 2]) == [0, 0]
    report = json.loads(output.read_text())
    assert report["ok"] and report["problems"] == [] and report["world_size"] == 2
    assert [item["nbytes"] for item in report["all_reduce"]] == [4096, 65536]
    for item in report["all_reduce"]:
        assert item["correct"] and item["seconds"] > 0
        assert item["bus_gbps"] == pytest.approx(item["algorithm_gbps"])  # 2 (n - 1) / n is 1 for two ranks
    assert report["ranks"][0]["versions"] == report["ranks"][1]["versions"]
    assert report["ranks"][0]["ops"] and not report["ranks"][1]["ops"]
    assert list(runs.iterdir()) == []
    assert ranks(2).run("cluster_ranks:check", [*arguments, "--expect-world", 4]) == [2, 2]
    assert "world size: 2 ranks, --expect-world 4" in json.loads(output.read_text())["problems"][0]


@pytest.mark.distributed
def test_measurements_see_what_is_wrong(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    for ahead in (0.0, -2.5):
        clock, nothing = ranks(2).run("cluster_ranks:offset_of_clock", ahead)
        assert nothing is None
        assert abs(clock.offset - ahead) <= clock.error + 1e-3
    for spoil_at in (None, 64):
        first, second = ranks(2).run("cluster_ranks:reductions", spoil_at)
        assert [item.correct for item in first] == [True, spoil_at is None, True]
        assert first == second  # seconds of the slowest rank, on both
    one, other = tmp_path / "one", tmp_path / "other"
    same = ranks(2).run("cluster_ranks:folder", [str(one), str(one)])
    apart = ranks(2).run("cluster_ranks:folder", [str(one), str(other)])
    assert [folder.shared for folder in same] == [True, True]
    assert [folder.shared for folder in apart] == [True, False]
    assert [folder.problem for folder in same + apart] == [""] * 4
    (tmp_path / "file").write_text("")
    _, broken = ranks(2).run("cluster_ranks:folder", [str(one), str(tmp_path / "file")])
    assert "cannot be written" in broken.problem and not broken.shared
    assert list(one.iterdir()) == [] and list(other.iterdir()) == []


needs_hosts = pytest.mark.skipif(two_hosts.why_not() is not None, reason=str(two_hosts.why_not()))


@needs_hosts
@pytest.mark.distributed
@pytest.mark.slow
def test_two_hosts_under_torchrun(tmp_path: Path) -> None:
    with TwoHosts(tmp_path) as hosts:
        address = hosts.hosts[0].address
        launch = ["-m", "torch.distributed.run", *f"--nnodes 2 --master-addr {address} --node-rank".split()]
        arguments = [SCRIPT, "--expect-world", "2", "--max-bytes", "65536"]
        commands = [[sys.executable, *launch, str(rank), *arguments] for rank in range(2)]
        log, other = hosts.run(commands, timeout=150)
    assert "check_cluster: 2 ranks on 2 hosts, all-reduce over gloo" in log
    assert "alpha  0" in log and "beta   1" in log and "ready to train" in log
    assert "ready to train" not in other


@needs_hosts
@pytest.mark.distributed
@pytest.mark.slow
def test_host_with_another_version_and_cache_is_named(tmp_path: Path) -> None:
    older = tmp_path / "older" / "deepspeed-0.0.1.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n")
    (tmp_path / "shared").mkdir()
    with TwoHosts(tmp_path / "logs") as hosts:
        place = {
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": hosts.hosts[0].address,
            "MASTER_PORT": "29500",
        }
        env = [
            {**place, "RANK": str(rank), "TORCH_EXTENSIONS_DIR": str(tmp_path / f"cache{rank}")}
            for rank in (0, 1)
        ]
        env[1]["PYTHONPATH"] = str(older.parent)
        command = [sys.executable, SCRIPT, "--max-bytes", "4096", "--shared", str(tmp_path / "shared")]
        log, other = hosts.run([command, command], timeout=150, env=env, expect=2)
    assert "PROBLEM: deepspeed: " in log and "0.0.1 on beta" in log and "not ready: 1 problem" in log
    assert "warning: PYTHONPATH: " in log
    rows = {line.split()[0]: line for line in log.splitlines() if line.startswith(("  alpha", "  beta"))}
    assert "shared (" in rows["alpha"] and "own (" in rows["beta"]
    assert "PROBLEM" not in other and "Traceback" not in log + other
