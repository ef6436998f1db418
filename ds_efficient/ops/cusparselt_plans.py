"""Plans of cuSPARSELt: the host work of a product, done once for each shape and kept for the process.

The product is D = S B with S (rows, k) 2:4 sparse, row-major, B (k, tokens) = x^T and D (rows, tokens)
column-major with leading dimension ``ld``: in memory that is y = x S^T, (tokens, ld) row-major, and with
``ld`` > ``rows`` a block of its columns. Sums are taken in float32.

Creating descriptors and plan on every call is what makes torch's own 2:4 linear layer slow.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_efficient.ops import cusparselt_library as lt
from ds_efficient.ops.cusparselt_library import Library, LtError, Opaque

logger = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes, of every pointer passed
SEARCH_ITERATIONS = 5  # runs of each algorithm in the library's search
SEARCH_MINIMUM = 256  # rows, k and tokens from which on a search is worth its time
# With float16, the search of version 0.8.0 on an H100 runs a kernel that ends in an illegal instruction,
# after which the process cannot use the GPU any more; there the library's default algorithm is used.
SEARCHED_DTYPES = (torch.bfloat16,)

_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)
_ALPHA, _BETA = ctypes.addressof(_ONE), ctypes.addressof(_ZERO)  # read on the host, by address
_SELECTED = (lt.ALG_CONFIG_ID, lt.SPLIT_K, lt.SPLIT_K_MODE, lt.SPLIT_K_BUFFERS)


class PlanShape(NamedTuple):
    """What a plan is made for.

    Attributes:
        device: index of the CUDA device.
        dtype: float16 or bfloat16.
        rows, k: shape of the sparse matrix.
        ld: elements from one token of the result to the next, >= rows.
        tokens: columns of the product.
    """

    device: int
    dtype: torch.dtype
    rows: int
    k: int
    ld: int
    tokens: int

    @property
    def text(self) -> str:
        """The shape in words; the device does not show."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.rows}x{self.k} ld {self.ld} tokens {self.tokens} {name}"


class Algorithm(NamedTuple):
    """What the library's search chose: the attributes of its selection."""

    config_id: int
    split_k: int
    split_k_mode: int
    split_k_buffers: int


class DenseLayout(NamedTuple):
    """One way of describing x, (tokens, k) row-major, as B: both name the same bytes."""

    transposed: bool

    def describe(self, shape: PlanShape) -> tuple[int, int, int, int]:
        """Rows, columns, leading dimension, order."""
        if self.transposed:
            return shape.tokens, shape.k, shape.k, lt.ORDER_ROW
        return shape.k, shape.tokens, shape.k, lt.ORDER_COL

    @property
    def operation(self) -> int:
        """Operation on B."""
        return lt.TRANSPOSE if self.transposed else lt.NON_TRANSPOSE


LAYOUTS = (DenseLayout(True), DenseLayout(False))
_layouts: dict[torch.dtype, DenseLayout] = {}


class Lane:
    """What a product needs of the stream that it runs on: one for each (device, stream), shared by all plans.

    Products on one stream run one after another, so they share one workspace.

    Attributes:
        streams: address of the array with the one stream.
        workspace: address, or 0.
        size: bytes of the workspace.
    """

    __slots__ = ("_array", "_device", "_tensors", "size", "streams", "workspace")

    def __init__(self, device: torch.device, stream: int) -> None:
        self._array = (ctypes.c_void_p * 1)(stream)
        self._device = device
        self._tensors: list[Tensor] = []
        self.streams = ctypes.addressof(self._array)
        self.workspace = self.size = 0

    def reserve(self, size: int) -> None:
        """Make the workspace at least ``size`` bytes."""
        # Smaller ones are kept: a captured CUDA graph may hold their addresses.
        tensor = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._tensors.append(tensor)
        self.workspace, self.size = tensor.data_ptr(), size


_lanes: dict[tuple[int, int], Lane] = {}
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # ten times faster than current_stream()


def current_stream(device: int) -> int:
    """Address of torch's current stream of a device."""
    if _raw_stream is not None:
        return _raw_stream(device)
    return torch.cuda.current_stream(device).cuda_stream


def current_lane(device: torch.device, index: int) -> Lane:
    """The lane of torch's current stream of a device (and its index, given for speed)."""
    stream = current_stream(index)
    lane = _lanes.get((index, stream))
    if lane is None:
        lane = _lanes.setdefault((index, stream), Lane(device, stream))
    return lane


