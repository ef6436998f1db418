"""Compile every CUDA source with nvcc for every supported architecture; needs neither a GPU nor CUDA torch.

``python tests/compile_cuda.py [--arch 8.0 9.0a 10.0] [--jobs 2]``; exit status 1 when a file does not
compile, 2 without nvcc.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder.all_ops import CSRC
from ds_efficient.op_builder.arch import Arch, gencode_flags, parse_arch_list
from ds_efficient.op_builder.compile import NVCC_FLAGS
from ds_efficient.op_builder.toolchain import find_nvcc

ARCHITECTURES = ("8.0", "9.0a", "10.0")


def compile_all(archs: Sequence[Arch], jobs: int, *, csrc: Path = CSRC) -> list[str]:
    """Compile every .cu below ``csrc``, warnings as errors; return the failures with their output."""
    nvcc = find_nvcc()
    nvcc.check(archs)
    sources = sorted(csrc.rglob("*.cu"))
    if not sources:
        return [f"no CUDA sources below {csrc}"]

    def one(source: Path) -> str | None:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            command = [
                nvcc.path,
                *NVCC_FLAGS,
                "--Werror",
                "all-warnings",
                *gencode_flags(archs),
                f"-I{CSRC / 'common'}",
            ]
            command += [f"-I{source.parent}", "-c", str(source), "-o", str(Path(folder, "out.o"))]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        verdict = "ok" if done.returncode == 0 else "FAILED"
        print(f"{source.relative_to(csrc)}: {verdict}, {time.monotonic() - start:.1f} s", flush=True)
        return None if done.returncode == 0 else f"{source}:\n{done.stdout}"

    with ThreadPoolExecutor(jobs) as pool:
        return [failure for failure in pool.map(one, sources) if failure]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Compile every CUDA source for every supported architecture."
    )
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(argv)
    try:
        failures = compile_all(parse_arch_list(";".join(args.arch), source="--arch"), args.jobs)
    except OpBuildError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(failures), file=sys.stderr, end="")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
