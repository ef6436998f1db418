"""What a layer's gradient may be sent as, and what that costs in bytes.

An option is a compressor and its setting, as plain values, so that plans go into checkpoints and JSON. The
options of a layer follow from the configuration, the layer's shape and the number of ranks alone, so that
all ranks have the same list. Source: L-GreCo, arXiv 2210.17357, section 5 (ranges and steps); it knows one
compressor in a model, here "raw" is always among the options and ``"mixed"`` puts all compressors side by
side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias

import torch

from ds_efficient.errors import UserError
from ds_efficient.lgreco.compressors import QSGD, Raw, TopK
from ds_efficient.lgreco.config import MAX_BITS, MIN_BITS, LgrecoConfig
from ds_efficient.lgreco.powersgd import PowerSGD

AnyCompressor: TypeAlias = Raw | QSGD | TopK | PowerSGD

MOST_SETTINGS = 128  # of one compressor; a wider range gets larger steps
_TOPK_DENSITIES = (0.001, 0.1)  # beside ranks in "mixed": a tenth to ten times the default of "topk"
_TOPK_STEP = 0.001


class Option(NamedTuple):
    """One way to send a layer's gradient.

    Attributes:
        compressor: "raw", "powersgd", "qsgd" or "topk".
        setting: rank, bits or density; 0 for raw.
    """

    compressor: str
    setting: float

    @property
    def gathered(self) -> bool:
        """Whether every rank's payload goes to every rank, since it can be added up only after decompression.

        Quantised pieces are added up by one rank each and sent on quantised again.
        """
        return self.compressor == "topk"


RAW = Option("raw", 0)


def make_compressor(option: Option) -> AnyCompressor:
    """The compressor of an option.

    Raises:
        UserError: there is none of that name, or the setting is out of its range.
    """
    match option.compressor:
        case "raw":
            return Raw()
        case "powersgd":
            return PowerSGD(int(option.setting))
        case "qsgd":
            return QSGD(int(option.setting))
        case "topk":
            return TopK(option.setting)
    raise UserError(f"compressor {option.compressor!r} is not known; allowed: raw, powersgd, qsgd, topk")


def wire_bytes(
    option: Option, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, ranks: int = 2
) -> int:
    """Bytes that each rank sends for one gradient, rounded up.

    What is all-reduced counts 2 (N - 1) / N times, as in a ring, and so do quantised payloads, which are
    reduced and scattered, then gathered. The payloads of "topk" go to N - 1 ranks: they lose against the
    others as N grows.

    Args:
        option: how it is sent.
        shape: of the gradient on one rank.
        dtype: in which raw gradients and the values of "topk" are sent.
        ranks: of the data-parallel group, N; one rank counts as two, for a plan without a cluster.
    """
    size = make_compressor(option).nbytes(shape, dtype)
    ranks = max(2, ranks)
    return size * (ranks - 1) if option.gathered else -(-2 * (ranks - 1) * size // ranks)


def layer_options(
    config: LgrecoConfig, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, ranks: int = 2
) -> list[Option]:
    """Every way in which a layer may be sent: raw first, then those that are smaller than raw.

    Args:
        config: compressor, range, default and Accordion's settings.
        shape: of the gradient on one rank, at least two dimensions.
        dtype, ranks: as in `wire_bytes`.
    """
    raw = wire_bytes(RAW, shape, dtype, ranks=ranks)
    found = dict.fromkeys(_capped(option, shape) for option in _settings(config))
    return [RAW, *(one for one in found if wire_bytes(one, shape, dtype, ranks=ranks) < raw)]


def default_option(
    config: LgrecoConfig,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    ranks: int = 2,
    setting: float | None = None,
) -> Option:
    """The uniform setting on one layer: ranks at most that of the matrix, raw where that is not larger.

    Args:
        config: compressor and default.
        shape, dtype, ranks: as in `layer_options`, in whose list the result is.
        setting: instead of the configuration's default; its default or one of Accordion's settings.
    """
    option = _capped(Option(_main(config), config.default if setting is None else setting), shape)
    smaller = wire_bytes(option, shape, dtype, ranks=ranks) < wire_bytes(RAW, shape, dtype, ranks=ranks)
    return option if smaller else RAW


def _main(config: LgrecoConfig) -> str:
    """The compressor that the configuration's default is a setting of."""
    return "powersgd" if config.compressor == "mixed" else config.compressor


def _settings(config: LgrecoConfig) -> Iterator[Option]:
    low, high = config.range
    named = {config.default}
    if config.accordion.enabled:
        named |= {config.accordion.low, config.accordion.high}
    main = _main(config)
    if main == "topk":
        step = max(_exact(config.default) / 10, (_exact(high) - _exact(low)) / (MOST_SETTINGS - 1))
        values = set(_steps(low, high, step)) | {float(value) for value in named}
    else:
        step = Fraction(max(1, math.ceil((high - low) / MOST_SETTINGS)))
        values = set(_steps(low, high, step)) | named
    yield from (Option(main, value if main == "topk" else int(value)) for value in sorted(values))
    if config.compressor == "mixed":
        yield from (Option("qsgd", bits) for bits in range(MIN_BITS, MAX_BITS + 1))
        yield from (Option("topk", value) for value in _steps(*_TOPK_DENSITIES, _exact(_TOPK_STEP)))


def _steps(low: float, high: float, step: Fraction) -> list[float]:
    """Low, low + step and so on up to high, as the decimal numbers they would be written as, and high."""
    first, last = _exact(low), _exact(high)
    count = int((last - first) / step)
    return [*(round(float(first + i * step), 9) for i in range(count + 1)), float(high)]


def _exact(value: float) -> Fraction:
    return Fraction(str(value))


def _capped(option: Option, shape: Sequence[int]) -> Option:
    if option.compressor != "powersgd":
        return option
    return Option("powersgd", PowerSGD(int(option.setting)).columns(shape))
