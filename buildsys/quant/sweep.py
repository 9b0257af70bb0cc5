"""One pass over a tensor's values for their statistics: sums, and the values above a floor.

The sums have a defined order, so that the compiled pass (`sweep_lanes`) gives the same bits:
blocks of 16 rows of 512 lanes; down a lane in float32, row by row; of blocks in float64, one
after the other. The last block is filled with zeros. 16 additions in float32 lose less than
1e-6 of a lane's magnitude.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from buildsys.quant.rounding import F32

F64 = npt.NDArray[np.float64]

LANES = 512
ROWS = 16
BLOCK = ROWS * LANES
# Values that are looked at together: with their squares they stay in the cache between the calls.
_CHUNK = 16 * BLOCK
# Values in a run, which is read again only where it holds a value above the floor (its mask is
# looked at as one whole number).
_RUN = np.dtype(np.uint64).itemsize


def no_sums() -> F64:
    """Sums of nothing: [2, lanes], of values and of their squares."""
    return np.zeros((2, LANES))


def sweep(values: F32, start: int, floor: float, both: bool, sums: F64) -> tuple[int, F32]:
    """Take in some of values [n] from `start` on.

    Adds to `sums`; returns where to go on, and the values above the floor (with `both`,
    magnitudes) in any order. A NaN is not among them: it is in the sums. While there is no floor
    (-inf) that is one block, for everything in it is returned.
    """
    stop = min(start + (BLOCK if floor == -math.inf else _CHUNK), len(values))
    part = values[start:stop]
    add_sums(part, sums)
    return stop, _above(part, floor, both)


def add_sums(part: F32, sums: F64) -> None:
    """Add the blocks of part [n], the last of them filled up."""
    whole = len(part) - len(part) % BLOCK
    if whole:
        _add_blocks(part[:whole], sums)
    if whole < len(part):
        rest = np.zeros(BLOCK, dtype=np.float32)
        rest[: len(part) - whole] = part[whole:]
        _add_blocks(rest, sums)


def _add_blocks(part: F32, sums: F64) -> None:
    squares = np.multiply(part, part, out=_squares(len(part)))
    for total, terms in zip(sums, (part, squares), strict=True):
        # Over an axis that is not the last numpy adds row to row.
        lanes = np.add.reduce(terms.reshape(-1, ROWS, LANES), axis=1)
        total[:] = np.add.reduce(np.concatenate([total[None], lanes]), axis=0)


def _above(values: F32, floor: float, both: bool) -> F32:
    """The values above the floor, by comparisons, which write one byte a value: |values| alone
    would cost as much as everything else. Only runs with a hit are read again."""
    above, below = _masks(len(values))
    np.greater(values, floor, out=above)
    if both:
        np.less(values, -floor, out=below)
        above |= below
    whole = len(values) - len(values) % _RUN
    runs = np.flatnonzero(above[:whole].view(np.uint64) != 0)
    found: F32 = values[:whole].reshape(-1, _RUN)[runs][above[:whole].reshape(-1, _RUN)[runs]]
    if whole < len(values):
        found = np.concatenate([found, values[whole:][above[whole:]]])
    if both:
        np.abs(found, out=found)
    return found


# Memory that the next call uses again: pages that come fresh from the system cost more than what
# is done in them.
@functools.lru_cache(maxsize=4)
def _squares(count: int) -> F32:
    return np.empty(count, dtype=np.float32)


@functools.lru_cache(maxsize=4)
def _masks(count: int) -> npt.NDArray[np.bool_]:
    return np.empty((2, count), dtype=np.bool_)
