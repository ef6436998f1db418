"""Find the compilers and the places that a build needs; each thing missing is one readable `OpBuildError`."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder.arch import Arch

_SUFFIX_SINCE = {"": (0, 0), "a": (12, 0), "f": (12, 9)}  # CUDA releases that brought sm_90a and sm_100f
_USUAL_NVCC = (Path("/usr/local/cuda/bin/nvcc"), Path("/opt/cuda/bin/nvcc"))
REFERENCE_REMEDY = 'or use the plain torch code: backend="reference"'


def find_cxx() -> list[str]:
    """The C++ compiler as a command: ``$CXX``, else c++, g++ or clang++ on the PATH.

    Raises:
        OpBuildError: there is none, or CXX names a program that is not there.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise OpBuildError(
                f"CXX={os.environ['CXX']!r}: no such program; set CXX to a C++ compiler or unset it"
            )
        return named
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return [path]
    raise OpBuildError(
        "no C++ compiler found (looked for c++, g++, clang++ on the PATH); install one, for example with "
        f"`apt-get install g++`, or set CXX, {REFERENCE_REMEDY}"
    )


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler.

    Attributes:
        path: the program.
        version: CUDA release, for example (13, 0).
        codes: architectures that it knows, without suffix, for example ``"90"``; empty where it cannot list
            them.
    """

    path: str
    version: tuple[int, int]
    codes: frozenset[str]

    def check(self, archs: Sequence[Arch]) -> None:
        """Raise OpBuildError when an architecture is unknown to this compiler."""
        for arch in archs:
            listed = not self.codes or f"{arch.major}{arch.minor}" in self.codes
            if not listed or self.version < _SUFFIX_SINCE[arch.suffix]:
                known = ", ".join(
                    f"{int(code) // 10}.{int(code) % 10}" for code in sorted(self.codes, key=int)
                )
                raise OpBuildError(
                    f"{self.path} (CUDA {self.version[0]}.{self.version[1]}) cannot compile for {arch} "
                    f"(knows {known}); set TORCH_CUDA_ARCH_LIST to one of these, or install a newer CUDA"
                )


def find_nvcc() -> Nvcc:
    """nvcc of ``$CUDA_HOME`` or ``$CUDA_PATH``, else of the PATH, of /usr/local/cuda or of pip packages.

    Raises:
        OpBuildError: there is none, the variable points elsewhere, or it does not run.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        root = os.environ.get(variable)
        if root:
            path = Path(root, "bin", "nvcc")
            if not path.is_file():
                raise OpBuildError(
                    f"{variable}={root!r} has no bin/nvcc; set it to the root of a CUDA toolkit, unset it, "
                    f"{REFERENCE_REMEDY}"
                )
            return _examine_nvcc(str(path))
    found = shutil.which("nvcc")
    if found:
        return _examine_nvcc(found)
    candidates = list(_USUAL_NVCC)
    for folder in nvidia_packages():
        candidates += sorted(folder.glob("*/bin/nvcc"), reverse=True)
    for candidate in candidates:
        if candidate.is_file():
            return _examine_nvcc(str(candidate))
    raise OpBuildError(
        "no CUDA compiler found (looked at CUDA_HOME, CUDA_PATH, nvcc on the PATH, /usr/local/cuda, "
        f"/opt/cuda, pip packages); install the CUDA toolkit and set CUDA_HOME, {REFERENCE_REMEDY}"
    )


@functools.lru_cache(maxsize=8)
def _examine_nvcc(path: str) -> Nvcc:
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=120, check=True
        ).stdout
        match = re.search(r"release (\d+)\.(\d+)", text)
        codes = subprocess.run([path, "--list-gpu-code"], capture_output=True, text=True, timeout=120).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise OpBuildError(f"the CUDA compiler {path} does not run: {error}") from error
    if match is None:
        raise OpBuildError(
            f"{path} --version names no CUDA release, so it is not NVIDIA's compiler: {text[:200]!r}"
        )
    return Nvcc(path, (int(match[1]), int(match[2])), frozenset(re.findall(r"sm_(\d+)", codes)))


def nvidia_packages() -> list[Path]:
    """Folders of the nvidia-* pip packages."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def cudart_flags(nvcc: Nvcc) -> list[str]:
    """Flags that link the CUDA runtime.

    The static one, nvcc's default, unless the toolkit has none (pip packages): then the shared one by its
    full name.
    """
    dry_run = subprocess.run(
        [nvcc.path, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    match = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    roots = [Path(match[1].strip()).resolve()] if match else []
    folders = [
        folder for root in roots for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib"))
    ]
    if any((folder / "libcudart_static.a").is_file() for folder in folders):
        return []
    folders += [folder for package in nvidia_packages() for folder in package.glob("*/lib")]
    for folder in folders:
        for library in sorted(folder.glob(f"libcudart.so.{nvcc.version[0]}*")):
            return ["-cudart", "none", str(library), "-Xlinker", f"-rpath={folder}"]
    return []


def processor_identity() -> str:
    """Instruction set of this processor: code built with -march=native must not be shared with another."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":")[0].strip() in ("flags", "Features"):
                return platform.machine() + " " + " ".join(sorted(line.split(":", 1)[1].split()))
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def extensions_root() -> Path:
    """torch's folder of JIT builds: ``$TORCH_EXTENSIONS_DIR``, else torch_extensions in the user's cache."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "torch_extensions"


def cache_root() -> Path:
    """Folder of this package's builds, with the versions of Python, torch and CUDA in its name."""
    import torch

    cuda = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    release = torch.__version__.split("+")[0]
    tag = f"py{sys.version_info.major}{sys.version_info.minor}_torch{release}_{cuda}"
    return extensions_root() / "ds_efficient" / tag


def make_writable(folder: Path) -> None:
    """Create a folder of the cache and make sure that files can be made in it.

    Raises:
        OpBuildError: it cannot; names TORCH_EXTENSIONS_DIR.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise OpBuildError(
            f"cannot write the kernel cache {folder}: {error.strerror or error}; set TORCH_EXTENSIONS_DIR "
            "to a writable folder with free space"
        ) from error


def digest(parts: Sequence[bytes]) -> str:
    """Short hash of byte strings, each counted with its length."""
    state = hashlib.sha256()
    for part in parts:
        state.update(b"%d:" % len(part))
        state.update(part)
    return state.hexdigest()[:12]
