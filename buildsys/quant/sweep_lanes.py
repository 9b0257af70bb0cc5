"""`sweep.sweep` compiled: one read of every value, the same sums to the last bit.

A block's lanes are summed side by side in vectors, each in its own order. Their largest and least
values are kept with them, and only lanes that reach beyond the floor are read again, from the
first-level cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant.compiled import compiled
from buildsys.quant.rounding import F32
from buildsys.quant.sweep import F64

I64 = npt.NDArray[np.int64]

# As in `sweep`, and said again: the compiler's cache looks for changes in this file alone.
LANES = 512
BLOCK = 16 * LANES
# Values above the floor that a call returns: one block more may all be, so two blocks.
_ROOM = 2 * BLOCK
# One scratch array: the compiler then sees that parts of it do not overlap, and vectorises.
_SUM, _SQUARES, _LARGEST, _LEAST, _FILLED = (part * LANES for part in range(5))
_SCRATCH = _FILLED + BLOCK
_STRIDE = 4 * LANES
_ZERO, _INFINITE = np.float32(0), np.float32(np.inf)


def sweep(values: F32, start: int, floor: float, both: bool, sums: F64) -> tuple[int, F32]:
    """As `sweep.sweep`, of contiguous values; to the end, unless much is above the floor."""
    found = np.empty(_ROOM + 1, dtype=np.float32)
    stop, count = _sweep(values, start, floor, both, sums, found, LANES)
    return stop, found[:count].copy()


@compiled
def _sweep(
    values: F32, start: int, floor: float, both: bool, sums: F64, found: F32, lanes: int
) -> tuple[int, int]:
    """Where to go on, and how many were found.

    `lanes` is LANES said at run time: loops over it are vectorised, where a constant would have
    them unrolled into scalars.
    """
    S = np.empty(_SCRATCH, dtype=np.float32)
    hit = np.empty(LANES + 1, dtype=np.int64)
    least = np.float32(floor)
    count = 0
    for first in range(start, len(values), BLOCK):
        if count > _ROOM - BLOCK:
            return first, count
        block = values[first : first + BLOCK]
        present = len(block)
        if present < BLOCK:
            S[_FILLED : _FILLED + present] = block
            S[_FILLED + present :] = _ZERO
            block = S[_FILLED:]
        _lanes(block, S, lanes)
        for lane in range(lanes):
            sums[0, lane] += S[_SUM + lane]
            sums[1, lane] += S[_SQUARES + lane]
        reaching = _reaching(S, least, both, hit)
        for place in range(reaching):
            for i in range(hit[place], present, LANES):
                value = abs(block[i]) if both else block[i]
                found[count] = value
                count += value > least
    return len(values), count


@compiled
def _reaching(S: F32, floor: np.float32, both: bool, hit: I64) -> int:
    """How many lanes reach beyond the floor; `hit` gets their numbers. Without a branch, which
    the processor would guess wrongly at every other one of them."""
    count = 0
    for lane in range(LANES):
        hit[count] = lane
        count += (S[_LARGEST + lane] > floor) | (both & (-S[_LEAST + lane] > floor))
    return count


@compiled
def _lanes(block: F32, S: F32, lanes: int) -> None:
    """Sum, sum of squares, largest and least value of every lane of a block. A NaN is passed
    over by the last two."""
    for lane in range(lanes):
        S[_SUM + lane] = _ZERO
        S[_SQUARES + lane] = _ZERO
        S[_LARGEST + lane] = -_INFINITE
        S[_LEAST + lane] = _INFINITE
    for first in range(0, BLOCK, _STRIDE):
        rows = block[first : first + _STRIDE]
        for lane in range(lanes):
            a, b = rows[lane], rows[lane + LANES]
            c, d = rows[lane + 2 * LANES], rows[lane + 3 * LANES]
            S[_SUM + lane] = S[_SUM + lane] + a + b + c + d
            S[_SQUARES + lane] = S[_SQUARES + lane] + a * a + b * b + c * c + d * d
            largest, least = S[_LARGEST + lane], S[_LEAST + lane]
            largest = a if a > largest else largest
            largest = b if b > largest else largest
            largest = c if c > largest else largest
            largest = d if d > largest else largest
            least = a if a < least else least
            least = b if b < least else least
            least = c if c < least else least
            least = d if d < least else least
            S[_LARGEST + lane] = largest
            S[_LEAST + lane] = least
