"""The one table of native ops. A new op is one row here and its sources under ``csrc/``.

This module imports nothing heavy, so that every layer may read it. An op that exists for the CPU and for CUDA
has two rows, since each is built and can fail on its own.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from ds_efficient.errors import OpBuildError

CSRC = Path(__file__).resolve().parent.parent / "csrc"


@dataclass(frozen=True)
class OpSpec:
    """How one native library is built.

    Attributes:
        name: op, for example ``"keyed_random"``.
        device: ``"cpu"`` (a C++ compiler) or ``"cuda"`` (nvcc).
        sources: files relative to ``csrc/``; torch-free, C ABI.
        builder: ``"module:Class"`` of its builder derived from DeepSpeed's.
        title: one line for reports.
        include: folders with headers, relative to ``csrc/``.
        cxx_flags: further flags of the C++ compiler (``device="cpu"``).
        nvcc_flags: further flags of nvcc (``device="cuda"``).
        libraries: libraries to link, for example ``("cublas",)``.
    """

    name: str
    device: str
    sources: tuple[str, ...]
    builder: str
    title: str
    include: tuple[str, ...] = ("common",)
    cxx_flags: tuple[str, ...] = ()
    nvcc_flags: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """Name of the library and of DeepSpeed's builder, for example ``"ds_efficient_keyed_random_cpu"``."""
        return f"ds_efficient_{self.name}_{self.device}"

    def source_paths(self) -> list[Path]:
        """Absolute paths of the sources."""
        return [CSRC / source for source in self.sources]

    def include_dirs(self) -> list[Path]:
        """Absolute paths of the folders with headers."""
        return [CSRC / folder for folder in self.include]


def _rows(
    name: str, title: str, *, cuda: tuple[str, ...], libraries: tuple[str, ...] = ()
) -> tuple[OpSpec, OpSpec]:
    """The two rows of an op whose files carry its name.

    Args:
        name: op; its sources are in ``csrc/<name>/`` and its builders are ``<Name>CPUBuilder`` and
            ``<Name>CUDABuilder`` in ``ds_efficient.op_builder.<name>``. The C++ source is ``<name>_cpu.cpp``.
        title: what it computes.
        cuda: names of the CUDA sources, without folder and ending.
        libraries: CUDA libraries to link.
    """
    builder = f"ds_efficient.op_builder.{name}:{name.title().replace('_', '')}"
    include = ("common", name)
    return (
        OpSpec(name, "cpu", (f"{name}/{name}_cpu.cpp",), f"{builder}CPUBuilder", f"{title}, C++", include),
        OpSpec(
            name,
            "cuda",
            tuple(f"{name}/{source}.cu" for source in cuda),
            f"{builder}CUDABuilder",
            f"{title}, CUDA",
            include,
            libraries=libraries,
        ),
    )


def _lgreco_rows(part: str, title: str) -> tuple[OpSpec, OpSpec]:
    """The two rows of a compressor: ``csrc/lgreco/<part>_cpu.cpp`` and ``<part>_cuda.cu``."""
    name, builder = f"lgreco_{part}", f"ds_efficient.op_builder.lgreco:Lgreco{part.title()}"
    include = ("common", "lgreco")
    return (
        OpSpec(name, "cpu", (f"lgreco/{part}_cpu.cpp",), f"{builder}CPUBuilder", f"{title}, C++", include),
        OpSpec(name, "cuda", (f"lgreco/{part}_cuda.cu",), f"{builder}CUDABuilder", f"{title}, CUDA", include),
    )


_SPECS = (
    *_rows("keyed_random", "counter-based random numbers", cuda=("keyed_random_cuda",)),
    *_rows("slope", "N:M sparse matrices", cuda=("slope_cuda", "slope_operands")),
    *_rows("rmm", "random sketches", cuda=("rmm_cuda", "rmm_hadamard")),
    *_rows("random_ltd", "token dropping", cuda=("random_ltd_cuda",)),
    *_rows("rotary", "rotary position embedding", cuda=("rotary_cuda",)),
    *_rows("mkor", "rank-1 updates of inverse factors", cuda=("mkor_cuda", "mkor_rescale")),
    OpSpec(
        "lgreco_planner",
        "cpu",
        ("lgreco/planner_cpu.cpp",),
        "ds_efficient.op_builder.lgreco:LgrecoPlannerCPUBuilder",
        "L-GreCo's planner, C++",
    ),
    *_lgreco_rows("quantize", "quantisation of gradients"),
    *_lgreco_rows("topk", "largest entries of gradients"),
    *_lgreco_rows("orthonormal", "orthonormal columns of thin matrices"),
)

ALL_OPS: dict[str, OpSpec] = {spec.full_name: spec for spec in _SPECS}


def find_op(name: str, device: str) -> OpSpec:
    """The row of an op for a device; KeyError when there is none (a mistake in the program)."""
    return ALL_OPS[f"ds_efficient_{name}_{device}"]


def select_ops(names: list[str]) -> list[OpSpec]:
    """The rows that a user names, all of them for an empty list.

    Args:
        names: ``"keyed_random"`` (every device) or a full name such as ``"ds_efficient_keyed_random_cpu"``.

    Raises:
        OpBuildError: a name is unknown; with the nearest known ones.
    """
    chosen: dict[str, OpSpec] = {} if names else dict(ALL_OPS)
    known = sorted({spec.name for spec in ALL_OPS.values()} | set(ALL_OPS))
    for name in names:
        rows = {key: spec for key, spec in ALL_OPS.items() if name in (spec.name, key)}
        if not rows:
            close = difflib.get_close_matches(name, known, n=2)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise OpBuildError(f"unknown op {name!r}{hint} Known: {', '.join(known)}")
        chosen.update(rows)
    return list(chosen.values())
