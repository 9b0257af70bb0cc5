"""The search for scales and minima with 16 sub-blocks side by side, one in each lane of a vector.

ggml's C searches one sub-block at a time and its sums must run left to right, so they cannot be
vectorised. Sub-blocks are independent: lane l does for its own what C does, addition by
addition, and finds what `min_max_search.search` finds. A sub-block that leaves the range in which
rounding by a magic number is round-half-even is told as odd; its super-block is quantized by the
numpy kernel.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from buildsys.quant.compiled import compiled
from buildsys.quant.min_max_search import Grid
from buildsys.quant.rounding import F32, I32, ROUND_LIMIT

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Rows = tuple[int, ...]

LANES = 16
# Steps of an inner loop that is unrolled around the lanes, so that sums stay in registers.
_UNROLL = 4
# One scratch array: the compiler then sees that parts of it do not overlap, and vectorises.
# x, weights and levels are [up to 32, lanes]; the rest one value per lane.
_X, _W, _Q = (part * 32 * LANES for part in range(3))
(
    _SUM_W, _SUM_X, _LOW, _HIGH, _SCALE, _MIN, _BEST,
    _SUM_L, _SUM_L2, _SUM_XL, _INVERSE, _ERROR, _NEW_SCALE, _NEW_MIN, _D, _ODD,
    _SCALE_AT_ZERO, _MASK,
) = ((96 + part) * LANES for part in range(18))  # fmt: skip
_SCRATCH = (96 + 18) * LANES

_MAGIC = np.float32(12582912.0)
_LIMIT = ROUND_LIMIT
_ZERO, _ONE, _STEP = np.float32(0), np.float32(1), np.float32(0.1)


def search(x: F32, grid: Grid) -> tuple[F32, F32, Flags]:
    """x [m, size] -> scale [m], minimum [m], and which sub-blocks are odd [m]."""
    count = len(x)
    padded = -count % LANES
    if padded:
        x = np.concatenate([x, np.ones((padded, grid.size), dtype=np.float32)])
    found = np.empty((2, len(x)), dtype=np.float32)
    odd = np.zeros(len(x), dtype=np.bool_)
    top, first = np.float32(grid.top), np.float32(grid.first)
    flat, rows = np.ascontiguousarray(x).reshape(-1), (0,) * grid.size
    _search(flat, found, odd, LANES, rows, top, first, grid.steps + 1, grid.absolute)
    return found[0, :count], found[1, :count], odd[:count]


def levels(x: F32, scale: F32, minimum: F32, odd: Flags, grid: Grid) -> Bytes:
    """Levels [m, size] for x [m, size] and scales and minima [m] as stored; marks more as odd."""
    found = np.empty(x.shape, dtype=np.uint8)
    _levels(np.ascontiguousarray(x), scale, minimum, found, odd, grid.size, np.float32(grid.top))
    return found


@compiled
def _search(
    x: F32,
    found: F32,
    odd: Flags,
    lanes: int,
    rows: Rows,
    top: np.float32,
    offset: np.float32,
    steps: int,
    absolute: bool,
) -> None:
    """x [size m] -> found [2, m]: scale and minimum; odd [m] where rounding leaves its range.

    m is a multiple of the lanes. `lanes` is LANES said at run time: short loops over it are
    vectorised, where a constant would have them unrolled into scalars. Of `rows` the length
    alone counts: it is part of a tuple's type, so that loops over it are compiled for it.
    """
    S = np.empty(_SCRATCH, dtype=np.float32)
    bits = S.view(np.int32)
    for first in range(0, len(odd), LANES):
        for lane in range(LANES):
            for i in range(len(rows)):
                S[_X + i * LANES + lane] = x[(first + lane) * len(rows) + i]
        _weigh(S, bits, lanes, rows, absolute)
        _first_fit(S, bits, lanes, rows, top, absolute)
        for step in range(steps):
            target = (_STEP * np.float32(step) + offset) + top
            _round_and_sum(S, bits, target, lanes, rows, top)
            _solve(S, bits, lanes)
            _measure(S, lanes, rows, absolute)
            _keep_better(S, bits, lanes)
        for lane in range(LANES):
            found[0, first + lane] = S[_SCALE + lane]
            found[1, first + lane] = S[_MIN + lane]
            odd[first + lane] = bits[_ODD + lane] != 0


@compiled
def _weigh(S: F32, bits: I32, lanes: int, rows: Rows, absolute: bool) -> None:
    """Weights sqrt(mean x^2) + |x| (or |x|), their sums, and the ends of each lane."""
    for lane in range(lanes):
        S[_ERROR + lane] = _ZERO
        S[_SUM_W + lane] = _ZERO
        S[_SUM_X + lane] = _ZERO
        bits[_ODD + lane] = 0
        S[_LOW + lane] = _ZERO  # C lowers a positive minimum to 0
        S[_HIGH + lane] = S[_X + lane]
    for i in range(0, len(rows) * LANES, LANES):
        for lane in range(LANES):
            value = S[_X + i + lane]
            S[_ERROR + lane] += value * value
            S[_LOW + lane] = min(S[_LOW + lane], value)
            S[_HIGH + lane] = max(S[_HIGH + lane], value)
    for lane in range(lanes):
        mean = S[_ERROR + lane] / np.float32(len(rows))
        S[_ERROR + lane] = _ZERO if absolute else math.sqrt(mean)
    for i in range(0, len(rows) * LANES, LANES):
        for lane in range(LANES):
            value = S[_X + i + lane]
            weight = S[_ERROR + lane] + abs(value)
            S[_W + i + lane] = weight
            S[_SUM_W + lane] += weight
            S[_SUM_X + lane] += weight * value


@compiled
def _first_fit(S: F32, bits: I32, lanes: int, rows: Rows, top: np.float32, absolute: bool) -> None:
    """The plain fit from minimum to maximum and its error, as the one to beat."""
    for lane in range(lanes):
        S[_MIN + lane] = S[_LOW + lane]
        S[_NEW_MIN + lane] = S[_LOW + lane]
    _round_and_sum(S, bits, top, lanes, rows, top)
    for lane in range(lanes):
        S[_NEW_SCALE + lane] = _ONE / S[_INVERSE + lane]
    _measure(S, lanes, rows, absolute)
    for lane in range(lanes):
        S[_BEST + lane] = S[_ERROR + lane]
        S[_SCALE + lane] = S[_NEW_SCALE + lane]


@compiled
def _round_and_sum(
    S: F32, bits: I32, target: np.float32, lanes: int, rows: Rows, top: np.float32
) -> None:
    """Levels for the inverse scale target / (max - min), and their three weighted sums."""
    for lane in range(lanes):
        low, high, minimum = S[_LOW + lane], S[_HIGH + lane], S[_MIN + lane]
        inverse = target / (high - minimum)
        # Products are monotone in x: if the ends can be rounded, all can.
        in_range = abs(inverse * (low - minimum)) <= _LIMIT
        in_range &= abs(inverse * (high - minimum)) <= _LIMIT
        bits[_ODD + lane] |= np.int32(not in_range)
        S[_INVERSE + lane] = inverse
        S[_SUM_L + lane] = _ZERO
        S[_SUM_L2 + lane] = _ZERO
        S[_SUM_XL + lane] = _ZERO
    for run in range(0, len(rows) * LANES, _UNROLL * LANES):
        for lane in range(LANES):
            sum_l, sum_l2, sum_xl = S[_SUM_L + lane], S[_SUM_L2 + lane], S[_SUM_XL + lane]
            inverse, minimum = S[_INVERSE + lane], S[_MIN + lane]
            for i in range(_UNROLL):
                at = run + i * LANES + lane
                value = S[_X + at]
                level = (inverse * (value - minimum) + _MAGIC) - _MAGIC
                level = min(max(level, _ZERO), top)
                weighted = S[_W + at] * level
                sum_l += weighted
                sum_xl += weighted * value
                sum_l2 += weighted * level
                S[_Q + at] = level
            S[_SUM_L + lane], S[_SUM_L2 + lane], S[_SUM_XL + lane] = sum_l, sum_l2, sum_xl


@compiled
def _solve(S: F32, bits: I32, lanes: int) -> None:
    """The weighted least-squares scale and minimum for the levels; the minimum at most 0."""
    for lane in range(lanes):
        sum_w, sum_x = S[_SUM_W + lane], S[_SUM_X + lane]
        sum_l, sum_l2, sum_xl = S[_SUM_L + lane], S[_SUM_L2 + lane], S[_SUM_XL + lane]
        D = sum_w * sum_l2 - sum_l * sum_l
        minimum = (sum_l2 * sum_x - sum_l * sum_xl) / D
        S[_D + lane] = D
        S[_NEW_MIN + lane] = minimum
        S[_NEW_SCALE + lane] = (sum_w * sum_xl - sum_x * sum_l) / D
        S[_SCALE_AT_ZERO + lane] = sum_xl / sum_l2
        bits[_MASK + lane] = -np.int32(minimum > _ZERO)
    for lane in range(lanes):
        positive = bits[_MASK + lane]
        fitted, at_zero = bits[_NEW_SCALE + lane], bits[_SCALE_AT_ZERO + lane]
        bits[_NEW_SCALE + lane] = at_zero & positive | fitted & ~positive
        bits[_NEW_MIN + lane] &= ~positive


@compiled
def _measure(S: F32, lanes: int, rows: Rows, absolute: bool) -> None:
    """The weighted error of the new scale and minimum, of magnitudes or of squares."""
    for lane in range(lanes):
        S[_ERROR + lane] = _ZERO
    for run in range(0, len(rows) * LANES, _UNROLL * LANES):
        if absolute:
            for lane in range(LANES):
                error, scale, minimum = S[_ERROR + lane], S[_NEW_SCALE + lane], S[_NEW_MIN + lane]
                for i in range(_UNROLL):
                    at = run + i * LANES + lane
                    difference = scale * S[_Q + at] + minimum - S[_X + at]
                    error += S[_W + at] * abs(difference)
                S[_ERROR + lane] = error
        else:
            for lane in range(LANES):
                error, scale, minimum = S[_ERROR + lane], S[_NEW_SCALE + lane], S[_NEW_MIN + lane]
                for i in range(_UNROLL):
                    at = run + i * LANES + lane
                    difference = scale * S[_Q + at] + minimum - S[_X + at]
                    error += S[_W + at] * (difference * difference)
                S[_ERROR + lane] = error


@compiled
def _keep_better(S: F32, bits: I32, lanes: int) -> None:
    """Take the new fit in the lanes where it is better; the minimum moves with it.

    Chosen by masks on the bits: a choice in float32 compiles to a branch for each lane.
    """
    for lane in range(lanes):
        better = (S[_D + lane] > _ZERO) & (S[_ERROR + lane] < S[_BEST + lane])
        bits[_MASK + lane] = -np.int32(better)
    for lane in range(lanes):
        new = bits[_MASK + lane]
        old = ~new
        bits[_SCALE + lane] = bits[_NEW_SCALE + lane] & new | bits[_SCALE + lane] & old
        bits[_MIN + lane] = bits[_NEW_MIN + lane] & new | bits[_MIN + lane] & old
        bits[_BEST + lane] = bits[_ERROR + lane] & new | bits[_BEST + lane] & old


@compiled
def _levels(
    x: F32,
    scales: F32,
    minima: F32,
    found: Bytes,
    odd: Flags,
    size: int,
    top: np.float32,
) -> None:
    for sub in range(len(odd)):
        scale, minimum = scales[sub], minima[sub]
        outside = np.int32(0)
        for i in range(size):
            v = (x[sub, i] + minimum) / scale
            outside |= np.int32(not abs(v) <= _LIMIT)
            found[sub, i] = np.uint8(np.int32(min(max((v + _MAGIC) - _MAGIC, _ZERO), top)))
        odd[sub] |= outside != 0
