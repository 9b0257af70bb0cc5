"""Q3_K's search with a super-block's 16 sub-blocks side by side, one in each lane of a vector.

As `min_max_lanes`: what ggml's C does to one weight after the other, lane by lane, and so its
bytes. A super-block whose roundings leave the range of the magic number, or with a stored scale
of 0, is given to `q3_k.quantize_q3_k`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant import level_steps, q3_k
from buildsys.quant.compiled import compiled
from buildsys.quant.q6_k import ZERO
from buildsys.quant.rounding import F32, I32, ROUND_LIMIT

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

_LANES = 16
# One scratch array: the compiler then sees that parts of it do not overlap, and vectorises.
# x, its squares, their products with x, and levels are [16, lanes]; the rest one value per lane.
_X, _W, _WX, _L = (part * 16 * _LANES for part in range(4))
(
    _PEAK, _LARGEST, _SUM_XL, _SUM_L2, _ODD, _CHANGED, _BETTER, _NEW, _NEW_XL, _NEW_L2,
    _XL, _QUOTIENT, _MOVE, _GAIN, _HELD,
) = ((64 + part) * _LANES for part in range(15))  # fmt: skip
_SCRATCH = (64 + 15) * _LANES

_MAGIC, _LIMIT = np.float32(12582912.0), ROUND_LIMIT
_ZERO, _BOTTOM, _TOP = np.float32(0), np.float32(-4), np.float32(3)
_EMPTY, _PASSES = ZERO, level_steps.PASSES


def quantize_q3_k(x: F32) -> Bytes:
    """x [n, 256] float32 -> [n, 110] bytes, those of `q3_k.quantize_q3_k`."""
    groups = np.ascontiguousarray(x).reshape(-1, 16)
    scale = np.empty(len(groups), dtype=np.float32)
    odd = np.zeros(len(groups), dtype=np.bool_)
    _search(groups.reshape(-1), scale, odd, _LANES)
    d, multiples = q3_k.super_scale(scale.reshape(-1, 16))
    levels = np.empty(groups.shape, dtype=np.uint8)
    _levels(groups, q3_k.times_multiples(d, multiples), levels, odd, 16)
    blocks = q3_k.pack(d, multiples, levels)
    again = odd.reshape(-1, 16).any(axis=1)
    if again.any():
        blocks[again] = q3_k.quantize_q3_k(x[again])
    return blocks


@compiled
def _search(x: F32, scale: F32, odd: Flags, lanes: int) -> None:
    """The scale [m] of every group of x [16 m]; odd [m] where rounding leaves its range.

    `lanes` is _LANES said at run time: short loops over it are vectorised, where a constant
    would have them unrolled into scalars.
    """
    S = np.empty(_SCRATCH, dtype=np.float32)
    bits = S.view(np.int32)
    for first in range(0, len(scale), _LANES):
        for i in range(16):
            for lane in range(_LANES):
                S[_X + i * _LANES + lane] = x[(first + lane) * 16 + i]
        _begin(S, bits, lanes)
        for _ in range(_PASSES):
            if not _improve(S, bits, lanes):
                break
        for lane in range(_LANES):
            sum_l2 = S[_SUM_L2 + lane]
            fit = S[_SUM_XL + lane] / sum_l2 if sum_l2 > _ZERO else _ZERO
            scale[first + lane] = _ZERO if S[_LARGEST + lane] < _EMPTY else fit
            odd[first + lane] = bits[_ODD + lane] != 0


@compiled
def _begin(S: F32, bits: I32, lanes: int) -> None:
    """Levels for the scale that puts the first largest value at -4, and their two sums."""
    for lane in range(lanes):
        S[_LARGEST + lane] = _ZERO
        S[_PEAK + lane] = _ZERO
        S[_SUM_XL + lane] = _ZERO
        S[_SUM_L2 + lane] = _ZERO
        bits[_ODD + lane] = 0
    for i in range(0, 16 * _LANES, _LANES):
        for lane in range(lanes):
            larger = -np.int32(abs(S[_X + i + lane]) > S[_LARGEST + lane])
            bits[_BETTER + lane] = larger
        for lane in range(lanes):
            larger, value = bits[_BETTER + lane], bits[_X + i + lane]
            bits[_PEAK + lane] = value & larger | bits[_PEAK + lane] & ~larger
            size = value & np.int32(0x7FFFFFFF)
            bits[_LARGEST + lane] = size & larger | bits[_LARGEST + lane] & ~larger
    for i in range(0, 16 * _LANES, _LANES):
        for lane in range(lanes):
            value = S[_X + i + lane]
            level = ((_BOTTOM / S[_PEAK + lane]) * value + _MAGIC) - _MAGIC
            level = min(max(level, _BOTTOM), _TOP)
            weight = value * value
            S[_W + i + lane] = weight
            S[_WX + i + lane] = weight * value
            S[_L + i + lane] = level
            S[_SUM_XL + lane] += weight * value * level
            S[_SUM_L2 + lane] += weight * level * level


@compiled
def _improve(S: F32, bits: I32, lanes: int) -> bool:
    """One pass: each weight moves to the best level for the others' fit, if that is better."""
    for lane in range(lanes):
        bits[_CHANGED + lane] = 0
    for i in range(0, 16 * _LANES, _LANES):
        for lane in range(lanes):
            level, weight, wx = S[_L + i + lane], S[_W + i + lane], S[_WX + i + lane]
            sum_xl, sum_l2 = S[_SUM_XL + lane], S[_SUM_L2 + lane]
            xl = sum_xl - wx * level
            l2 = sum_l2 - weight * level * level
            quotient = S[_X + i + lane] * l2 / xl
            new = min(max((quotient + _MAGIC) - _MAGIC, _BOTTOM), _TOP)
            new_xl, new_l2 = xl + wx * new, l2 + weight * new * new
            S[_XL + lane] = xl
            S[_QUOTIENT + lane] = abs(quotient)
            S[_MOVE + lane] = new - level
            S[_GAIN + lane] = new_xl * new_xl * sum_l2
            S[_HELD + lane] = sum_xl * sum_xl * new_l2
            S[_NEW + lane] = new
            S[_NEW_XL + lane] = new_xl
            S[_NEW_L2 + lane] = new_l2
        # Two comparisons to a loop: more of them are no longer vectorised.
        for lane in range(lanes):
            known = (S[_QUOTIENT + lane] <= _LIMIT) | (S[_XL + lane] <= _ZERO)
            bits[_ODD + lane] |= np.int32(not known)
        for lane in range(lanes):
            better = (S[_XL + lane] > _ZERO) & (S[_GAIN + lane] > S[_HELD + lane])
            bits[_BETTER + lane] = -np.int32(better)
        for lane in range(lanes):
            better = (S[_MOVE + lane] != _ZERO) & (S[_NEW_L2 + lane] > _ZERO)
            bits[_BETTER + lane] &= -np.int32(better)
        for lane in range(lanes):
            better = bits[_BETTER + lane]
            old = ~better
            bits[_CHANGED + lane] |= better
            bits[_L + i + lane] = bits[_NEW + lane] & better | bits[_L + i + lane] & old
            bits[_SUM_XL + lane] = bits[_NEW_XL + lane] & better | bits[_SUM_XL + lane] & old
            bits[_SUM_L2 + lane] = bits[_NEW_L2 + lane] & better | bits[_SUM_L2 + lane] & old
    changed = 0
    for lane in range(lanes):
        changed |= bits[_CHANGED + lane]
    return changed != 0


@compiled
def _levels(x: F32, stored: F32, found: Bytes, odd: Flags, width: int) -> None:
    """Levels 0 .. 7 [m, 16] for x [m, 16] and the scales [m] as stored. `width` is 16."""
    for group in range(len(odd)):
        scale = stored[group]
        outside = np.int32(0)
        for i in range(width):
            v = x[group, i] / scale
            outside |= np.int32(not abs(v) <= _LIMIT)
            level = min(max((v + _MAGIC) - _MAGIC, _BOTTOM), _TOP)
            found[group, i] = np.uint8(np.int32(level) + 4)
        odd[group] |= outside != 0
