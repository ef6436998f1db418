"""CUDA architectures: lists, flags, what runs where, and which build a node picks."""

from __future__ import annotations

import pytest

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import compile as compiler
from ds_efficient.op_builder import toolchain
from ds_efficient.op_builder.all_ops import find_op
from ds_efficient.op_builder.arch import Arch, archs_of_devices, check_devices, gencode_flags, parse_arch_list

H100 = ("NVIDIA H100 80GB HBM3", (9, 0))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("9.0a", [Arch(9, 0, "a")]),
        ("8.0;9.0a+PTX", [Arch(8, 0), Arch(9, 0, "a", True)]),
        (" 9.0 8.6, 8.6 ", [Arch(8, 6), Arch(9, 0)]),
        ("10.0a;12.0f", [Arch(10, 0, "a"), Arch(12, 0, "f")]),
    ],
)
def test_architecture_lists(text, parsed):
    assert list(parse_arch_list(text)) == parsed


@pytest.mark.parametrize("text", ["9", "sm_90", "9.0b", "9.0+ptx", "8.0;Hopper", ";", "9.00"])
def test_malformed_architecture_lists_are_named(text):
    with pytest.raises(
        OpBuildError, match=r'TORCH_CUDA_ARCH_LIST=(.|\n)*is not a CUDA architecture(.|\n)*"9.0a"'
    ):
        parse_arch_list(text)


def test_gencode_flags():
    flags = " ".join(gencode_flags(parse_arch_list("8.0;9.0a+PTX")))
    assert flags == (
        "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a "
        "-gencode arch=compute_90a,code=compute_90a"
    )


@pytest.mark.parametrize(
    ("entry", "capability", "serves"),
    [
        ("8.0", (8, 0), True), ("8.0", (8, 6), True), ("8.6", (8, 0), False), ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True), ("9.0a", (9, 0), True), ("9.0a+PTX", (10, 0), False),
        ("9.0", (9, 0), True),
        ("10.0f", (10, 3), True), ("10.0a", (10, 3), False),
    ],
)  # fmt: skip
def test_which_gpus_an_entry_serves(entry, capability, serves):
    assert parse_arch_list(entry)[0].serves(capability) is serves


def test_list_without_code_for_a_gpu_names_gpu_and_entry(cache, monkeypatch):
    monkeypatch.setattr(compiler, "visible_gpus", lambda: [H100])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    with pytest.raises(OpBuildError, match=r'no code for the GPU NVIDIA H100(.|\n)*write "8.0;9.0a"'):
        compiler.target_archs()
    check_devices(parse_arch_list("8.0;9.0a"), [H100], source="x")


def test_old_nvcc_is_named_with_what_it_knows():
    old = toolchain.Nvcc("/opt/cuda/bin/nvcc", (11, 8), frozenset({"80", "90"}))
    old.check(parse_arch_list("8.0;9.0+PTX"))
    for text in ("9.0a", "10.0"):
        with pytest.raises(
            OpBuildError, match=r"/opt/cuda/bin/nvcc \(CUDA 11.8\) cannot compile for .*knows 8.0, 9.0"
        ):
            old.check(parse_arch_list(text))


def test_visible_gpus_decide_without_a_list(cache, monkeypatch):
    monkeypatch.setattr(compiler, "visible_gpus", lambda: [H100, H100, ("A100", (8, 0))])
    assert compiler.target_archs() == parse_arch_list("8.0;9.0a") == archs_of_devices([(9, 0), (8, 0)])


def test_one_prebuild_for_several_architectures_is_found_by_every_node(cache, monkeypatch):
    spec = find_op("keyed_random", "cuda")
    folder = compiler._folder(spec, parse_arch_list("8.0;9.0a+PTX"))
    folder.mkdir(parents=True)
    (folder / f"{spec.full_name}.so").write_bytes(b"")
    for gpus, found in (
        ([H100], True),
        ([("A100", (8, 0)), H100], True),
        ([("B200", (10, 0))], False),
        ([], False),
    ):
        monkeypatch.setattr(compiler, "visible_gpus", lambda gpus=gpus: gpus)
        assert (compiler.find_built(spec) is not None) is found
