"""Finding and binding cuSPARSELt, and the bindings against the installed header and library."""

from __future__ import annotations

import ctypes
import os
import re

import pytest
import torch
from fake_cusparselt import FakeLt, fake_library  # noqa: F401

from ds_efficient.commands import env
from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import toolchain
from ds_efficient.ops import cusparselt as face
from ds_efficient.ops import cusparselt_cache as caches
from ds_efficient.ops import cusparselt_library as lt


def test_library_of_this_process_comes_before_packages_and_the_search_path(monkeypatch, tmp_path):
    folder = tmp_path / "cusparselt" / "lib"
    folder.mkdir(parents=True)
    (folder / lt.NAME).touch()
    monkeypatch.setattr(toolchain, "nvidia_packages", lambda: [tmp_path])
    tried: list[tuple[str, int]] = []

    def opens(last):
        def open_library(name, mode):
            tried.append((name, mode))
            if len(tried) < last:
                raise OSError("cannot open")
            return FakeLt()

        return open_library

    assert lt.find(opens(1)).path == lt.NAME and tried[0][1] & os.RTLD_NOLOAD
    tried.clear()
    assert lt.find(opens(2)).path == str(folder / lt.NAME)
    tried.clear()
    with pytest.raises(OpBuildError, match=r"not found .*cannot open.*pip install nvidia-cusparselt-cu1\d"):
        lt.find(opens(99))
    assert tried[-1] == (lt.NAME, os.RTLD_NOW)


@pytest.mark.parametrize(("cuda", "package"), [("12.8", "cu12"), ("13.0", "cu13"), (None, "cu12")])
def test_remedy_names_the_package_for_torchs_cuda(monkeypatch, cuda, package):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert f"nvidia-cusparselt-{package}`" in lt.remedy() and '"backend": "dense"' in lt.remedy()


@pytest.mark.parametrize(("version", "fine"), [
    ((0, 4, 0), False), ((0, 5, 1), False), ((0, 5, 2), True), ((0, 9, 9), True), ((1, 0, 0), False),
])  # fmt: skip
def test_versions(version, fine):
    if fine:
        assert lt.Library(FakeLt(version), "x.so").version == version
        return
    with pytest.raises(OpBuildError, match=r"x.so is cuSPARSELt .*supported: 0.5.2 and newer, below 1.0.0"):
        lt.Library(FakeLt(version), "x.so")


def test_library_without_a_function_is_refused_and_optional_ones_may_lack(fake):
    del fake.cusparseLtMatmulAlgSelectionDestroy
    library = lt.Library(fake, "old.so")
    assert library.cusparseLtMatmulAlgSelectionDestroy is None
    del fake.cusparseLtMatmul
    with pytest.raises(OpBuildError, match=r"old\.so has no function cusparseLtMatmul;"):
        lt.Library(fake, "old.so")


# The installed header and library


def header(name: str) -> str:
    for folder in toolchain.nvidia_packages():
        for path in sorted(folder.glob(f"*/include/{name}")):
            return path.read_text(errors="replace")
    pytest.skip(f"{name} is not installed (pip packages nvidia-cusparselt-cu*, nvidia-cusparse)")


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def enumerators(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for body in re.findall(r"enum\s*\w*\s*\{(.*?)\}", without_comments(text), re.DOTALL):
        value = -1
        for item in filter(None, (part.strip() for part in body.split(","))):
            name, _, given = (part.strip() for part in item.partition("="))
            if given and not re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", given):
                continue
            value = int(given, 0) if given else value + 1
            found[name] = value
    return found


def test_enumerators_equal_those_of_the_header():
    known = enumerators(header("cusparseLt.h"))
    prefix = "CUSPARSELT_MATMUL_"
    for name in ("ALG_CONFIG_ID", "ALG_CONFIG_MAX_ID", "SEARCH_ITERATIONS", "SPLIT_K", "SPLIT_K_MODE",
                 "SPLIT_K_BUFFERS", "ALG_DEFAULT"):  # fmt: skip
        assert getattr(lt, name) == known[prefix + name]
    assert known["CUSPARSELT_SPARSITY_50_PERCENT"] == lt.SPARSITY_50_PERCENT
    assert known["CUSPARSE_COMPUTE_32F"] == lt.COMPUTE_32F
    known = enumerators(header("cusparse.h"))
    assert (known["CUSPARSE_ORDER_COL"], known["CUSPARSE_ORDER_ROW"]) == (lt.ORDER_COL, lt.ORDER_ROW)
    assert known["CUSPARSE_OPERATION_NON_TRANSPOSE"] == lt.NON_TRANSPOSE
    assert known["CUSPARSE_OPERATION_TRANSPOSE"] == lt.TRANSPOSE
    for number, name in enumerate(lt._STATUS):
        assert known["CUSPARSE_STATUS_" + name] == number
    known = enumerators(header("library_types.h"))
    assert (known["CUDA_R_16F"], known["CUDA_R_16BF"]) == (lt.R_16F, lt.R_16BF)


def test_signatures_and_sizes_equal_those_of_the_header():
    text = without_comments(header("cusparseLt.h"))
    sizes = [int(size) for size in re.findall(r"uint8_t data\[(\d+)\]", text)]
    assert sizes and max(sizes) <= lt.OPAQUE_BYTES
    assert all(int(size) <= 64 for size in re.findall(r"alignas\((\d+)\)", text))
    plain = {"int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32, "int32_t": ctypes.c_int32,
             "size_t": ctypes.c_size_t, "cudaStream_t": ctypes.c_void_p}  # fmt: skip
    for name, ours in {**lt.SIGNATURES, **lt.OPTIONAL_SIGNATURES}.items():
        match = re.search(rf"\b{name}\s*\(([^)]*)\)", text)
        assert match, name
        theirs = []
        for parameter in match[1].split(","):
            kind = parameter.replace("const", "").split()[0]
            theirs.append(ctypes.c_void_p if "*" in parameter else plain.get(kind, ctypes.c_int))
        assert tuple(theirs) == tuple(ours), name


def test_installed_library_has_every_function():
    try:
        library = lt.find()
    except OpBuildError as error:
        pytest.skip(str(error))
    assert lt.OLDEST <= library.version < lt.BEFORE


def test_env_says_which_library_is_used_or_why_not(fake, monkeypatch):
    assert env._sparse_products() == {"cuSPARSELt": "not used: torch is a CPU build"} or torch.version.cuda
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(face, "unavailable", lambda device: f"no reason for {device}")
    found = env._sparse_products()
    assert found["cuSPARSELt"].startswith("0.8.1 (") and found["cuda:0"] == "no reason for cuda:0"
    assert found["measurements"] == str(caches.cache_path())

    def missing() -> lt.Library:
        raise OpBuildError("not found; install it")

    monkeypatch.setattr(lt, "load", missing)
    assert env._sparse_products() == {"cuSPARSELt": "unavailable: not found; install it"}