def sparse_descriptor(library: Library, handle: int, shape: PlanShape) -> Opaque:
    """Descriptor of the sparse matrix; the caller destroys it."""
    descriptor = Opaque()
    library.call(
        "cusparseLtStructuredDescriptorInit", shape.text, handle, descriptor.address, shape.rows, shape.k,
        shape.k, ALIGNMENT, lt.DATA_TYPES[shape.dtype], lt.ORDER_ROW, lt.SPARSITY_50_PERCENT,
    )  # fmt: skip
    return descriptor


class Plan:
    """A product of one shape, ready to run.

    Args:
        library: the bound library.
        shape: what it is for.
        algorithm: what an earlier search chose, or None for the library's default.
        iterations: runs of each algorithm in `search`; None leaves the library's default, 10.

    Raises:
        LtError: the library refuses the shape or the algorithm.

    Attributes:
        workspace: bytes needed.
        algorithm: as given, or found by `search`.
    """

    def __init__(
        self,
        library: Library,
        shape: PlanShape,
        algorithm: Algorithm | None = None,
        *,
        iterations: int | None = None,
    ) -> None:
        self.shape, self.algorithm = shape, algorithm
        self._library = library
        self._handle = library.handle(shape.device)
        self._matmul: Any = library.cusparseLtMatmul  # type: ignore[attr-defined]
        self._iterations = iterations
        self._create()
        self._address = self._plan.address

    def run(self, operand: int, x: int, y: int, lane: Lane) -> None:
        """Queue the product on the lane's stream.

        Args:
            operand: address of the compressed matrix.
            x: address of x, (tokens, k).
            y: address of the result.
            lane: of the current stream; the plan's device is the current one.
        """
        if self.workspace > lane.size:
            lane.reserve(self.workspace)
        status = self._matmul(
            self._handle, self._address, _ALPHA, operand, x, _BETA, y, y, lane.workspace, lane.streams, 1
        )
        if status:
            raise LtError("cusparseLtMatmul", status, self.shape.text)

    def search(self, operand: int, x: int, y: int, lane: Lane) -> Algorithm:
        """Let the library time its algorithms, and use the fastest; overwrites y and waits for the GPU.

        Arguments as in `run`.
        """
        if self.workspace > lane.size:
            lane.reserve(self.workspace)
        self._library.call(
            "cusparseLtMatmulSearch", self.shape.text, self._handle, self._address, _ALPHA, operand, x, _BETA,
            y, y, lane.workspace, lane.streams, 1,
        )  # fmt: skip
        self.algorithm = Algorithm(*(self._read(attribute) for attribute in _SELECTED))
        self._read_workspace()
        return self.algorithm

    def destroy(self) -> None:
        """Free the library's structures, in the order of NVIDIA's samples; the GPU must have finished."""
        self._destroy_descriptors()
        self._library.call("cusparseLtMatmulPlanDestroy", self.shape.text, self._address)

    def _create(self) -> None:
        """Create descriptors and plan, with the layout of B that the library accepts for this dtype.

        The library does not bear a second initialisation of a plan, so each attempt has memory of its own.
        """
        decided = _layouts.get(self.shape.dtype)
        refusal: LtError | None = None
        for layout in LAYOUTS if decided is None else (decided,):
            self._plan = Opaque()
            try:
                self._create_descriptors(layout)
                if self.algorithm is not None:
                    self._select(self.algorithm)
                self._initialize()
            except LtError as error:
                refusal = refusal or error
                continue
            _layouts[self.shape.dtype] = layout
            return
        assert refusal is not None
        raise refusal

    def _create_descriptors(self, layout: DenseLayout) -> None:
        shape, handle, kind = self.shape, self._handle, lt.DATA_TYPES[self.shape.dtype]
        self._sparse = sparse_descriptor(self._library, handle, shape)
        self._dense, self._result, self._product = Opaque(), Opaque(), Opaque()
        self._selection = Opaque()
        call = self._library.call
        call(
            "cusparseLtDenseDescriptorInit", shape.text, handle, self._dense.address,
            *layout.describe(shape)[:3], ALIGNMENT, kind, layout.describe(shape)[3],
        )  # fmt: skip
        call(
            "cusparseLtDenseDescriptorInit", shape.text, handle, self._result.address, shape.rows,
            shape.tokens, shape.ld, ALIGNMENT, kind, lt.ORDER_COL,
        )  # fmt: skip
        call(
            "cusparseLtMatmulDescriptorInit", shape.text, handle, self._product.address, lt.NON_TRANSPOSE,
            layout.operation, self._sparse.address, self._dense.address, self._result.address,
            self._result.address, lt.COMPUTE_32F,
        )  # fmt: skip
        call(
            "cusparseLtMatmulAlgSelectionInit", shape.text, handle, self._selection.address,
            self._product.address, lt.ALG_DEFAULT,
        )  # fmt: skip
        if self._iterations is not None:
            self._write(lt.SEARCH_ITERATIONS, self._iterations)

    def _select(self, algorithm: Algorithm) -> None:
        """Take an earlier search's choice; only what differs from the library's own values is written."""
        largest = self._read(lt.ALG_CONFIG_MAX_ID)
        if largest > 0 and not 0 <= algorithm.config_id <= largest:
            raise LtError(f"algorithm {algorithm.config_id} (largest {largest})", 3, self.shape.text)
        self._write(lt.ALG_CONFIG_ID, algorithm.config_id)
        for attribute, value in zip(_SELECTED[1:], algorithm[1:], strict=True):
            if self._read(attribute) == value:
                continue
            try:
                self._write(attribute, value)
            except LtError as error:  # reported by the search, yet not always settable: it is a detail
                logger.debug("%s", error)

    def _initialize(self) -> None:
        self._library.call(
            "cusparseLtMatmulPlanInit", self.shape.text, self._handle, self._plan.address,
            self._product.address, self._selection.address,
        )  # fmt: skip
        self._read_workspace()

    def _read_workspace(self) -> None:
        size = ctypes.c_size_t(0)
        self._library.call(
            "cusparseLtMatmulGetWorkspace", self.shape.text, self._handle, self._plan.address,
            ctypes.addressof(size),
        )  # fmt: skip
        self.workspace = size.value

    def _read(self, attribute: int) -> int:
        value = ctypes.c_int32(0)
        self._library.call(
            "cusparseLtMatmulAlgGetAttribute", self.shape.text, self._handle, self._selection.address,
            attribute, ctypes.addressof(value), ctypes.sizeof(value),
        )  # fmt: skip
        return value.value

    def _write(self, attribute: int, number: int) -> None:
        value = ctypes.c_int32(number)
        self._library.call(
            "cusparseLtMatmulAlgSetAttribute", self.shape.text, self._handle, self._selection.address,
            attribute, ctypes.addressof(value), ctypes.sizeof(value),
        )  # fmt: skip

    def _destroy_descriptors(self) -> None:
        about = self.shape.text
        for descriptor in (self._sparse, self._dense, self._result):
            self._library.call("cusparseLtMatDescriptorDestroy", about, descriptor.address)
        if self._library.cusparseLtMatmulAlgSelectionDestroy is not None:  # type: ignore[attr-defined]
            self._library.call("cusparseLtMatmulAlgSelectionDestroy", about, self._selection.address)


