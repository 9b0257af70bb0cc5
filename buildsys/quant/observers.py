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
import numpy.typing as npt
import torch
from torch import Tensor

from buildsys.quant.errors import QuantError
from buildsys.quant.rounding import F32

Mode = Literal["absmax", "mllm"]

# So many values are kept before the first are dropped.
_KEEP_ALL = 1 << 12
# Without a bound on the length, so many times the values needed so far are kept.
_MARGIN = 4
# Values that are looked at together: 1 MiB of float32 stays in the cache between the passes, and
# behind a product that has emptied the caches of all code, every call costs some 15 microseconds.
_CHUNK = 1 << 18
# Values in a run: the first floor is found among the maxima of runs, and later a run is read again
# only where it holds a value above the floor (its mask is looked at as one whole number).
_RUN = np.dtype(np.uint64).itemsize


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
        self._kept: list[F32] = []
        self._kept_count = 0
        self._floor = -math.inf
        self._count = 0
        self._sum = 0.0
        self._squares = 0.0

    def update(self, x: Tensor) -> None:
        """Take in the values of x (any shape, floating type)."""
        flat = x.detach().reshape(-1)
        parts = torch.split(flat, _CHUNK) if flat.device.type == "cpu" else (flat,)
        for part in parts if len(flat) else ():
            self._take(part)

    def result(self, name: str = "activation") -> Statistics:
        """The statistics of all values so far; QuantError, naming `name`, where there are none,
        where they are not finite, or where the order statistic could not be kept exactly."""
        if not self._count:
            raise QuantError(f"{name}: no activation was seen; does any sample reach this layer?")
        kept = np.concatenate(self._kept)
        if not (bool(np.isfinite(kept).all()) and math.isfinite(self._squares)):
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
        # Sums of one chunk in its own type, of chunks in float64: of 262,144 values in float32
        # they are right to about 1e-7, and cost a third of float64's.
        self._sum += float(part.sum())
        self._squares += float(torch.dot(part, part))
        self._count += len(part)
        both = self._mode == "absmax"
        if self._floor == -math.inf:
            values = self._first((part.abs() if both else part).cpu().numpy())
        elif part.device.type == "cpu":
            values = _above(part.numpy(), self._floor, both)
        else:
            values = _above_there(part, self._floor, both)
        self._kept.append(values)
        self._kept_count += len(values)
        if self._kept_count > 2 * self._needed() + _KEEP_ALL:
            self._prune()

    def _first(self, values: F32) -> F32:
        """Values while there is no floor. Of long parts the maxima of runs give one: as many
        values as are needed lie at or above the least of that many maxima."""
        runs, needed = len(values) // _RUN, self._needed()
        if runs < needed + _KEEP_ALL:
            return values.copy()  # the caller may reuse its buffer
        maxima = values[: runs * _RUN].reshape(_RUN, runs).max(axis=0)
        self._floor = float(_largest(maxima, needed).min())
        return values[~(values < self._floor)]

    def _needed(self) -> int:
        if self._expected is not None:
            total = max(self._expected, self._count)
            return total - order_index(total)
        return _MARGIN * (self._count - order_index(self._count))

    def _prune(self) -> None:
        kept = np.concatenate(self._kept)
        largest = _largest(kept, min(self._needed(), len(kept)))
        self._kept, self._kept_count = [largest], len(largest)
        self._floor = float(largest.min())


def _largest(values: F32, count: int) -> F32:
    """The `count` largest values in any order; at least one."""
    return np.partition(values, len(values) - count)[-count:]


def _above(values: F32, floor: float, both: bool) -> F32:
    """The values above the floor; with `both`, magnitudes. A NaN is not among them: `result`
    sees it in the sums.

    By comparisons, which write one byte a value: |values| alone would cost as much as
    everything else that is done to a chunk. Only runs with a hit are read again.
    """
    masks = _masks(len(values))
    above = masks[0, : len(values)]
    np.greater(values, floor, out=above)
    if both:
        below = masks[1, : len(values)]
        np.less(values, -floor, out=below)
        above |= below
    whole = len(values) - len(values) % _RUN
    runs = np.flatnonzero(above[:whole].view(np.uint64) != 0)
    found = values[:whole].reshape(-1, _RUN)[runs][above[:whole].reshape(-1, _RUN)[runs]]
    if whole < len(values):
        found = np.concatenate([found, values[whole:][above[whole:]]])
    return np.abs(found, out=found) if both else found


def _above_there(values: Tensor, floor: float, both: bool) -> F32:
    """`_above` where the values are: only what is kept is copied to the CPU."""
    values = values.abs() if both else values
    kept: F32 = values[values > floor].cpu().numpy()
    return kept


@functools.lru_cache(maxsize=4)
def _masks(count: int) -> npt.NDArray[np.bool_]:
    """Two masks for `count` values in memory that the next call uses again: pages that come
    fresh from the system cost more than the comparisons."""
    return np.empty((2, count), dtype=np.bool_)
