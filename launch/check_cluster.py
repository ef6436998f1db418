"""Check a cluster before a long run; start it exactly as the training will be started.

    deepspeed --hostfile hosts launch/check_cluster.py --expect-world 16
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint host1:29500 launch/check_cluster.py

Compares versions, sources, GPUs and environment of all ranks, measures the hosts' clocks, finds out which
folders they share, asks which native ops they can build, and checks and times the all-reduce. Rank 0 prints
the result. Exit status: 0, or 2 where training could not work. Nothing is built, no file is left behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone that is not installed

import torch
import torch.distributed as dist
from preflight import measure, verdict
from preflight.facts import Facts, Rank, collect
from preflight.show import Report, render

from ds_efficient.errors import USER_ERROR_EXIT, UserError


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="check_cluster.py", description="Check a cluster; start it as the training will be started."
    )
    add = parser.add_argument
    add("--expect-world", type=int, metavar="N", help="number of ranks there should be")
    add(
        "--shared",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders that all hosts must share (--save, data)",
    )
    add("--max-bytes", type=int, metavar="N", help="largest all-reduce; 256 MiB with GPUs, else 16 MiB")
    add("--backend", choices=("nccl", "gloo"), help="of the all-reduce; nccl with GPUs, else gloo")
    add("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for the other ranks (120)")
    add("--json", nargs="?", const="-", metavar="FILE", help="the result as JSON, to FILE or standard output")
    add("--local_rank", "--local-rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args(argv)
    if args.max_bytes is not None and args.max_bytes < 4:
        parser.error(f"--max-bytes {args.max_bytes}: must be at least 4")
    if args.timeout <= 0:
        parser.error(f"--timeout {args.timeout}: must be above 0")
    return args


def open_store(place: Rank, timeout: float) -> dist.Store:
    """Connect to rank 0, the way torch.distributed would.

    Raises:
        UserError: it cannot be reached, or the port is taken.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "0" if place.world_size == 1 else "29500"))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=place.rank == 0 and not agent,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {place.rank} on {place.host}: no connection to rank 0 at {address}:{port} within "
            f"{timeout:.0f} s ({str(error).splitlines()[0]}). Check the address (MASTER_ADDR), "
            "the port and the firewalls"
        ) from error
    return dist.PrefixStore("check_cluster", store)


def gather(store: dist.Store, key: str, place: Rank, text: str, timeout: float) -> list[str] | None:
    """Bring every rank's `text` to rank 0, without collectives; None on the others.

    Raises:
        UserError: on rank 0, naming the ranks that did not come; on the others, when rank 0 gave up.
    """
    store.set(f"{key}/{place.rank}", text)
    if place.rank != 0:
        try:
            store.wait([f"{key}/done"], datetime.timedelta(seconds=timeout + 30))
        except RuntimeError as error:
            raise UserError(
                f"rank {place.rank} on {place.host}: rank 0 does not go on; see its message"
            ) from error
        if store.get(f"{key}/done") != b"yes":
            raise UserError(f"rank {place.rank} on {place.host}: stops because other ranks are missing")
        return None
    deadline = time.monotonic() + timeout
    keys = {rank: f"{key}/{rank}" for rank in range(place.world_size)}
    missing = set(keys)
    while missing and time.monotonic() < deadline:
        missing = {rank for rank in missing if not store.check([keys[rank]])}
        time.sleep(0.0 if not missing else 0.05)
    store.set(f"{key}/done", "no" if missing else "yes")
    if missing:
        raise UserError(
            f"{len(missing)} of {place.world_size} ranks did not arrive within {timeout:.0f} s: "
            f"{verdict.ranges(sorted(missing))}. Look at their hosts' output; start a launcher on every host"
        )
    return [store.get(name).decode() for name in keys.values()]


