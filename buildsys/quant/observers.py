"""Statistics of activations in one pass, without keeping the activations.

Two modes with one set of keys. `mllm`: the signed maximum and the order statistic at 0.999 n
of the signed values, as mllm v1's get_distribution.py computes them on everything at once (a
tensor whose negative side is larger gets too small a range; kept for parity). `absmax`: the
same of |x|.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from buildsys.quant.errors import QuantError

Mode = Literal["absmax", "mllm"]

# So many values are kept before the first are dropped.
_KEEP_ALL = 1 << 12
# Without a bound on the length, so many times the values needed so far are kept.
_MARGIN = 4
# Values that are looked at together: 512 KiB of float32 stay in the cache between the passes.
_CHUNK = 1 << 17
# The first floor is found among the maxima of so many values each.
_RUN = 8


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
        self._sum = 0.0
        self._squares = 0.0

    def update(self, x: Tensor) -> None:
        """Take in the values of x (any shape, floating type)."""
        flat = x.detach().reshape(-1)
        for start in range(0, len(flat), _CHUNK):
            self._take(flat[start : start + _CHUNK])

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
        mean = self._sum / self._count
        return Statistics(
            ori=float(kept.max()),
            top_0_1=float(_largest(kept, rank).min()),
            mean=mean,
            std=math.sqrt(max(self._squares / self._count - mean * mean, 0.0)),
            count=self._count,
        )

    def _take(self, part: Tensor) -> None:
        """One chunk: every pass over it but the first finds it in the cache."""
        if part.dtype.itemsize < torch.float32.itemsize:
            part = part.to(torch.float32)
        # Sums of one chunk in its own type, of chunks in float64: of 131,072 values in float32
        # they are right to about 1e-7, and cost a third of float64's.
        self._sum += float(part.sum())
        self._squares += float(torch.dot(part, part))
        self._count += len(part)
        values = _magnitudes(part) if self._mode == "absmax" else part
        values = self._first(values) if self._floor == -math.inf else _above(values, self._floor)
        self._kept.append(values)
        self._kept_count += len(values)
        if self._kept_count > 2 * self._needed() + _KEEP_ALL:
            self._prune()

    def _first(self, values: Tensor) -> Tensor:
        """Values while there is no floor. Of long parts the maxima of runs give one: as many
        values as are needed lie at or above the least of that many maxima."""
        runs, needed = len(values) // _RUN, self._needed()
        if runs < needed + _KEEP_ALL:
            return values.clone()  # the caller may reuse its buffer
        maxima = values[: runs * _RUN].view(_RUN, runs).amax(dim=0)
        self._floor = float(_largest(maxima, needed).min())
        return values[~(values < self._floor)]

    def _needed(self) -> int:
        if self._expected is not None:
            total = max(self._expected, self._count)
            return total - order_index(total)
        return _MARGIN * (self._count - order_index(self._count))

    def _prune(self) -> None:
        kept = torch.cat(self._kept)
        largest = _largest(kept, min(self._needed(), len(kept)))
        self._kept, self._kept_count = [largest], len(largest)
        self._floor = float(largest.min())


def _magnitudes(part: Tensor) -> Tensor:
    """|part|, on the CPU in memory that the next call uses again: pages that come fresh from
    the system cost more than all else that is done to a chunk."""
    if part.device.type != "cpu":
        return part.abs()
    return torch.abs(part, out=_scratch(part.dtype)[: len(part)])


@functools.cache
def _scratch(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # else it could be written in that mode only
        return torch.empty(_CHUNK, dtype=dtype)


def _largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest values in any order; at least one."""
    if values.device.type != "cpu":
        return values.topk(count, sorted=False).values
    return torch.from_numpy(np.partition(values.numpy(), len(values) - count)[-count:])


def _above(values: Tensor, floor: float) -> Tensor:
    """The values above the floor. A NaN is not among them: `result` sees it in the sums."""
    if values.device.type != "cpu":
        return values[values > floor]
    array = values.numpy()  # the same memory; numpy's choice by a mask is twice as fast
    return torch.from_numpy(array[array > floor])
