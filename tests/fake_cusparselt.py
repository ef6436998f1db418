"""A stand-in for libcusparseLt that computes on CPU memory, for tests without a GPU.

It reads descriptors, attributes and matrices from the addresses that it is given, as the library does, so a
wrong offset, leading dimension, order or size gives a wrong product. Compressed form: kept values row by row,
then one nibble for each group of four (bit i: position i is kept).
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_efficient.ops import cusparselt_cache as caches
from ds_efficient.ops import cusparselt_library as lt
from ds_efficient.ops import cusparselt_operand as operands
from ds_efficient.ops import cusparselt_plans as plans
from ds_efficient.ops import cusparselt_probe as probes
from ds_efficient.ops.cusparselt_multiply import multiply

INVALID, NOT_SUPPORTED = 3, 10
DTYPES = {number: dtype for dtype, number in lt.DATA_TYPES.items()}
DEFAULT = {lt.ALG_CONFIG_ID: 0, lt.ALG_CONFIG_MAX_ID: 20, lt.SEARCH_ITERATIONS: 10, lt.SPLIT_K: 1,
           lt.SPLIT_K_MODE: 0, lt.SPLIT_K_BUFFERS: 0}  # fmt: skip
FOUND = {lt.ALG_CONFIG_ID: 7, lt.SPLIT_K: 2, lt.SPLIT_K_MODE: 1, lt.SPLIT_K_BUFFERS: 1}


def method(name: str) -> str:
    """Name of the method of `FakeLt` that stands for a C function."""
    return "_" + re.sub("(?<=[a-z])(?=[A-Z])", "_", name.removeprefix("cusparseLt")).lower()


class Function:
    """A C function: callable, with room for argtypes and restype; checks that all arguments are integers."""

    def __init__(self, name: str, run: Callable[..., int | None], calls: Counter[str], fail: dict) -> None:
        self.name, self.run, self.calls, self.fail = name, run, calls, fail

    def __call__(self, *arguments: object) -> int:
        self.calls[self.name] += 1
        signature = {**lt.SIGNATURES, **lt.OPTIONAL_SIGNATURES}[self.name]
        assert len(arguments) == len(signature), self.name
        assert all(isinstance(argument, int) for argument in arguments), (self.name, arguments)
        status = self.fail.get(self.name, 0)
        if callable(status):
            status = status(*arguments)
        return status or self.run(*arguments) or 0


def view(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """The elements at an address."""
    size = count * dtype.itemsize
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype)


class FakeLt:
    """The loaded library.

    Attributes:
        calls: number of calls of each function.
        fail: status, or a function from the arguments to a status, by function name.
        version: what cusparseLtGetProperty says.
        streams: streams of the products run.
        workspace: bytes that a plan asks for.
    """

    def __init__(self, version: tuple[int, int, int] = (0, 8, 1)) -> None:
        self.version, self.workspace = version, 0
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, Any] = {}
        self.streams: list[int] = []
        self.workspaces: list[int] = []
        self.described: dict[int, Any] = {}
        for name in (*lt.SIGNATURES, *lt.OPTIONAL_SIGNATURES):
            setattr(self, name, Function(name, getattr(self, method(name)), self.calls, self.fail))

    def _init(self, handle):
        self.described[handle] = "handle"

    def _get_property(self, part, address):
        ctypes.c_int.from_address(address).value = self.version[part]

    def _dense_descriptor_init(self, handle, address, rows, columns, ld, alignment, kind, order):
        assert self.described[handle] == "handle" and alignment == 16 and address % 16 == 0
        assert ld >= (rows if order == lt.ORDER_COL else columns)
        self.described[address] = (rows, columns, ld, DTYPES[kind], order)

    def _structured_descriptor_init(self, handle, address, rows, k, ld, alignment, kind, order, _):
        assert order == lt.ORDER_ROW and ld == k
        self._dense_descriptor_init(handle, address, rows, k, ld, alignment, kind, order)

    def _mat_descriptor_destroy(self, address):
        del self.described[address]

    def _matmul_descriptor_init(self, handle, address, op_a, op_b, a, b, c, d, compute):
        if compute != lt.COMPUTE_32F or op_a != lt.NON_TRANSPOSE:
            return NOT_SUPPORTED
        (rows, k, *_), (b_rows, b_columns, *_), (d_rows, d_columns, *_) = (
            self.described[descriptor] for descriptor in (a, b, d)
        )
        inner, columns = (b_columns, b_rows) if op_b == lt.TRANSPOSE else (b_rows, b_columns)
        assert c == d
        if (inner, columns) != (k, d_columns) or rows != d_rows:
            return INVALID
        self.described[address] = (self.described[a], self.described[b], op_b, self.described[d])

    def _matmul_alg_selection_init(self, handle, address, product, algorithm):
        self.described[address] = dict(DEFAULT)

    def _matmul_alg_selection_destroy(self, address):
        del self.described[address]

    def _matmul_alg_set_attribute(self, handle, address, attribute, data, size):
        assert size == 4
        self.described[address][attribute] = ctypes.c_int32.from_address(data).value

    def _matmul_alg_get_attribute(self, handle, address, attribute, data, size):
        assert size == 4
        ctypes.c_int32.from_address(data).value = self.described[address][attribute]

    def _matmul_plan_init(self, handle, plan, product, selection):
        # cuSPARSELt 0.8 crashes at a second initialisation of a plan, also after its end
        mark = ctypes.c_uint8.from_address(plan)
        assert mark.value == 0
        mark.value = 1
        self.described[plan] = (self.described[product], selection, dict(self.described[selection]))

    def _matmul_plan_destroy(self, plan):
        del self.described[plan]

    def _matmul_get_workspace(self, handle, plan, size):
        ctypes.c_size_t.from_address(size).value = self.workspace

    def _matmul(self, handle, plan, alpha, a, b, beta, c, d, workspace, streams, count):
        assert count == 1 and c == d and all(address % 16 == 0 for address in (a, b, d))
        assert ctypes.c_float.from_address(alpha).value == 1 and ctypes.c_float.from_address(beta).value == 0
        assert workspace or not self.workspace
        self.streams.append(ctypes.c_void_p.from_address(streams).value or 0)
        self.workspaces.append(workspace)
        (rows, k, _, dtype, _), dense, op, result = self.described[plan][0]
        left = decompress(a, rows, k, dtype)
        right = matrix(b, *dense)
        right = right.t() if op == lt.TRANSPOSE else right
        matrix(d, *result).copy_((left.float() @ right.float()).to(dtype))

    def _matmul_search(self, handle, plan, alpha, a, b, beta, c, d, workspace, streams, count):
        self.described[self.described[plan][1]].update(FOUND)
        matrix(d, *self.described[plan][0][3]).fill_(float("nan"))

    def _sp_mmacompressed_size2(self, handle, descriptor, size, scratch):
        rows, k, *_ = self.described[descriptor]
        ctypes.c_size_t.from_address(size).value = rows * k + rows * k // 8
        ctypes.c_size_t.from_address(scratch).value = 64

    def _sp_mmacompress2(self, handle, descriptor, is_a, op, dense, compressed, scratch, stream):
        assert is_a == 1 and op == lt.NON_TRANSPOSE and scratch
        rows, k, _, dtype, _ = self.described[descriptor]
        matrix = view(dense, rows * k, dtype).view(-1, 4)
        mask = matrix != 0
        view(compressed, rows * k // 2, dtype).copy_(matrix[mask])
        nibbles = (mask * torch.tensor([1, 2, 4, 8])).sum(1).to(torch.uint8).view(-1, 2)
        view(compressed + rows * k, rows * k // 8, torch.uint8).copy_(nibbles[:, 0] | nibbles[:, 1] << 4)


def matrix(address: int, rows: int, columns: int, ld: int, dtype: torch.dtype, order: int) -> Tensor:
    """A dense matrix as its descriptor says."""
    if order == lt.ORDER_COL:
        return view(address, ld * (columns - 1) + rows, dtype).as_strided((rows, columns), (1, ld))
    return view(address, ld * (rows - 1) + columns, dtype).as_strided((rows, columns), (ld, 1))


def decompress(address: int, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix of a compressed one."""
    packed = view(address + rows * k, rows * k // 8, torch.uint8)
    nibbles = torch.stack([packed & 15, packed >> 4], 1).view(-1, 1)
    mask = (nibbles >> torch.arange(4) & 1).bool()
    values = view(address, rows * k // 2, dtype)
    return torch.zeros(rows * k // 4, 4, dtype=dtype).masked_scatter(mask, values).view(rows, k)


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeLt, cache_file) -> lt.Library:
    """Make the package use the fake on the CPU, with no plan, no layout and nothing measured so far."""
    library = lt.Library(fake, "fake.so")
    monkeypatch.setattr(lt, "load", lambda: library)
    monkeypatch.setattr(lt, "device_guard", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(operands, "_get_device", None)
    monkeypatch.setattr(plans, "current_stream", lambda device: 0)
    for name in ("_plans", "_layouts", "_lanes"):
        monkeypatch.setattr(plans, name, {})
    monkeypatch.setattr(caches, "gpu_name", lambda device: "Fake GPU")
    monkeypatch.setattr(caches.cache, "_path", cache_file)
    monkeypatch.setattr(caches.cache, "_entries", {})
    monkeypatch.setattr(caches.cache, "_state", "unread")
    caches._machine.cache_clear()
    operands.find_layout.cache_clear()
    return library


def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a process remembers: what follows is like another process with the same cache file."""
    for name in ("_plans", "_lanes"):
        monkeypatch.setattr(plans, name, {})
    monkeypatch.setattr(caches.cache, "_entries", {})
    monkeypatch.setattr(caches.cache, "_state", "unread")
    operands.find_layout.cache_clear()


@pytest.fixture(name="fake")
def fake_library(monkeypatch: pytest.MonkeyPatch, tmp_path) -> FakeLt:
    """The package with a fake library, and a cache file of its own."""
    made = FakeLt()
    install(monkeypatch, made, tmp_path / "tuning.json")
    monkeypatch.setattr(plans, "SEARCH_MINIMUM", 1)
    return made


def make(rows: int, k: int, tiles: int = 1, dtype: torch.dtype = torch.bfloat16):
    """An operand with a random pattern, and that as a dense matrix."""
    operand = operands.SparseOperand(rows, k, dtype=dtype, device="cpu", tiles=tiles)
    pattern = probes.random_pattern(rows, k, dtype=dtype, device="cpu")
    operand.set_pattern(pattern)
    return operand, pattern


def inputs(tokens: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random x."""
    return probes.random_normal("x", (tokens, k), dtype=dtype, device="cpu")


def check(operand: operands.SparseOperand, dense: Tensor, tokens: int) -> None:
    """Multiply, and compare with the dense product."""
    x = inputs(tokens, operand.k, operand.dtype)
    y = multiply(operand, x)
    assert y.shape == (tokens, operand.rows) and y.is_contiguous() and y.dtype is operand.dtype
    error = probes.relative_error(y, x.double() @ dense.double().t())
    assert error < probes.TOLERANCES[operand.dtype]
