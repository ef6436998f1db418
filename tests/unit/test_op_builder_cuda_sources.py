"""The check that compiles every CUDA source (tests/run.sh runs it by itself) can fail; an op builds."""

from __future__ import annotations

import ctypes

import compile_cuda
import pytest

from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import compile as compiler
from ds_efficient.op_builder import toolchain
from ds_efficient.op_builder.all_ops import ALL_OPS, CSRC
from ds_efficient.op_builder.arch import parse_arch_list


@pytest.fixture(autouse=True)
def nvcc() -> toolchain.Nvcc:
    try:
        found = toolchain.find_nvcc()
        found.check(parse_arch_list(";".join(compile_cuda.ARCHITECTURES)))
    except OpBuildError as error:
        pytest.skip(f"CUDA sources cannot be compiled here: {error}")
    return found


def test_a_broken_source_is_reported(tmp_path):
    (tmp_path / "broken.cu").write_text("__global__ void f() { undefined_name = 1; }\n")
    (failure,) = compile_cuda.compile_all(parse_arch_list("9.0a"), jobs=1, csrc=tmp_path)
    assert "broken.cu" in failure and "undefined_name" in failure


def test_every_cuda_source_belongs_to_an_op():
    listed = {path for spec in ALL_OPS.values() if spec.device == "cuda" for path in spec.source_paths()}
    assert set(CSRC.rglob("*.cu")) == listed


def test_cuda_op_builds_with_9_0a_and_exports_its_functions(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr(compiler, "visible_gpus", list)
    spec = ALL_OPS["ds_efficient_keyed_random_cuda"]
    built = compiler.build(spec)
    assert built.fresh and compiler.find_built(spec) == built.path
    assert ctypes.CDLL(str(built.path)).ds_efficient_keyed_random_version() == 1
