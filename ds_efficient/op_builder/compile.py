"""Compile a native op into a shared library, once per cache, and load it.

The sources include neither torch's nor Python's headers and export a C ABI, so a library takes a second or
two to compile (instead of half a minute to two minutes with ``torch/extension.h``), is checked by ``nvcc -c``
on machines without a GPU or CUDA torch, and outlives a change of torch. It is therefore compiled here by
plain calls of g++ and nvcc and loaded with ctypes, which hands it raw pointers and torch's current stream;
the ops are registered with ``torch.library`` in Python (`ds_efficient.ops`). torch's stable C++ ABI would
serve as well, but torch 2.6, the oldest supported, lacks it.

Folder of one build: ``<cache root>/<op>-<hash of sources, headers, flags and processor>[-<architectures>]/``
with the library, ``build.log`` (commands and output of the last build), ``history.log`` (a line a build) and,
meanwhile, ``lock``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import toolchain
from ds_efficient.op_builder.all_ops import OpSpec
from ds_efficient.op_builder.arch import Arch, archs_of_devices, check_devices, gencode_flags, parse_arch_list
from ds_efficient.op_builder.locks import LockTimes, build_lock

logger = logging.getLogger(__name__)

CXX_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-Wall")
NVCC_FLAGS = ("-O3", "-lineinfo", "-Xcompiler", "-fPIC")
COMMAND_TIMEOUT = 1800.0  # seconds; no single source takes near as long

_loaded: dict[Path, ctypes.CDLL] = {}


@dataclass(frozen=True)
class Built:
    """Result of `build`.

    Attributes:
        path: the library.
        fresh: whether this call compiled it.
        seconds: wall time of the call.
    """

    path: Path
    fresh: bool
    seconds: float


def load(spec: OpSpec) -> ctypes.CDLL:
    """Build the op if needed and load it.

    Raises:
        OpBuildError: it cannot be built or loaded; says why and what to do.
    """
    path = find_built(spec) or build(spec).path
    if path not in _loaded:
        try:
            _loaded[path] = ctypes.CDLL(str(path))
        except OSError as error:
            raise OpBuildError(
                f"{spec.full_name}: the built library does not load: {error}; remove {path.parent} to build "
                "it anew, or set TORCH_EXTENSIONS_DIR to a folder that allows executables"
            ) from error
    return _loaded[path]


def find_built(spec: OpSpec) -> Path | None:
    """The library, if the cache has one that fits here.

    For CUDA without TORCH_CUDA_ARCH_LIST any build of the same sources counts that serves all visible GPUs:
    one prebuild for several architectures is found by every node.

    Raises:
        OpBuildError: TORCH_CUDA_ARCH_LIST is malformed or lacks a visible GPU.
    """
    stem = _stem(spec)
    if spec.device == "cpu":
        path = stem / _library_name(spec)
        return path if path.is_file() else None
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        path = _folder(spec, target_archs()) / _library_name(spec)
        return path if path.is_file() else None
    capabilities = [capability for _, capability in visible_gpus()]
    for path in sorted(stem.parent.glob(f"{stem.name}-*/{_library_name(spec)}")):
        archs = _archs_of_folder(path.parent.name[len(stem.name) + 1 :])
        if capabilities and all(any(arch.serves(c) for arch in archs) for c in capabilities):
            return path
    return None


def build(spec: OpSpec, *, archs: Sequence[Arch] | None = None, times: LockTimes | None = None) -> Built:
    """Compile the op unless its library is there; parallel callers compile once.

    Args:
        spec: what to build.
        archs: CUDA architectures; by default those of TORCH_CUDA_ARCH_LIST, else of the visible GPUs.
        times: waiting times of the build lock.

    Raises:
        OpBuildError: no compiler, wrong architecture, unwritable cache, stale lock, or failing compilation.
    """
    start = time.monotonic()
    if spec.device == "cuda":
        archs = tuple(archs) if archs else target_archs()
        folder = _folder(spec, archs)
    else:
        archs, folder = (), _stem(spec)
    library = folder / _library_name(spec)
    if library.is_file():
        return Built(library, False, time.monotonic() - start)
    toolchain.make_writable(folder)
    log = folder / "build.log"
    arrived = time.time()
    with build_lock(folder / "lock", done=library.is_file, times=times) as mine:
        fresh = mine and not library.is_file()
        if fresh:
            if log.is_file() and log.stat().st_mtime > arrived:  # failed in another process while we waited
                raise _failure(spec, log)
            _compile(spec, archs, library, log)
    return Built(library, fresh, time.monotonic() - start)


def why_not(spec: OpSpec) -> str | None:
    """Why the op cannot be built here; None when it can. Compiles nothing."""
    try:
        if spec.device == "cpu":
            toolchain.find_cxx()
        else:
            archs = target_archs()
            toolchain.find_nvcc().check(archs)
    except OpBuildError as error:
        return str(error)
    return None


def visible_gpus() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of each visible GPU."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    return [
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]


def target_archs() -> tuple[Arch, ...]:
    """Architectures to build for: TORCH_CUDA_ARCH_LIST, checked against the visible GPUs, else these GPUs.

    Raises:
        OpBuildError: the list is malformed or lacks a GPU, or there is neither list nor GPU.
    """
    gpus = visible_gpus()
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        archs = parse_arch_list(listed)
        check_devices(archs, gpus, source="TORCH_CUDA_ARCH_LIST")
        return archs
    if not gpus:
        import torch

        why = "torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU"
        raise OpBuildError(
            f"no CUDA architecture to build for: {why} and TORCH_CUDA_ARCH_LIST is not set; set it, or use "
            '`ds_efficient prebuild --arch "8.0;9.0a"`'
        )
    return archs_of_devices([capability for _, capability in gpus])


def _library_name(spec: OpSpec) -> str:
    return f"{spec.full_name}.so"


def _stem(spec: OpSpec) -> Path:
    """Folder of the op without the architectures; new whenever sources, headers or flags change."""
    files = spec.source_paths()
    for folder in spec.include_dirs():
        files += sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [b"%s\n" % path.name.encode() + path.read_bytes() for path in files]
    if spec.device == "cpu":
        flags = [*CXX_FLAGS, *spec.cxx_flags, os.environ.get("CXX", ""), toolchain.processor_identity()]
    else:
        flags = [*NVCC_FLAGS, *spec.nvcc_flags, *_host_compiler()]
    parts += [text.encode() for text in (*flags, *spec.libraries)]
    return toolchain.cache_root() / f"{spec.name}_{spec.device}-{toolchain.digest(parts)}"


def _host_compiler() -> list[str]:
    """nvcc takes the C++ compiler that CXX names, else its own choice."""
    return ["-ccbin", toolchain.find_cxx()[-1]] if os.environ.get("CXX") else []


def _folder(spec: OpSpec, archs: Sequence[Arch]) -> Path:
    stem = _stem(spec)
    return stem.with_name(stem.name + "-" + "_".join(str(arch).replace("+PTX", "ptx") for arch in archs))


def _archs_of_folder(text: str) -> tuple[Arch, ...]:
    return parse_arch_list(text.replace("ptx", "+PTX").replace("_", ";"), source="folder name")


def _commands(
    spec: OpSpec, archs: Sequence[Arch], work: Path, library: Path
) -> tuple[list[list[str]], list[str]]:
    """One compiling command a source, and the linking one."""
    include = [f"-I{folder}" for folder in spec.include_dirs()]
    objects = [str(work / f"{i}_{path.stem}.o") for i, path in enumerate(spec.source_paths())]
    libraries = [f"-l{name}" for name in spec.libraries]
    if spec.device == "cpu":
        compiler = toolchain.find_cxx()
        flags = [*CXX_FLAGS, *spec.cxx_flags, *include, "-c"]
        link = [*compiler, "-shared", *objects, "-o", str(library), "-pthread", *libraries]
    else:
        nvcc = toolchain.find_nvcc()
        nvcc.check(archs)
        compiler = [nvcc.path]
        compiler += _host_compiler()
        flags = [*NVCC_FLAGS, *spec.nvcc_flags, *gencode_flags(archs), *include, "-c"]
        link = [*compiler, "-shared", *objects, "-o", str(library), *toolchain.cudart_flags(nvcc), *libraries]
    pairs = zip(spec.source_paths(), objects, strict=True)
    return [[*compiler, *flags, str(source), "-o", target] for source, target in pairs], link


def _compile(spec: OpSpec, archs: Sequence[Arch], library: Path, log: Path) -> None:
    """Compile and link in a temporary folder, then move the library to its place at once."""
    logger.info("building %s (%d sources)", spec.full_name, len(spec.sources))
    log.unlink(missing_ok=True)
    start = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="work-", dir=log.parent))
    try:
        made = work / library.name
        compiling, linking = _commands(spec, archs, work, made)
        with ThreadPoolExecutor(max_workers=min(4, len(compiling), os.cpu_count() or 1)) as pool:
            results = list(pool.map(_run, compiling))
        if all(ok for ok, _ in results):
            results.append(_run(linking))
        log.write_text("\n".join(text for _, text in results), encoding="utf-8")
        if not all(ok for ok, _ in results):
            raise _failure(spec, log)
        with open(log.with_name("history.log"), "a", encoding="utf-8") as history:
            history.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} pid {os.getpid()} built {library.name}\n")
        os.replace(made, library)
    except OSError as error:
        raise OpBuildError(
            f"{spec.full_name}: the build in {log.parent} failed: {error}; check that the disk has free "
            "space, or set TORCH_EXTENSIONS_DIR to another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info("built %s in %.1f s", spec.full_name, time.monotonic() - start)


def _run(command: list[str]) -> tuple[bool, str]:
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return False, f"{shown}\nstopped after {COMMAND_TIMEOUT:.0f} s\n"
    return done.returncode == 0, f"{shown}\n{done.stdout}"


def _failure(spec: OpSpec, log: Path) -> OpBuildError:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()][:5]
    tail = "\n    ".join(errors or lines[-5:])
    return OpBuildError(f"{spec.full_name} does not compile:\n    {tail}\n  Commands and full output: {log}")
