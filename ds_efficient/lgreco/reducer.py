"""`Reducer`: averages gradients over the ranks in place, compressed, with error feedback.

For a plain training loop; `ds_efficient.lgreco.technique` puts one into DeepSpeed's place of reduction::

    reducer = Reducer(group, default=QSGD(4), key=Key(seed, ("gradients",)))
    loss.backward()
    reducer.reduce({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    optimizer.step()
    reducer.commit()  # or reducer.rollback(), where the step was left out

Source: L-GreCo, arXiv 2210.17357; error feedback, arXiv 1901.09847.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ds_efficient.core.keys import Key
from ds_efficient.errors import UserError
from ds_efficient.lgreco import wire
from ds_efficient.lgreco.compressors import QSGD, SMALLEST, Raw, TopK, check_dtype, sent_raw
from ds_efficient.lgreco.feedback import ErrorFeedback
from ds_efficient.lgreco.options import AnyCompressor, Option, make_compressor
from ds_efficient.lgreco.powersgd import PowerSGD
from ds_efficient.lgreco.transport import Handle, TorchTransport, Transport

_IN_FLIGHT = 4  # collectives; more hide no more of the compression
_ELEMENTS = 1 << 22  # of the gradients that share a collective


class Reducer:
    """Averages gradients in place, each layer with its compressor.

    Vectors, scalars and gradients below ``smallest`` elements are all-reduced as they are, and so is what its
    compressor would not make smaller. After `reduce` all ranks hold the same bits.

    Args:
        group: process group, or None for all ranks.
        default: compressor of the layers that ``choices`` does not name.
        choices: compressor by name; the same on all ranks.
        key: of all random draws; the same on all ranks of the group, another one in every other group (of
            another pipeline stage or tensor-parallel shard).
        transport: instead of the group's own (`ds_efficient.lgreco.transport`).
        immediate: as in `ds_efficient.lgreco.ErrorFeedback`: half the memory, no `rollback`.
        smallest: elements below which a gradient is not compressed.

    Attributes:
        choices: may be replaced between two calls of `reduce`.
        transport: the ranks; ``transport.sent`` counts the bytes.
        raw_bytes: what this rank would have sent without compression, all calls together.
        compressed: gradients that were compressed, all calls together.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        default: AnyCompressor | None = None,
        choices: Mapping[str, AnyCompressor] | None = None,
        key: Key | None = None,
        transport: Transport | None = None,
        immediate: bool = False,
        smallest: int = SMALLEST,
    ) -> None:
        self.transport: Transport = TorchTransport(group) if transport is None else transport
        self.choices: dict[str, AnyCompressor] = dict(choices or {})
        self.raw_bytes = 0.0
        self.compressed = 0
        self._default: AnyCompressor = QSGD(4) if default is None else default
        self._key = Key(0, ("lgreco",)) if key is None else key
        self._smallest = smallest
        self._feedback = ErrorFeedback(immediate=immediate)
        self._q: dict[str, Tensor] = {}
        self._new_q: dict[str, Tensor] = {}
        self._healthy: list[tuple[list[str], Tensor]] = []
        self._scratch = wire.Scratch()
        self._active: deque[tuple[wire.Waits, Handle]] = deque()
        self._stream: torch.cuda.Stream | None = None
        self._steps = 0
        self._calls = 0

    def reduce(self, gradients: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
        """Replace each gradient by its mean over the ranks.

        Collective: all ranks pass the same names in the same order. Between two calls of `commit` a name may
        come only once where its compressor has error feedback.

        Args:
            gradients: float32, bfloat16 or float16, any shapes and strides, by name.
            scale: what the gradients are multiplied with (fp16); errors are kept without it.

        Raises:
            UserError: another dtype, or a sparse gradient.
            RuntimeError: the connection to another rank is lost (torch's message says which).
        """
        for _ in self.turns(gradients, scale=scale):
            pass

    def start(self, gradients: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
        """Begin to `reduce` gradients that are ready, while the backward pass makes others.

        All ranks start the same names in the same order, and then call `finish`; until then the gradients
        may be neither read nor changed. On a GPU this runs on a stream of its own.

        Args:
            gradients, scale: as in `reduce`.

        Raises:
            UserError: as in `reduce`.
        """
        with self._beside(gradients):
            for _ in self._begin(gradients, scale, None):
                pass

    def finish(self) -> None:
        """Leave the means in all gradients that were started."""
        with self._beside({}):
            while self._active:
                for _ in _advance(self._active):
                    pass
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    @contextlib.contextmanager
    def _beside(self, gradients: Mapping[str, Tensor]) -> Iterator[None]:
        """On a GPU, work on a stream of its own, behind what the current one has been given."""
        device = next((gradient.device for gradient in gradients.values()), None)
        if self._stream is None and device is not None and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def reduce_scatter(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's slice of each mean (`ds_efficient.lgreco.wire.slice_of`), flat.

        Only quantised gradients save by that; the others are averaged whole, in place, and then cut.

        Args:
            gradients: as in `reduce`.

        Raises:
            UserError: as in `reduce`.
        """
        slices: dict[str, Tensor] = {}
        for _ in self.turns(gradients, slices=slices):
            pass
        for name, gradient in gradients.items():
            if name not in slices:
                start, end = wire.slice_of(gradient.numel(), self.transport.rank, self.transport.ranks)
                slices[name] = gradient.reshape(-1)[start:end]
        return slices

    def turns(
        self,
        gradients: Mapping[str, Tensor],
        *,
        scale: float = 1.0,
        slices: dict[str, Tensor] | None = None,
    ) -> Iterator[None]:
        """Do as `reduce`, and yield before each wait for other ranks (`ds_efficient.lgreco.simulated`).

        Args:
            gradients, scale: as in `reduce`.
            slices: takes this rank's slices of what is quantised, whose gradients then stay as they are.
        """
        yield from self._begin(gradients, scale, slices)
        while self._active:
            yield from _advance(self._active)

    def _begin(
        self, gradients: Mapping[str, Tensor], scale: float, slices: dict[str, Tensor] | None
    ) -> Iterator[None]:
        self._calls += 1
        shared = wire.Shared(
            self.transport,
            self._feedback,
            self._key.fold("step", self._steps, self._calls),
            scale,
            self._healthy,
            self._scratch,
        )
        for job in self._jobs(shared, gradients, slices):
            while len(self._active) >= _IN_FLIGHT:
                yield from _advance(self._active)
            self._active.append((job, next(job)))

    def take(self, choices: Mapping[str, Option]) -> None:
        """Use these options (`ds_efficient.lgreco.CompressionPlan`) from now on; the same on all ranks."""
        self.choices = {name: make_compressor(option) for name, option in choices.items()}

    def commit(self) -> None:
        """Take the errors and factors of the step, which was taken. What is not finite is not taken."""
        if self._healthy:
            finite = torch.stack([flag for _, flag in self._healthy]).tolist()
            for (names, _), good in zip(self._healthy, finite, strict=True):
                if not good:
                    self._feedback.forget(names)
                    for name in names:
                        self._new_q.pop(name, None)
        self._feedback.commit()
        self._q.update(self._new_q)
        self._next_step()

    def rollback(self) -> None:
        """Forget what the step changed, which was left out (gradient overflow)."""
        self._feedback.rollback()
        self._next_step()

    def _next_step(self) -> None:
        self._new_q.clear()
        self._healthy.clear()
        self._steps += 1
        self._calls = 0

    def compressor_of(self, name: str, shape: Iterable[int], dtype: torch.dtype) -> AnyCompressor:
        """The compressor of a gradient; `Raw` where it would make nothing smaller."""
        size = tuple(shape)
        chosen = self.choices.get(name, self._default)
        if isinstance(chosen, Raw) or sent_raw(size, smallest=self._smallest):
            return Raw()
        return chosen if chosen.nbytes(size, dtype) < Raw().nbytes(size, dtype) else Raw()

    @property
    def nbytes(self) -> int:
        """Memory of errors and factors."""
        return self._feedback.nbytes + sum(q.nbytes for kept in (self._q, self._new_q) for q in kept.values())

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have in common: the factors and the number of steps."""
        return {"q": {name: q.clone() for name, q in self._q.items()}, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the errors are loaded by `load_errors`."""
        self._q = {name: q.detach().clone() for name, q in state["q"].items()}
        self._new_q.clear()
        self._healthy.clear()
        self._steps, self._calls = int(state["steps"]), 0

    def errors(self) -> dict[str, Tensor]:
        """This rank's errors by name, float32, in the units of unscaled gradients; the tensors themselves."""
        return self._feedback.state_dict()

    def load_errors(self, errors: Mapping[str, Tensor]) -> None:
        """Replace this rank's errors by copies of these.

        Raises:
            UserError: one is not float32.
        """
        self._feedback.load_state_dict(errors)

    def _jobs(
        self, shared: wire.Shared, gradients: Mapping[str, Tensor], slices: dict[str, Tensor] | None
    ) -> Iterator[wire.Waits]:
        for kind, items in self._grouped(gradients, shared.scale):
            for part in _cut(items):
                if kind is Raw:
                    yield wire.raw(shared, part)
                    continue
                self.compressed += len(part)
                if kind is TopK:
                    yield wire.largest(shared, part)
                elif kind is PowerSGD:
                    yield wire.low_rank(shared, part, self._start_q, self._new_q.__setitem__)
                else:
                    compressor = part[0].compressor
                    assert isinstance(compressor, QSGD)
                    if slices is None:
                        yield wire.quantised(shared, part, compressor)
                    else:
                        yield wire.quantised_slices(shared, part, compressor, slices)

    def _grouped(
        self, gradients: Mapping[str, Tensor], scale: float
    ) -> Iterator[tuple[type, list[wire.Item]]]:
        """Gradients that may share collectives, in the order of the first of each kind."""
        groups: dict[tuple[Any, ...], list[wire.Item]] = {}
        share = 2 * (self.transport.ranks - 1) / self.transport.ranks
        for name, gradient in gradients.items():
            if gradient.layout != torch.strided:
                raise UserError(f"{name}: its gradient is sparse; lgreco reduces dense gradients only")
            check_dtype(gradient.dtype)
            if not gradient.numel():
                continue
            compressor = self.compressor_of(name, gradient.shape, gradient.dtype)
            self.raw_bytes += share * gradient.nbytes
            setting = compressor if isinstance(compressor, QSGD) else None
            kind = (type(compressor), setting, gradient.dtype, gradient.device)
            if not isinstance(compressor, TopK | PowerSGD):
                self._feedback.release(name, gradient.detach(), scale=scale)
            groups.setdefault(kind, []).append(wire.Item(name, gradient.detach(), compressor))
        for kind, items in groups.items():
            yield kind[0], items

    def _start_q(self, item: wire.Item) -> Tensor:
        compressor, shape = item.compressor, item.gradient.shape
        assert isinstance(compressor, PowerSGD)
        key = self._key.fold("q", item.name)
        known = self._q.get(item.name)
        if known is None or known.shape[0] != math.prod(shape[1:]):
            return compressor.first_q(shape, key, device=item.gradient.device)
        return compressor.resized_q(known.to(item.gradient.device), shape, key)


def _advance(active: deque[tuple[wire.Waits, Handle]]) -> Iterator[None]:
    """Wait for the collective that was started first, and go on with what waits for it."""
    job, handle = active.popleft()
    yield
    handle.wait()
    following = next(job, None)
    if following is not None:
        active.append((job, following))


def _cut(items: list[wire.Item]) -> Iterator[list[wire.Item]]:
    part: list[wire.Item] = []
    elements = 0
    for item in items:
        if part and elements + item.gradient.numel() > _ELEMENTS:
            yield part
            part, elements = [], 0
        part.append(item)
        elements += item.gradient.numel()
    if part:
        yield part