def start_group(store: dist.Store, place: Rank, backend: str, timeout: float) -> torch.device:
    """Start torch.distributed on the store; return the device of the all-reduce."""
    if backend == "nccl":
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group(
        "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("group", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    return torch.device("cuda", place.local_rank) if backend == "nccl" else torch.device("cpu")


def measure_together(
    args: argparse.Namespace, store: dist.Store, place: Rank, facts: list[Facts] | None, device: torch.device
) -> tuple[dict[str, measure.Clock], dict[str, dict[str, measure.Folder]], list[measure.Reduction]]:
    """Measure clocks, folders and the all-reduce; collective. Only rank 0's result is complete."""
    from ds_efficient.op_builder.toolchain import extensions_root

    count = iter(range(1000))

    def broadcast(text: str) -> str:
        key = f"text/{next(count)}"
        if place.rank == 0:
            store.set(key, text)
        return store.get(key).decode()

    leaders = {fact.rank: fact.host for fact in facts or () if fact.local_rank == 0 or fact.rank == 0}
    leaders = {int(rank): host for rank, host in json.loads(broadcast(json.dumps(leaders))).items()}
    clocks = {}
    for rank, host in leaders.items():
        if rank != 0 and place.rank in (0, rank):
            clock = measure.clock_offset(rank)
            if clock is not None:
                clocks[host] = clock
    folders: dict[str, dict[str, measure.Folder]] = {}
    for what, path in [
        ("kernel cache", extensions_root()),
        *(("--shared", Path(name)) for name in args.shared),
    ]:
        folder = measure.look_at_folder(path, place.rank in leaders, broadcast)
        text = json.dumps(dataclasses.asdict(folder))
        all_texts = gather(store, f"folder/{next(count)}", place, text, args.timeout)
        if all_texts is not None:
            seen = {host: measure.Folder(**json.loads(all_texts[rank])) for rank, host in leaders.items()}
            folders[what if what != "--shared" else f"--shared {path}"] = seen
    largest = args.max_bytes or (256 if device.type == "cuda" else 16) * 2**20
    reductions = measure.all_reduce(measure.reduction_sizes(largest), device) if place.world_size > 1 else []
    return clocks, folders, reductions


def check(args: argparse.Namespace, place: Rank) -> int:
    """Do all checks; return the exit status, the same on every rank."""
    store = open_store(place, args.timeout)
    texts = gather(store, "facts", place, collect(place).to_json(), args.timeout)
    facts = None if texts is None else verdict.distinct_hosts([Facts.from_json(text) for text in texts])
    result = verdict.compare_facts(facts, args.expect_world) if facts else verdict.Verdict()
    usable = torch.cuda.is_available() and place.local_rank < torch.cuda.device_count()
    if facts and args.backend is None and len({fact.device["kind"] for fact in facts}) > 1:
        store.set("backend", "gloo")
    elif facts:
        everywhere = all("GPUs visible" not in fact.device.get("name", "") for fact in facts)
        store.set("backend", args.backend or ("nccl" if usable and everywhere else "gloo"))
    backend = store.get("backend").decode()
    if backend == "nccl" and not usable:
        raise UserError(f"rank {place.rank} on {place.host}: --backend nccl needs a GPU for each rank")
    device = start_group(store, place, backend, args.timeout)
    clocks, folders, reductions = measure_together(args, store, place, facts, device)
    if facts is not None:
        parts = [verdict.judge_clocks(clocks), verdict.judge_reductions(reductions)]
        parts += [
            verdict.judge_folder(what, seen, required=what.startswith("--shared"))
            for what, seen in folders.items()
        ]
        for part in parts:
            result.problems += part.problems
            result.warnings += part.warnings
        publish(Report(facts, backend, clocks, folders, reductions, result), args.json)
    status = USER_ERROR_EXIT if result.problems else 0
    store.set("status", str(status)) if place.rank == 0 else None
    status = int(store.get("status"))
    dist.barrier()  # rank 0 holds the store: it leaves last
    dist.destroy_process_group()
    return status


def publish(report: Report, json_to: str | None) -> None:
    """Print the report, and write the JSON where it was asked for.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(report.as_json(), indent=1)
    if json_to == "-":
        print(text, flush=True)
        return
    print(render(report), flush=True)
    if json_to is not None:
        try:
            Path(json_to).write_text(text + "\n")
        except OSError as error:
            raise UserError(f"--json {json_to}: cannot be written ({error.strerror})") from error


def run(argv: Sequence[str] | None = None) -> Any:
    """Run the script; what goes wrong becomes one message and exit status 2."""
    args = parse_args(argv)
    place = Rank.from_environment(os.environ)
    try:
        return check(args, place)
    except UserError as error:
        message = str(error)
    except RuntimeError as error:  # a collective that fails raises one of torch's many kinds of it
        lines = str(error).splitlines() or [type(error).__name__]
        message = f"rank {place.rank} on {place.host}: communication failed: {lines[0]}"
    print(f"check_cluster.py: {message}", file=sys.stderr, flush=True)
    return USER_ERROR_EXIT


if __name__ == "__main__":
    sys.exit(run())
