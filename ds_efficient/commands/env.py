"""``ds_efficient env``: versions, GPUs, compilers, state of every op, caches and locks, for bug reports."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ds_efficient.errors import OpBuildError
from ds_efficient.version import __version__

MEGATRON_TESTED = ("0.16.1", "0.19.2")  # oldest and newest megatron-core that the tests run with
DEEPSPEED_MINIMUM = "0.19.8"
TORCH_MINIMUM = "2.6"
_VARIABLES = (
    "CUDA_HOME CUDA_PATH CUDA_VISIBLE_DEVICES CXX TORCH_CUDA_ARCH_LIST TORCH_EXTENSIONS_DIR OMP_NUM_THREADS "
    "NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME DS_EFFICIENT_TUNING_CACHE"
).split()


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("env", help="versions, GPUs, compilers, ops, caches and locks")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0."""
    report = collect()
    print(json.dumps(report, indent=2) if args.json else _render(report))
    return 0


def collect() -> dict[str, Any]:
    """Everything the report says, as plain values."""
    from ds_efficient.op_builder import inventory, toolchain

    locks = [("ds_efficient", lock) for lock in inventory.own_locks()]
    locks += [("torch", lock) for lock in inventory.torch_locks()]
    return {
        "versions": _versions(),
        "gpus": _gpus(),
        "compilers": _compilers(),
        "ops": [dataclasses.asdict(state) for state in inventory.op_states()],
        "sparse_products": _sparse_products(),
        "cache": str(toolchain.cache_root()),
        "locks": [
            {"of": owner, "path": str(lock.path), "age_seconds": round(lock.age, 1), "state": lock.state,
             "pid": lock.pid, "host": lock.host}
            for owner, lock in locks
        ],
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }  # fmt: skip


def _versions() -> dict[str, str]:
    import torch

    versions = {
        "ds_efficient": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _against_minimum(torch.__version__, TORCH_MINIMUM),
        "CUDA of torch": torch.version.cuda or "none (CPU build)",
        "deepspeed": _against_minimum(_installed("deepspeed"), DEEPSPEED_MINIMUM),
        "megatron-core": _megatron(_installed("megatron-core")),
        "transformer_engine": _installed(
            "transformer_engine", "transformer-engine", "transformer-engine-torch"
        ),
        "apex": _apex(),
    }
    if torch.version.cuda is not None:
        nccl = torch.cuda.nccl.version()
        versions["nccl"] = ".".join(map(str, nccl))
    return versions


def _installed(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _against_minimum(version: str, minimum: str) -> str:
    from packaging.version import Version

    if version != "not installed" and Version(version).release < Version(minimum).release:
        return f"{version} (too old: {minimum} or newer is supported)"
    return version


def _megatron(version: str) -> str:
    from packaging.version import Version

    if version == "not installed":
        return version
    low, high = MEGATRON_TESTED
    if Version(low).release <= Version(version).release <= Version(high).release:
        return f"{version} (tested: {low} to {high})"
    return f"{version} (outside the tested range {low} to {high})"


def _apex() -> str:
    """The name `apex` on PyPI is an unrelated web toolkit; NVIDIA's has these sub-packages."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if any(
        (folder / part).is_dir() for folder in folders for part in ("normalization", "multi_tensor_apply")
    ):
        return f"{_installed('apex')} (NVIDIA's)"
    return "not NVIDIA's: another package of that name, not used"


def _gpus() -> list[dict[str, Any]]:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return gpus


def _sparse_products() -> dict[str, str]:
    """cuSPARSELt, which is found and not built; on each GPU whether its check passes, or why not."""
    import torch

    from ds_efficient.ops import cusparselt, cusparselt_cache, cusparselt_library

    if torch.version.cuda is None:
        return {"cuSPARSELt": "not used: torch is a CPU build"}
    try:
        library = cusparselt_library.load()
    except OpBuildError as error:
        return {"cuSPARSELt": f"unavailable: {error}"}
    found = {"cuSPARSELt": f"{library.version_text} ({library.path})"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found[f"cuda:{index}"] = cusparselt.unavailable(torch.device("cuda", index)) or "works"
    return found | {"measurements": str(cusparselt_cache.cache_path())}


def _compilers() -> dict[str, str]:
    from ds_efficient.op_builder import toolchain

    compilers = {}
    try:
        command = toolchain.find_cxx()
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
        compilers["C++"] = f"{' '.join(command)}: {(done.stdout or done.stderr).splitlines()[0]}"
    except (OpBuildError, OSError, subprocess.SubprocessError, IndexError) as error:
        compilers["C++"] = f"unusable: {error}"
    try:
        nvcc = toolchain.find_nvcc()
        compilers["nvcc"] = f"{nvcc.path}: CUDA {nvcc.version[0]}.{nvcc.version[1]}"
    except OpBuildError as error:
        compilers["nvcc"] = f"unusable: {error}"
    beside_python = Path(sys.executable).parent / "ninja"
    found = shutil.which("ninja") or (str(beside_python) if beside_python.is_file() else None)
    compilers["ninja"] = found or "not found (DeepSpeed's own ops need it)"
    return compilers


def _render(report: dict[str, Any]) -> str:
    lines = ["versions", *(f"  {name:<20} {value}" for name, value in report["versions"].items())]
    lines += ["GPUs"] + [
        f"  {i}: {gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}"
        for i, gpu in enumerate(report["gpus"])
    ]
    if not report["gpus"]:
        lines.append("  none visible")
    lines += ["compilers", *(f"  {name:<20} {value}" for name, value in report["compilers"].items())]
    lines.append("ops")
    lines += [f"  {op['name']:<34} {op['state']:<12} {op['detail']}" for op in report["ops"]]
    lines.append("2:4 sparse products")
    lines += [f"  {name:<20} {value}" for name, value in report["sparse_products"].items()]
    lines += ["kernel cache", f"  {report['cache']}", "build locks"]
    for lock in report["locks"]:
        owner = f"process {lock['pid']} on {lock['host']}" if lock["pid"] else "owner unknown"
        age = f"{lock['age_seconds']:.0f} s old"
        lines.append(f"  {lock['path']} ({lock['of']}): {age}, {owner}, {lock['state']}")
    if any(lock["state"] != "held" for lock in report["locks"]):
        lines.append("  remove the stale ones with `ds_efficient prebuild --clean-stale-locks`")
    if not report["locks"]:
        lines.append("  none")
    if report["variables"]:
        lines += ["environment", *(f"  {name}={value}" for name, value in report["variables"].items())]
    return "\n".join(lines)
