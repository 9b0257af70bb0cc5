"""Statistics of activations in one pass, without keeping the activations.

Two modes with one set of keys. `mllm`: the signed maximum and the order statistic at 0.999 n
of the signed values, as mllm v1's get_distribution.py computes them on everything at once (a
tensor whose negative side is larger gets too small a range; kept for parity). `absmax`: the
same of |x|.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from buildsys.quant import sweep
from buildsys.quant.compiled import available
from buildsys.quant.errors import QuantError
from buildsys.quant.rounding import F32

Mode = Literal["absmax", "mllm"]

# So many values are kept before the first are dropped.
_KEEP_ALL = 1 << 12
# Without a bound on the length, so many times the values needed so far are kept.
_MARGIN = 4
# Values of another type that are made float32 together, and stay in the cache for it.
_CHUNK = 1 << 18
# From so many values on numba's start pays: half a second, which is what it saves on 500 million,
# at a nanosecond each; and once for a machine, some 4 s to compile.
MANY = 1 << 29


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

    many: how many values all observers of this run will see, which decides between numpy and the
    compiled pass; their results are the same bits.
    """

    def __init__(
        self, mode: Mode = "absmax", *, expected: int | None = None, many: int = 0
    ) -> None:
        if mode not in ("absmax", "mllm"):
            raise QuantError(f"statistics: {mode!r} is unknown; use absmax or mllm")
        self._both = mode == "absmax"
        self._expected = expected
        self._sweep = sweep_for(many)
        self._kept: list[F32] = []
        self._kept_count = 0
        self._floor = -math.inf
        self._count = 0
        self._sums = sweep.no_sums()
        self._enough = self._needed()

    def update(self, x: Tensor) -> None:
        """Take in the values of x (any shape, floating type)."""
        # As few calls of torch as can be: behind a product, which has emptied the caches of all
        # code, each costs 10 to 15 microseconds.
        if x.dtype is torch.float32 and x.is_cpu:
            self._take((x.detach() if x.requires_grad else x).numpy().reshape(-1))
        elif x.is_cpu:
            for part in torch.split(x.detach().reshape(-1), _CHUNK):
                self._take(part.to(torch.float32).numpy())
        else:
            self._take_there(x.detach().reshape(-1).to(torch.float32))
        if self._expected is None:
            self._prune()

    def result(self, name: str = "activation") -> Statistics:
        """The statistics of all values so far; QuantError, naming `name`, where there are none,
        where they are not finite, or where the order statistic could not be kept exactly."""
        if not self._count:
            raise QuantError(f"{name}: no activation was seen; does any sample reach this layer?")
        total, squares = (float(lanes.sum()) for lanes in self._sums)
        kept = np.concatenate(self._kept)
        if not (bool(np.isfinite(kept).all()) and math.isfinite(squares)):
            raise QuantError(f"{name}: activations are not finite; check the checkpoint")
        rank = self._count - order_index(self._count)
        if rank > len(kept):
            raise QuantError(
                f"{name}: the first samples are so much larger than the rest that the order "
                "statistic was not kept; state the number of values (expected) or shuffle"
            )
        mean = total / self._count
        return Statistics(
            ori=float(kept.max()) + 0.0,  # of zeros, which are in no order, the positive one
            top_0_1=float(_largest(kept, rank).min()) + 0.0,
            mean=mean,
            std=math.sqrt(max(squares / self._count - mean * mean, 0.0)),
            count=self._count,
        )

    def _take(self, values: F32) -> None:
        self._count += len(values)
        at = 0
        while at < len(values):
            at, found = self._sweep(values, at, self._floor, self._both, self._sums)
            self._keep(found)

    def _take_there(self, part: Tensor) -> None:
        """Values on another device: only sums, and what is kept, come to the CPU."""
        self._count += len(part)
        self._sums[:, 0] += [float(part.sum()), float(torch.dot(part, part))]
        magnitudes = part.abs() if self._both else part
        if self._floor == -math.inf:
            few = 2 * self._enough + _KEEP_ALL + 1
            self._keep(magnitudes[:few].cpu().numpy())
            magnitudes = magnitudes[few:]
        self._keep(magnitudes[magnitudes > self._floor].cpu().numpy())

    def _keep(self, found: F32) -> None:
        self._kept.append(found)
        self._kept_count += len(found)
        if self._kept_count > 2 * self._enough + _KEEP_ALL and self._expected is not None:
            self._prune()

    def _needed(self) -> int:
        if self._expected is not None:
            total = max(self._expected, self._count)
            return total - order_index(total)
        return _MARGIN * (self._count - order_index(self._count))

    def _prune(self) -> None:
        """Drop what the order statistic does not need, where that is more than half."""
        self._enough = self._needed()
        if self._kept_count > 2 * self._enough + _KEEP_ALL:
            largest = _largest(np.concatenate(self._kept), self._enough)
            self._kept, self._kept_count = [largest], len(largest)
            self._floor = float(largest.min())


def sweep_for(many: int) -> Callable[[F32, int, float, bool, sweep.F64], tuple[int, F32]]:
    """The pass over the values that is faster for so many of them."""
    if many < MANY or not available():
        return sweep.sweep
    lanes = importlib.import_module("buildsys.quant.sweep_lanes")
    return lanes.sweep  # type: ignore[no-any-return]  # numba is optional, so by name


def _largest(values: F32, count: int) -> F32:
    """The `count` largest values in any order; at least one."""
    return np.partition(values, len(values) - count)[-count:]
