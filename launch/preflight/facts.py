"""What one rank knows about itself: versions, code, device, environment, state of the native ops."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGES = ("deepspeed", "megatron-core", "ds_efficient", "numpy", "transformer-engine")
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "DS_", "CUDA_", "OMP_", "FI_", "UCX_", "HF_")
_NAMES = ("PYTHONPATH", "LD_LIBRARY_PATH", "PYTORCH_CUDA_ALLOC_CONF", "XDG_CACHE_HOME", "LANG", "CXX")
_PER_RANK = ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_", "DS_ENV_FILE")


@dataclass(frozen=True)
class Rank:
    """Place of this process, as the launcher says it."""

    rank: int
    world_size: int
    local_rank: int
    host: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Rank:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; without them this is the only process."""
        rank, world, local = (environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(int(rank or 0), int(world or 1), int(local or 0), socket.gethostname())


@dataclass(frozen=True)
class Facts:
    """What is compared between ranks; plain strings throughout.

    Attributes:
        rank: global rank.
        local_rank: rank on its host.
        host: host name.
        versions: name to version, ``"not installed"`` where it is not.
        device: ``kind`` (``"cuda"`` or ``"cpu"``); of a GPU also ``name, memory_gib, uuid, driver``.
        environment: variables that change how a run behaves.
        ops: native op to its state; on the first rank of each host only.
    """

    rank: int
    local_rank: int
    host: str
    versions: dict[str, str]
    device: dict[str, str]
    environment: dict[str, str]
    ops: dict[str, str]

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Facts:
        """Return what `to_json` wrote."""
        return cls(**json.loads(text))


def collect(rank: Rank) -> Facts:
    """Return the facts of this process."""
    return Facts(
        rank=rank.rank,
        local_rank=rank.local_rank,
        host=rank.host,
        versions=_versions(),
        device=_device(rank.local_rank),
        environment=_environment(os.environ),
        ops=_ops() if rank.local_rank == 0 else {},
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["CUDA of torch"] = torch.version.cuda or "none"
    versions["NCCL"] = "none"
    if torch.version.cuda and torch.distributed.is_nccl_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if versions["ds_efficient"] == "not installed":  # run from a clone
        from ds_efficient.version import __version__

        versions["ds_efficient"] = __version__
    versions["code"] = _digest_of_code()
    return versions


def _digest_of_code() -> str:
    """Return a digest of this clone's sources: two hosts with unlike clones train unlike models."""
    import ds_efficient

    digest = hashlib.blake2b(digest_size=6)
    package = Path(ds_efficient.__file__).parent
    for root in (package, REPOSITORY / "launch", REPOSITORY / "megatron_patches"):
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h") and "__pycache__" not in path.parts:
                digest.update(f"{root.name}/{path.relative_to(root)}".encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _device(local_rank: int) -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"kind": "cpu"}
    if local_rank >= torch.cuda.device_count():
        return {
            "kind": "cuda",
            "name": f"none: local rank {local_rank}, {torch.cuda.device_count()} GPUs visible",
        }
    properties = torch.cuda.get_device_properties(local_rank)
    return {
        "kind": "cuda",
        "name": properties.name,
        "memory_gib": f"{properties.total_memory / 2**30:.1f}",
        "uuid": str(getattr(properties, "uuid", "unknown")),
        "driver": _driver(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in _NAMES or name.startswith(_PREFIXES)) and not name.startswith(_PER_RANK)
    }


def _ops() -> dict[str, str]:
    from ds_efficient.op_builder.inventory import op_states

    return {op.name: op.state if op.state == "built" else f"{op.state}: {op.detail}" for op in op_states()}
