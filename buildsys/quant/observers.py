"""Statistics of activations in one pass, without keeping the activations.

Two modes with one set of keys. `mllm`: the signed maximum and the order statistic at 0.999 n
of the signed values, as mllm v1's get_distribution.py computes them on everything at once (a
tensor whose negative side is larger gets too small a range; kept for parity). `absmax`: the
same of |x|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from buildsys.quant.errors import QuantError
from buildsys.quant.factored import spans

Mode = Literal["absmax", "mllm"]

# Until so many values have passed, all are kept: short runs need no bound on their length.
_KEEP_ALL = 1 << 16
# Without a bound on the length, so many times the values needed so far are kept.
_MARGIN = 4
# A value above the floor is rare: whole runs of so many are passed over by their maximum.
_RUN = 32
# Values per step of the float64 sums; 512 KiB of float64 stay in the cache.
_SUM_CHUNK = 1 << 16


@dataclass(frozen=True)
class Statistics:
    """What one tensor showed: the keys of mllm's scales file, and the number of values."""

    ori: float  # the maximum
    top_0_1: float  # the order statistic at index int(0.999 n) - 1, ascending
    mean: float
    std: float  # of the population
    count: int


def order_index(count: int) -> int:
    """Index, ascending and from 0, of mllm's `top_0_1` among `count` values.

    int(0.999 n) - 1 as mllm computes it; for n = 1, where that is -1, it is the last value, 0.
    """
    return max(int(count * 0.999) - 1, 0)


class Observer:
    """Running maximum, exact order statistic, mean and standard deviation of a stream.

    Invariant: `_kept` holds every value above `_floor`, and no value that was dropped is larger
    than `_floor`; so the order statistic is exact whenever enough values are kept. With
    `expected` (an upper bound on the number of values to come, in all) enough are always kept.
    Without it a multiple of what the stream has needed so far is kept, and `result` raises if
    the stream was so uneven that this did not suffice: it never guesses.
    """

    def __init__(self, mode: Mode = "absmax", *, expected: int | None = None) -> None:
        if mode not in ("absmax", "mllm"):
            raise QuantError(f"statistics: {mode!r} is unknown; use absmax or mllm")
        self._mode = mode
        self._expected = expected
        self._kept: list[Tensor] = []
        self._kept_count = 0
        self._floor = -math.inf
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0  # sum of squared distances from the mean

    def update(self, x: Tensor) -> None:
        """Take in the values of x (any shape, floating type)."""
        flat = x.detach().reshape(-1)
        if len(flat) == 0:
            return
        self._add_moments(flat)
        values = flat.abs() if self._mode == "absmax" else flat
        if self._floor != -math.inf:
            values = _above(values, self._floor)
        elif values is flat:
            values = values.clone()  # the caller may reuse its buffer
        self._kept.append(values)
        self._kept_count += len(values)
        if self._kept_count > self._needed() + _KEEP_ALL:
            self._prune()

    def result(self, name: str = "activation") -> Statistics:
        """The statistics of all values so far; QuantError, naming `name`, where there are none,
        where they are not finite, or where the order statistic could not be kept exactly."""
        if not self._count:
            raise QuantError(f"{name}: no activation was seen; does any sample reach this layer?")
        kept = torch.cat(self._kept).cpu()
        if not (bool(torch.isfinite(kept).all()) and math.isfinite(self._squares)):
            raise QuantError(f"{name}: activations are not finite; check the checkpoint")
        rank = self._count - order_index(self._count)
        if rank > len(kept):
            raise QuantError(
                f"{name}: the first samples are so much larger than the rest that the order "
                "statistic was not kept; state the number of values (expected) or shuffle"
            )
        return Statistics(
            ori=float(kept.max()),
            top_0_1=float(kept.topk(rank, sorted=True).values[-1]),
            mean=self._mean,
            std=math.sqrt(self._squares / self._count),
            count=self._count,
        )

    def _needed(self) -> int:
        if self._expected is not None:
            total = max(self._expected, self._count)
            return total - order_index(total)
        return _MARGIN * (self._count - order_index(self._count))

    def _prune(self) -> None:
        kept = torch.cat(self._kept)
        largest = kept.topk(min(self._needed(), len(kept)), sorted=False).values
        self._kept, self._kept_count = [largest], len(largest)
        self._floor = float(largest.min())

    def _add_moments(self, flat: Tensor) -> None:
        """Chan, Golub and LeVeque's update of mean and squares, chunk by chunk in float64."""
        for first, length in spans(len(flat), 1, _SUM_CHUNK):
            part = flat[first : first + length].to(torch.float64, copy=True)
            mean = float(part.mean())
            part -= mean
            before = self._count
            self._count += length
            delta = mean - self._mean
            self._mean += delta * length / self._count
            self._squares += float(part @ part) + delta * delta * before * length / self._count


def _above(values: Tensor, floor: float) -> Tensor:
    """The values above the floor; a NaN compares false, so `~(<=)` keeps it for `result`."""
    whole = len(values) - len(values) % _RUN
    runs = values[:whole].view(-1, _RUN)
    candidates = torch.cat([runs[~(runs.amax(dim=1) <= floor)].reshape(-1), values[whole:]])
    return candidates[~(candidates <= floor)]
