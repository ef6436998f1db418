"""Launches that begin early (csrc/common/launch.h), compiled for the host: who may, and who has to wait."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys

import cuda_host
import pytest

from ds_efficient.op_builder.all_ops import OpSpec

SOURCE = """
#include "launch.h"

namespace {
namespace launches = ds_efficient::launches;

__global__ void count_all(int* count) {
  launches::wait_for_previous();
  ++*count;
}

__global__ void count_some(int* count) {
  if (threadIdx.x == 5) return;
  launches::wait_for_previous();
  ++*count;
}

template <auto kKernel>
int ask(int device, int compiled_for) {
  host::compiled_for = compiled_for;
  bool early = false;
  const int error = launches::begins_early<kKernel>(device, &early);
  host::compiled_for = 90;
  return error == cudaSuccess ? early : -1;
}
}  // namespace

extern "C" {
int ask_all(int device, int compiled_for) { return ask<count_all>(device, compiled_for); }
int ask_some(int device, int compiled_for) { return ask<count_some>(device, compiled_for); }

int run(int waits, int compiled_for) {
  int count = 0;
  host::compiled_for = compiled_for;
  const int error = waits ? launches::launch_after<count_all>(2, 32, 0, nullptr, &count)
                          : launches::launch_after<count_some>(2, 32, 0, nullptr, &count);
  return error == cudaSuccess ? count : -1;
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("launches")
    source = folder / "probe.cu"
    source.write_text(SOURCE)
    spec = OpSpec("probe", "cuda", (str(source),), "none", "launches for a test")
    return cuda_host.build(spec, folder)


def run(library: ctypes.CDLL, *, waits: bool, compiled_for: int) -> subprocess.CompletedProcess[str]:
    """Launch 64 threads in another process, as what they do wrong ends it."""
    code = f"import ctypes; print(ctypes.CDLL({library._name!r}).run({int(waits)}, {compiled_for}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_code_of_an_older_architecture_never_begins_early_whatever_the_device(library):
    assert library.ask_all(0, 80) == 0
    assert library.ask_all(1, 90) == 1
    assert library.ask_all(2, 100) == 1


def test_the_answer_is_kept_for_each_kernel_and_device(library):
    assert library.ask_all(3, 80) == 0
    assert library.ask_some(3, 90) == 1
    assert library.ask_all(3, 90) == 0
    assert library.ask_some(3, 80) == 1


def test_devices_that_are_not_kept_are_asked_again(library):
    assert [library.ask_all(device, ptx) for device in (64, -1) for ptx in (80, 90)] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("waits", "compiled_for", "counted"), [(True, 90, 64), (True, 80, 64), (False, 80, 62)]
)
def test_launches_run_every_thread(library, waits, compiled_for, counted):
    assert run(library, waits=waits, compiled_for=compiled_for).stdout == f"{counted}\n"


def test_a_thread_that_returns_without_waiting_is_refused_where_it_began_early(library):
    refused = run(library, waits=False, compiled_for=90)
    assert refused.returncode == -signal.SIGABRT
    assert "has not waited" in refused.stderr
