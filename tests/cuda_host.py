"""CUDA sources built for the host with tests/cuda_on_host, and tensors at odd addresses to run them on."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ds_efficient.op_builder import toolchain
from ds_efficient.op_builder.all_ops import OpSpec, find_op
from ds_efficient.ops.native import NativeLibrary

SHIM = Path(__file__).resolve().parent / "cuda_on_host"
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
GUARD = 16  # elements around a result that must stay as they were
WAIT = re.compile(r"#if .*\n.*griddepcontrol\.wait;.*\n#endif")  # of launch.h


def build(spec: OpSpec, folder: Path) -> ctypes.CDLL:
    """The library of an op, from the sources that nvcc compiles, with launches written as calls.

    Dynamic shared memory becomes a pointer. The wait for the kernel before becomes a note that the thread
    waited, which every thread of a launch that may begin early must have. Sources are compiled side by side.

    Args:
        spec: its CUDA row.
        folder: where files are written.
    """
    made, found = [], 0
    for source in spec.source_paths():
        text, launches = re.subn(
            r"(\w+(?:<[^<>()]*>)?)<<<(.+?)>>>\(", r"host::launch(\1, \2)(", source.read_text(), flags=re.S
        )
        assert "<<<" not in text
        text = re.sub(
            r"extern __shared__ (\w+) (\w+)\[\];",
            r"\1* const \2 = reinterpret_cast<\1*>(host::dynamic_memory());",
            text,
        )
        found += launches + text.count("launch_after<")
        made.append(folder / f"{source.stem}.cpp")
        made[-1].write_text(text)
    assert found
    for header in (path / "launch.h" for path in spec.include_dirs() if (path / "launch.h").is_file()):
        text, waits = WAIT.subn("  host::wait_for_previous();", header.read_text())
        assert waits == 1
        (folder / header.name).write_text(text)
    include = [f"-I{path}" for path in (folder, SHIM, *spec.include_dirs())]
    library, objects = folder / "kernels.so", [source.with_suffix(".o") for source in made]
    command = [*toolchain.find_cxx(), "-std=c++17", "-O1", "-fPIC"]
    running = [
        subprocess.Popen([*command, *include, "-c", str(source), "-o", str(target)])
        for source, target in zip(made, objects, strict=True)
    ]
    assert not any([compiler.wait() for compiler in running])
    subprocess.run([*command, "-shared", *map(str, objects), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


_Library = TypeVar("_Library", bound=NativeLibrary)


def on_host(library: type[_Library], folder: Path) -> _Library:
    """The functions of an op's CUDA library, built for the host, with host tensors.

    Args:
        library: its class, or one made from it.
        folder: where files are written.
    """
    built = build(find_op(library.OP, "cuda"), folder)
    made = library.__new__(library)
    made._library, made._cuda, made._functions = built, False, {}
    for name, arguments in library.SIGNATURES.items():
        function = getattr(built, f"{library.PREFIX}{name}")
        function.argtypes = (*arguments, ctypes.c_int, ctypes.c_void_p)
        made._functions[name] = _without_threads(function)
    return made


def _without_threads(function: Callable[..., int]) -> Callable[..., int]:
    return lambda *arguments: function(*arguments[:-1], 0, None)  # device and stream


class Guarded:
    """A tensor at an odd address between guards.

    Args:
        shape, dtype: of the tensor.
        offset: elements by which its start is moved from an aligned address.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, offset: int) -> None:
        self.buffer = torch.full((math.prod(shape) + 2 * GUARD + offset,), 77, dtype=dtype)
        self.start = GUARD + offset
        self.tensor = self.buffer[self.start : self.start + math.prod(shape)].view(shape)

    def intact(self) -> bool:
        """Whether nothing was written around the tensor."""
        end = self.start + self.tensor.numel()
        return bool((torch.cat((self.buffer[: self.start], self.buffer[end:])) == 77).all())

    def equals(self, expected: torch.Tensor) -> bool:
        """Whether the bits are these and the guards are intact."""
        view = INTEGER[expected.element_size()]
        return torch.equal(self.tensor.view(view), expected.view(view)) and self.intact()
