"""Op builder: builds once, rebuilds on change, and every failure is one readable message."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ds_efficient.commands import env, prebuild
from ds_efficient.errors import OpBuildError
from ds_efficient.op_builder import all_ops, inventory, toolchain
from ds_efficient.op_builder import compile as compiler
from ds_efficient.op_builder.all_ops import ALL_OPS, OpSpec, find_op, select_ops
from ds_efficient.op_builder.locks import LockTimes


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty kernel cache, and an environment without settings for compilers."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def spec(tmp_path) -> OpSpec:
    """A small op of its own sources."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 41\n")
    (folder / "op.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    return OpSpec("answer", "cpu", (str(folder / "op.cpp"),), "none:none", "a test", include=(str(folder),))


def fake_compiler(tmp_path: Path, body: str) -> str:
    """A compiler that notes each call and then runs ``body``."""
    path = tmp_path / "fake-cxx"
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def wait_for(folder: Path) -> str:
    return f"while [ ! -e {folder}/go ]; do sleep 0.05; done"


def build_in_processes(spec: OpSpec, count: int, go: Path) -> list[object]:
    """Build in several processes; once all are on their way, make ``go``: the fake compiler waits for it."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    barrier = context.Barrier(count + 1)

    def work() -> None:
        barrier.wait()
        try:
            queue.put(compiler.build(spec, times=LockTimes(poll=0.02)).fresh)
        except OpBuildError as error:
            queue.put(str(error))

    processes = [context.Process(target=work) for _ in range(count)]
    [process.start() for process in processes]
    barrier.wait()
    time.sleep(1)
    go.touch()
    results = [queue.get() for _ in processes]
    [process.join() for process in processes]
    return results


def test_four_processes_build_once(cache, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f'{wait_for(tmp_path)}; exec c++ "$@"'))
    assert sorted(build_in_processes(spec, 4, tmp_path / "go")) == [False, False, False, True]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2  # one compiles, one links
    history = list(cache.rglob("history.log"))
    assert len(history) == 1 and len(history[0].read_text().splitlines()) == 1
    assert not list(cache.rglob("lock")) and not list(cache.rglob("work-*"))


def test_a_failing_build_fails_once_and_tells_every_process(cache, spec, tmp_path, monkeypatch):
    failing = f"{wait_for(tmp_path)}; echo 'op.cpp:1: error: no such thing'; exit 1"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, failing))
    results = build_in_processes(spec, 4, tmp_path / "go")
    assert all("no such thing" in text and "build.log" in text for text in results)
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_second_build_finds_the_first_and_an_edit_builds_anew(cache, spec):
    first = compiler.build(spec)
    assert first.fresh and compiler.load(spec).answer() == 41
    again = compiler.build(spec)
    assert not again.fresh and again.path == first.path == compiler.find_built(spec)
    spec.include_dirs()[0].joinpath("answer.h").write_text("#define ANSWER 42\n")
    assert compiler.find_built(spec) is None
    assert compiler.load(spec).answer() == 42
    other_flags = dataclasses.replace(spec, cxx_flags=("-DX",))
    assert compiler.find_built(other_flags) is None


def test_folder_names_python_torch_and_cuda_versions_under_the_set_cache(cache, spec):
    tag = compiler.build(spec).path.relative_to(cache).parts[1]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    assert tag.startswith(f"{python}_torch{torch.__version__.split('+')[0]}_")
    assert tag.endswith("cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", ""))


def test_build_after_a_killed_builder_takes_over(cache, spec, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "sleep 60"))
    process = multiprocessing.get_context("fork").Process(target=_build_as_group_leader, args=(spec,))
    process.start()
    while not (tmp_path / "calls").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert len(list(cache.rglob("lock"))) == 1
    monkeypatch.setattr(toolchain, "find_cxx", lambda: ["c++"])
    started = time.monotonic()
    with caplog.at_level("WARNING"):
        assert compiler.build(spec).fresh
    assert time.monotonic() - started < 20
    assert f"process {process.pid}" in caplog.text


def _build_as_group_leader(spec: OpSpec) -> None:
    os.setsid()
    compiler.build(spec)


# ---- messages ----


def test_compile_error_names_the_line_and_the_log(cache, spec):
    spec.source_paths()[0].write_text("int f() { return undefined_name; }\n")
    with pytest.raises(
        OpBuildError, match=r"answer_cpu does not compile(.|\n)*undefined_name(.|\n)*build\.log"
    ) as caught:
        compiler.build(spec)
    log = Path(str(caught.value).rsplit(": ", 1)[1])
    assert "undefined_name" in log.read_text()


def test_no_compiler(cache, spec, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OpBuildError, match=r"no C\+\+ compiler(.|\n)*install(.|\n)*backend=.reference"):
        compiler.build(spec)
    assert "no C++ compiler" in compiler.why_not(spec)


def test_compiler_that_is_not_there(cache, spec, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-c++")
    with pytest.raises(OpBuildError, match="CXX='no-such-c\\+\\+'"):
        compiler.build(spec)


def test_no_nvcc(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(toolchain, "_USUAL_NVCC", (tmp_path / "nvcc",))
    monkeypatch.setattr(toolchain, "nvidia_packages", list)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    with pytest.raises(OpBuildError, match=r"no CUDA compiler(.|\n)*CUDA_HOME"):
        compiler.build(find_op("keyed_random", "cuda"))


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_cuda_home_that_holds_no_toolkit(cache, monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(OpBuildError, match=f"{variable}='{tmp_path}' has no bin/nvcc"):
        toolchain.find_nvcc()


def test_nvcc_that_does_not_run(cache, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("not a program")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(OpBuildError, match="does not run"):
        toolchain.find_nvcc()


def test_unwritable_cache_names_the_variable(cache, spec, monkeypatch):
    cache.write_text("a file where the folder should be")
    with pytest.raises(
        OpBuildError, match=f"cannot write the kernel cache {cache}(.|\n)*TORCH_EXTENSIONS_DIR"
    ):
        compiler.build(spec)


def test_library_that_does_not_load(cache, spec):
    path = compiler.build(spec).path
    path.write_bytes(b"not a library")
    with pytest.raises(OpBuildError, match=f"does not load(.|\n)*remove {path.parent}"):
        compiler.load(spec)


def test_no_architecture(cache, monkeypatch):
    monkeypatch.setattr(compiler, "visible_gpus", list)
    with pytest.raises(OpBuildError, match=r"no CUDA architecture(.|\n)*TORCH_CUDA_ARCH_LIST(.|\n)*--arch"):
        compiler.build(find_op("keyed_random", "cuda"))


# ---- table and builders ----


def test_table_names_existing_sources_with_the_prefix():
    for name, spec in ALL_OPS.items():
        assert name.startswith("ds_efficient_") and name == spec.full_name
        assert all(path.is_absolute() and path.is_file() for path in spec.source_paths())
        assert all(path.is_dir() for path in spec.include_dirs())


def test_sources_are_free_of_torch_and_python_headers():
    for spec in ALL_OPS.values():
        for path in [
            *spec.source_paths(),
            *(p for folder in spec.include_dirs() for p in folder.rglob("*.h")),
        ]:
            text = path.read_text()
            assert not any(word in text for word in ("torch/", "ATen", "c10/", "Python.h", "pybind"))


def test_unknown_op_names_the_nearest():
    with pytest.raises(OpBuildError, match=r"unknown op 'keyed_rand'; did you mean keyed_random"):
        select_ops(["keyed_rand"])
    assert {spec.device for spec in select_ops(["keyed_random"])} == {"cpu", "cuda"}


def test_builders_have_deepspeeds_interface(monkeypatch):
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder, OpBuilder

    from ds_efficient.op_builder.builder import create_builder

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    before = dict(os.environ)
    for name, spec in ALL_OPS.items():
        builder = create_builder(spec)
        assert isinstance(builder, OpBuilder) and builder.name == name == builder.NAME
        assert builder.BUILD_VAR == "DS_BUILD_" + name.upper()
        assert isinstance(builder, CUDAOpBuilder) == (spec.device == "cuda")
        assert all(
            Path(source).is_file() for source in builder.sources() + builder.include_paths() if "." in source
        )
        flags = builder.cxx_args() + (builder.nvcc_args() if spec.device == "cuda" else [])
        assert not any(flag.startswith(("-std", "--std")) or "fast" in flag for flag in flags)
        assert spec.device != "cuda" or "arch=compute_90a,code=sm_90a" in flags
        with pytest.raises(OpBuildError, match="ds_efficient prebuild"):
            builder.builder()
    assert dict(os.environ) == before
    cpu = create_builder(find_op("keyed_random", "cpu"))
    assert cpu.is_compatible() and cpu.load().ds_efficient_keyed_random_version() == 1
    monkeypatch.setenv("CXX", "no-such-c++")
    assert not cpu.is_compatible() and "no-such-c++" in cpu.error_log


def test_using_an_op_imports_no_deepspeed():
    code = "import sys, ds_efficient.ops.keyed_random as k; k.normal(1, 2); print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# ---- commands ----


def command(module, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    args = parser.parse_args(arguments)
    return args.run(args)


def test_env_reports_versions_ops_and_locks(cache, capsys, monkeypatch):
    stale = cache / "py311_cu130" / "fused_adam" / "lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    for path in (stale, stale.parent):
        os.utime(path, (time.time() - 7200,) * 2)
    monkeypatch.setattr(compiler, "visible_gpus", list)
    assert command(env, "env", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["ops"][0]["state"] == "buildable" and report["ops"][1]["state"] == "unavailable"
    assert report["locks"] == [
        {"of": "torch", "path": str(stale), "age_seconds": pytest.approx(7200, abs=60),
         "state": "no heartbeat", "pid": None, "host": "unknown"}
    ]  # fmt: skip
    assert command(env, "env") == 0
    text = capsys.readouterr().out
    assert str(stale) in text and re.search(r"72\d\d s old", text) and "--clean-stale-locks" in text
    assert "ds_efficient_keyed_random_cpu" in text and "no CUDA architecture" in text


@pytest.fixture
def small_table(spec, monkeypatch) -> OpSpec:
    """A table of the small CPU op and the CUDA op, on a machine without a GPU."""
    cuda = find_op("keyed_random", "cuda")
    monkeypatch.setattr(all_ops, "ALL_OPS", {spec.full_name: spec, cuda.full_name: cuda})
    monkeypatch.setattr(compiler, "visible_gpus", list)
    return spec


def test_prebuild_builds_then_finds_and_env_says_built(cache, small_table, capsys):
    assert inventory.op_state(small_table).state == "buildable"
    assert command(prebuild, "prebuild") == 0
    out = capsys.readouterr().out
    assert "[1/2] ds_efficient_answer_cpu: built in " in out
    assert "[2/2] ds_efficient_keyed_random_cuda: left out: no CUDA architecture" in out
    assert command(prebuild, "prebuild", "answer") == 0
    assert "already there" in capsys.readouterr().out
    assert inventory.op_state(small_table).state == "built"


def test_prebuild_of_what_cannot_be_built_fails_by_name(cache, monkeypatch):
    monkeypatch.setattr(compiler, "visible_gpus", list)
    with pytest.raises(OpBuildError, match="no CUDA architecture"):
        command(prebuild, "prebuild", "ds_efficient_keyed_random_cuda")
    with pytest.raises(OpBuildError, match="--arch='9'"):
        command(prebuild, "prebuild", "--arch", "9")
    with pytest.raises(OpBuildError, match="unknown op"):
        command(prebuild, "prebuild", "nothing")


def test_prebuild_removes_stale_locks_and_spares_held_ones(cache, capsys, small_table):
    folder = cache / "ds_efficient" / "py311_torch2.13.0_cpu" / "answer_cpu-0"
    torch_folder = cache / "py311_cpu" / "fused_adam"
    busy = cache / "py311_cpu" / "quantizer"
    for place in (folder, torch_folder, busy):
        place.mkdir(parents=True)
        (place / "lock").touch()
    (folder / "work-x").mkdir()
    for path in (folder / "lock", torch_folder / "lock", torch_folder):
        os.utime(path, (time.time() - 7200,) * 2)
    assert command(prebuild, "prebuild", "answer", "--clean-stale-locks") == 0
    out = capsys.readouterr().out
    assert (
        f"removed the stale lock {folder / 'lock'}" in out
        and f"removed the stale lock {torch_folder / 'lock'}" in out
    )
    assert (
        not (folder / "lock").exists()
        and not (folder / "work-x").exists()
        and not (torch_folder / "lock").exists()
    )
    assert (busy / "lock").exists()


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("0.16.1", "tested"),
        ("0.17.0", "tested"),
        ("0.19.2", "tested"),
        ("0.15.0", "outside"),
        ("0.20.0", "outside"),
    ],
)
def test_env_judges_megatron_core_by_the_tested_range(version, text):
    assert text in env._megatron(version)


def test_env_tells_the_web_toolkit_apex_from_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "not NVIDIA's" in env._apex()
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    assert env._apex().endswith("(NVIDIA's)")
