"""Q4_K's search with 16 sub-blocks side by side, one in each lane of a vector.

ggml's C searches one sub-block at a time and its sums must run left to right, so they cannot be
vectorised. Sub-blocks are independent: lane l does for its own what C does, addition by
addition, and the bytes are the same. A super-block that leaves the range in which rounding by a
magic number is round-half-even (a flat one, or a stored scale of 0) is given to
`q4_k.quantize_q4_k`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from buildsys.quant import q4_k
from buildsys.quant.compiled import compiled
from buildsys.quant.rounding import F32, I32, ROUND_LIMIT, fp16_bytes

Bytes = npt.NDArray[np.uint8]

_LANES = 16
# Steps of an inner loop that is unrolled around the lanes, so that sums stay in registers.
_UNROLL = 4
# One scratch array: the compiler then sees that parts of it do not overlap, and vectorises.
# x, weights and levels are [32, lanes]; the rest one value per lane.
_X, _W, _Q = (part * 32 * _LANES for part in range(3))
(
    _SUM_W, _SUM_X, _LOW, _HIGH, _SCALE, _MIN, _BEST,
    _SUM_L, _SUM_L2, _SUM_XL, _INVERSE, _ERROR, _NEW_SCALE, _NEW_MIN, _D, _ODD,
    _SCALE_AT_ZERO, _MASK,
) = ((96 + part) * _LANES for part in range(18))  # fmt: skip
_SCRATCH = (96 + 18) * _LANES

_MAGIC = np.float32(12582912.0)
_LIMIT = ROUND_LIMIT
_ZERO, _ONE, _TOP, _COUNT = np.float32(0), np.float32(1), np.float32(15), np.float32(32)
_RMIN, _RDELTA = np.float32(-1), np.float32(0.1)


def quantize_q4_k(x: F32) -> Bytes:
    """x [n, 256] float32 -> [n, 144] bytes, those of `q4_k.quantize_q4_k`."""
    count = len(x)
    padded = -count % 2  # two super-blocks fill the lanes
    if padded:
        x = np.concatenate([x, np.ones((padded, 256), dtype=np.float32)])
    found = np.empty((2, 8 * len(x)), dtype=np.float32)
    odd = np.zeros(8 * len(x), dtype=np.bool_)
    flat = np.ascontiguousarray(x).reshape(-1)
    _search(flat, found, odd, _LANES)
    scale, minimum = found
    d, ls = q4_k.six_bits(scale.reshape(-1, 8))
    dmin, lm = q4_k.six_bits(-minimum.reshape(-1, 8))
    stored = np.stack([q4_k.times_six_bits(d, ls), q4_k.times_six_bits(dmin, lm)])
    blocks = np.empty((len(x), q4_k.BLOCK_BYTES), dtype=np.uint8)
    _levels(flat, stored, blocks, odd, 32)
    blocks[:, 0:2], blocks[:, 2:4] = fp16_bytes(d), fp16_bytes(dmin)
    blocks[:, 4:16] = q4_k.pack_scales(ls, lm)
    blocks = blocks[:count]
    again = np.unique(np.flatnonzero(odd) // 8)
    again = again[again < count]
    if len(again):
        blocks[again] = q4_k.quantize_q4_k(x[:count][again])
    return blocks


@compiled
def _search(x: F32, found: F32, odd: npt.NDArray[np.bool_], lanes: int) -> None:
    """x [32 m] -> found [2, m]: scale and minimum; odd [m] where rounding leaves its range.

    m is a multiple of the lanes. `lanes` is _LANES said at run time: short loops over it are
    vectorised, where a constant would have them unrolled into scalars.
    """
    S = np.empty(_SCRATCH, dtype=np.float32)
    bits = S.view(np.int32)
    for first in range(0, len(odd), _LANES):
        for lane in range(_LANES):
            for i in range(32):
                S[_X + i * _LANES + lane] = x[(first + lane) * 32 + i]
        _weigh(S, bits, lanes)
        _first_fit(S, bits, lanes)
        for step in range(21):
            _round_and_sum(S, bits, (_RDELTA * np.float32(step) + _RMIN) + _TOP, lanes)
            _solve(S, bits, lanes)
            _measure(S, lanes)
            _keep_better(S, bits, lanes)
        for lane in range(_LANES):
            found[0, first + lane] = S[_SCALE + lane]
            found[1, first + lane] = S[_MIN + lane]
            odd[first + lane] = bits[_ODD + lane] != 0


@compiled
def _weigh(S: F32, bits: I32, lanes: int) -> None:
    """Weights sqrt(mean x^2) + |x|, their sums, and the ends of each lane."""
    for lane in range(lanes):
        S[_ERROR + lane] = _ZERO
        S[_SUM_W + lane] = _ZERO
        S[_SUM_X + lane] = _ZERO
        bits[_ODD + lane] = 0
        S[_LOW + lane] = _ZERO  # C lowers a positive minimum to 0
        S[_HIGH + lane] = S[_X + lane]
    for i in range(0, 32 * _LANES, _LANES):
        for lane in range(_LANES):
            value = S[_X + i + lane]
            S[_ERROR + lane] += value * value
            S[_LOW + lane] = min(S[_LOW + lane], value)
            S[_HIGH + lane] = max(S[_HIGH + lane], value)
    for lane in range(lanes):
        S[_ERROR + lane] = math.sqrt(S[_ERROR + lane] / _COUNT)
    for i in range(0, 32 * _LANES, _LANES):
        for lane in range(_LANES):
            value = S[_X + i + lane]
            weight = S[_ERROR + lane] + abs(value)
            S[_W + i + lane] = weight
            S[_SUM_W + lane] += weight
            S[_SUM_X + lane] += weight * value


@compiled
def _first_fit(S: F32, bits: I32, lanes: int) -> None:
    """The plain fit from minimum to maximum and its error, as the one to beat."""
    for lane in range(lanes):
        S[_MIN + lane] = S[_LOW + lane]
        S[_NEW_MIN + lane] = S[_LOW + lane]
    _round_and_sum(S, bits, _TOP, lanes)
    for lane in range(lanes):
        S[_NEW_SCALE + lane] = _ONE / S[_INVERSE + lane]
    _measure(S, lanes)
    for lane in range(lanes):
        S[_BEST + lane] = S[_ERROR + lane]
        S[_SCALE + lane] = S[_NEW_SCALE + lane]


@compiled
def _round_and_sum(S: F32, bits: I32, grid: np.float32, lanes: int) -> None:
    """Levels for the inverse scale grid / (max - min), and their three weighted sums."""
    for lane in range(lanes):
        low, high, minimum = S[_LOW + lane], S[_HIGH + lane], S[_MIN + lane]
        inverse = grid / (high - minimum)
        # Products are monotone in x: if the ends can be rounded, all can.
        in_range = abs(inverse * (low - minimum)) <= _LIMIT
        in_range &= abs(inverse * (high - minimum)) <= _LIMIT
        bits[_ODD + lane] |= np.int32(not in_range)
        S[_INVERSE + lane] = inverse
        S[_SUM_L + lane] = _ZERO
        S[_SUM_L2 + lane] = _ZERO
        S[_SUM_XL + lane] = _ZERO
    for run in range(0, 32 * _LANES, _UNROLL * _LANES):
        for lane in range(_LANES):
            sum_l, sum_l2, sum_xl = S[_SUM_L + lane], S[_SUM_L2 + lane], S[_SUM_XL + lane]
            inverse, minimum = S[_INVERSE + lane], S[_MIN + lane]
            for i in range(_UNROLL):
                at = run + i * _LANES + lane
                value = S[_X + at]
                level = (inverse * (value - minimum) + _MAGIC) - _MAGIC
                level = min(max(level, _ZERO), _TOP)
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
def _measure(S: F32, lanes: int) -> None:
    """The weighted squared error of the new scale and minimum."""
    for lane in range(lanes):
        S[_ERROR + lane] = _ZERO
    for run in range(0, 32 * _LANES, _UNROLL * _LANES):
        for lane in range(_LANES):
            error, scale, minimum = S[_ERROR + lane], S[_NEW_SCALE + lane], S[_NEW_MIN + lane]
            for i in range(_UNROLL):
                at = run + i * _LANES + lane
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
def _levels(x: F32, stored: F32, blocks: Bytes, odd: npt.NDArray[np.bool_], width: int) -> None:
    """Nibbles, blocks[:, 16:], for x [32 m] and the scales and minima [2, m] as stored.

    `width` is 32, said at run time as `lanes` is.
    """
    row = np.empty(32, dtype=np.uint8)
    for sub in range(len(odd)):
        scale, minimum = stored[0, sub], stored[1, sub]
        outside = np.int32(0)
        for i in range(width):
            v = (x[sub * 32 + i] + minimum) / scale
            outside |= np.int32(not abs(v) <= _LIMIT)
            row[i] = np.uint8(np.int32(min(max((v + _MAGIC) - _MAGIC, _ZERO), _TOP)))
        odd[sub] |= outside != 0
        block, at = sub // 8, 16 + sub % 8 // 2 * 32
        if sub % 2 == 0:
            for i in range(32):
                blocks[block, at + i] = row[i]
        else:
            for i in range(32):
                blocks[block, at + i] |= row[i] << 4