_plans: dict[PlanShape, Plan] = {}
_lock = threading.Lock()  # forward and backward run on different threads


def find_plan(shape: PlanShape, algorithm: Algorithm | None) -> Plan:
    """The process's plan for a shape, created on first use.

    Args:
        shape: what it is for.
        algorithm: used if the plan has to be created and the library still knows it.
    """
    with _lock:
        plan = _plans.get(shape)
        if plan is None:
            plan = _plans[shape] = create_plan(shape, algorithm)
        return plan


def replace_plan(shape: PlanShape, algorithm: Algorithm) -> Plan:
    """Put a plan with another algorithm in the place of what `find_plan` gives.

    The old one is not destroyed: another thread may be queueing it.
    """
    with _lock:
        plan = _plans[shape] = create_plan(shape, algorithm)
        return plan


def create_plan(shape: PlanShape, algorithm: Algorithm | None) -> Plan:
    """A new plan; where the library does not take the algorithm, with its default and `algorithm` None."""
    library = lt.load()
    if algorithm is not None:
        try:
            return Plan(library, shape, algorithm)
        except LtError as error:
            logger.info("cuSPARSELt does not take the algorithm kept for %s: %s", shape.text, error)
    return Plan(library, shape)


def search(shape: PlanShape, operand: int, x: int, y: int, lane: Lane) -> Algorithm | None:
    """The library's fastest algorithm for a shape, or None for its default: where it is not searched (see
    `SEARCHED_DTYPES`), or the search fails (which is logged).

    Arguments as in `Plan.search`.
    """
    if shape.dtype not in SEARCHED_DTYPES or min(shape.rows, shape.k, shape.tokens) < SEARCH_MINIMUM:
        return None
    plan = Plan(lt.load(), shape, iterations=SEARCH_ITERATIONS)
    try:
        return plan.search(operand, x, y, lane)
    except LtError as error:
        logger.warning("cuSPARSELt's search of an algorithm failed, its default is used: %s", error)
        return None
    finally:
        plan.destroy()
