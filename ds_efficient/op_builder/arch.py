"""CUDA architectures: the list in TORCH_CUDA_ARCH_LIST, what a GPU needs, and nvcc's flags for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ds_efficient.errors import OpBuildError

_PATTERN = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


@dataclass(frozen=True, order=True)
class Arch:
    """One entry of an architecture list.

    Attributes:
        major, minor: compute capability.
        suffix: ``"a"`` or ``"f"`` for the instructions of one architecture or family only, else ``""``.
        ptx: whether PTX is embedded too, for later GPUs.
    """

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    @property
    def code(self) -> str:
        """For example ``"90a"``."""
        return f"{self.major}{self.minor}{self.suffix}"

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether code for this entry runs on a GPU of compute capability (major, minor)."""
        own = (self.major, self.minor)
        if self.suffix == "a":
            return capability == own
        if self.major == capability[0] and own <= capability:
            return True
        return self.ptx and not self.suffix and own <= capability

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"


def parse_arch_list(text: str, *, source: str = "TORCH_CUDA_ARCH_LIST") -> tuple[Arch, ...]:
    """Parse ``"8.0;9.0a+PTX"`` (separators: semicolon, comma or blank); sorted, without duplicates.

    Raises:
        OpBuildError: an entry is malformed, or there is none.
    """
    archs = set()
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = _PATTERN.fullmatch(entry)
        if match is None:
            raise OpBuildError(
                f"{source}={text!r}: {entry!r} is not a CUDA architecture; write compute capabilities such "
                'as "8.0", "9.0a" or "8.0;9.0a+PTX"'
            )
        major, minor, suffix, ptx = match.groups()
        archs.add(Arch(int(major), int(minor), suffix, ptx is not None))
    return tuple(sorted(archs))


def archs_of_devices(capabilities: Sequence[tuple[int, int]]) -> tuple[Arch, ...]:
    """The list for exactly these GPUs; from 9.0 on with architecture-specific instructions (``9.0a``)."""
    return tuple(sorted({Arch(major, minor, "a" if major >= 9 else "") for major, minor in capabilities}))


def gencode_flags(archs: Sequence[Arch]) -> list[str]:
    """nvcc's ``-gencode`` flags."""
    flags = []
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch.code},code=sm_{arch.code}"]
        if arch.ptx:
            flags += ["-gencode", f"arch=compute_{arch.code},code=compute_{arch.code}"]
    return flags


def check_devices(
    archs: Sequence[Arch], devices: Sequence[tuple[str, tuple[int, int]]], *, source: str
) -> None:
    """Refuse a list without code for one of the GPUs.

    Args:
        archs: the list.
        devices: name and compute capability of each visible GPU.
        source: where the list comes from, for the message.

    Raises:
        OpBuildError: names the GPU and the entry to add.
    """
    for name, capability in devices:
        if not any(arch.serves(capability) for arch in archs):
            listed = ";".join(map(str, archs))
            need = archs_of_devices([capability])[0]
            raise OpBuildError(
                f"{source}={listed!r} has no code for the GPU {name} (compute capability {capability[0]}."
                f'{capability[1]}); write "{listed};{need}", or unset it to build for the visible GPUs'
            )
