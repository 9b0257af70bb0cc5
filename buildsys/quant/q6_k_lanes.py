"""Q6_K's search with 16 sub-blocks side by side, one in each lane of a vector.

As `q4_k_lanes`: the additions of ggml's C, lane by lane, and so its bytes. A super-block with a
stored scale of 0 is given to `q6_k.quantize_q6_k`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant import q6_k
from buildsys.quant.compiled import compiled
from buildsys.quant.rounding import F32, I32, fp16_bytes, fp16_values

Bytes = npt.NDArray[np.uint8]

_LANES = 16
# Steps of an inner loop that is unrolled around the lanes, so that sums stay in registers.
_UNROLL = 4
# One scratch array: the compiler then sees that parts of it do not overlap, and vectorises.
# x, weights and weights * x are [16, lanes]; the rest one value per lane.
_X, _W, _WX = (part * 16 * _LANES for part in range(3))
(
    _PEAK, _LARGEST, _SCALE, _BEST, _INVERSE, _SUM_L2, _SUM_XL, _NEW_SCALE, _NEW_BEST, _MASK,
) = ((48 + part) * _LANES for part in range(10))  # fmt: skip
_SCRATCH = (48 + 10) * _LANES

_MAGIC = np.float32(12582912.0)
_ZERO, _STEP = np.float32(0), np.float32(0.1)
_BOTTOM, _TOP, _MIDDLE = np.float32(-32), np.float32(31), np.float32(32)
_EMPTY = q6_k.ZERO


def quantize_q6_k(x: F32) -> Bytes:
    """x [n, 256] float32 -> [n, 210] bytes, those of `q6_k.quantize_q6_k`."""
    flat = np.ascontiguousarray(x).reshape(-1)
    scale = np.empty(len(flat) // 16, dtype=np.float32)
    _search(flat, scale, _LANES)
    d, multiples, zero = q6_k.super_scale(scale.reshape(-1, 16))
    stored = (fp16_values(fp16_bytes(d))[:, None] * multiples.astype(np.float32)).reshape(-1)
    blocks = np.empty((len(x), q6_k.BLOCK_BYTES), dtype=np.uint8)
    _levels(flat, stored, blocks, _LANES)
    blocks[:, 192:208] = multiples.view(np.uint8)
    blocks[:, 208:] = fp16_bytes(d)
    blocks[zero] = 0
    # A stored scale that is neither 0 nor infinite is within a small factor of the searched one,
    # so quotients stay far inside the range of the magic number.
    odd = ~(np.isfinite(stored) & (stored != 0)).reshape(-1, 16).all(axis=1)
    odd &= ~zero
    if odd.any():
        blocks[odd] = q6_k.quantize_q6_k(x[odd])
    return blocks


@compiled
def _search(x: F32, scale: F32, lanes: int) -> None:
    """The scale [m] of every group of x [16 m], 0 for an empty one; a super-block fills the lanes.

    `lanes` is _LANES said at run time: short loops over it are vectorised, where a constant
    would have them unrolled into scalars.
    """
    S = np.empty(_SCRATCH, dtype=np.float32)
    bits = S.view(np.int32)
    for first in range(0, len(scale), _LANES):
        for i in range(16):
            for lane in range(_LANES):
                S[_X + i * _LANES + lane] = x[(first + lane) * 16 + i]
        _weigh(S, bits, lanes)
        _round_and_sum(S, _MIDDLE, lanes)
        _take_first(S, lanes)
        for shift in range(-9, 10):
            if shift != 0:
                _round_and_sum(S, _MIDDLE + _STEP * np.float32(shift), lanes)
                _keep_better(S, bits, lanes)
        for lane in range(_LANES):
            empty = S[_LARGEST + lane] < _EMPTY
            scale[first + lane] = _ZERO if empty else S[_SCALE + lane]


@compiled
def _weigh(S: F32, bits: I32, lanes: int) -> None:
    """Weights x^2, their products with x, and each lane's first value of largest magnitude."""
    for lane in range(lanes):
        S[_LARGEST + lane] = _ZERO
        S[_PEAK + lane] = _ZERO
    for i in range(0, 16 * _LANES, _LANES):
        for lane in range(_LANES):
            value = S[_X + i + lane]
            larger = -np.int32(abs(value) > S[_LARGEST + lane])
            bits[_PEAK + lane] = bits[_X + i + lane] & larger | bits[_PEAK + lane] & ~larger
            S[_LARGEST + lane] = max(S[_LARGEST + lane], abs(value))
            weight = value * value
            S[_W + i + lane] = weight
            S[_WX + i + lane] = weight * value


@compiled
def _round_and_sum(S: F32, grid: np.float32, lanes: int) -> None:
    """Levels for the inverse scale -grid / peak, and their two weighted sums."""
    for lane in range(lanes):
        S[_INVERSE + lane] = -grid / S[_PEAK + lane]
        S[_SUM_L2 + lane] = _ZERO
        S[_SUM_XL + lane] = _ZERO
    for run in range(0, 16 * _LANES, _UNROLL * _LANES):
        for lane in range(_LANES):
            inverse = S[_INVERSE + lane]
            sum_l2, sum_xl = S[_SUM_L2 + lane], S[_SUM_XL + lane]
            for i in range(_UNROLL):
                at = run + i * _LANES + lane
                level = (inverse * S[_X + at] + _MAGIC) - _MAGIC
                level = min(max(level, _BOTTOM), _TOP)
                sum_xl += S[_WX + at] * level
                sum_l2 += (S[_W + at] * level) * level
            S[_SUM_L2 + lane], S[_SUM_XL + lane] = sum_l2, sum_xl


@compiled
def _take_first(S: F32, lanes: int) -> None:
    """The unshifted rounding, as the one to beat."""
    for lane in range(lanes):
        sum_l2, sum_xl = S[_SUM_L2 + lane], S[_SUM_XL + lane]
        scale = sum_xl / sum_l2 if sum_l2 != _ZERO else _ZERO
        S[_SCALE + lane] = scale
        S[_BEST + lane] = scale * sum_xl


@compiled
def _keep_better(S: F32, bits: I32, lanes: int) -> None:
    """Take the new rounding in the lanes where it explains more of the weights.

    Chosen by masks on the bits: a choice in float32 compiles to a branch for each lane.
    """
    for lane in range(lanes):
        sum_l2, sum_xl = S[_SUM_L2 + lane], S[_SUM_XL + lane]
        better = (sum_l2 > _ZERO) & (sum_xl * sum_xl > S[_BEST + lane] * sum_l2)
        scale = sum_xl / sum_l2
        S[_NEW_SCALE + lane] = scale
        S[_NEW_BEST + lane] = scale * sum_xl
        bits[_MASK + lane] = -np.int32(better)
    for lane in range(lanes):
        new = bits[_MASK + lane]
        old = ~new
        bits[_SCALE + lane] = bits[_NEW_SCALE + lane] & new | bits[_SCALE + lane] & old
        bits[_BEST + lane] = bits[_NEW_BEST + lane] & new | bits[_BEST + lane] & old


@compiled
def _levels(x: F32, stored: F32, blocks: Bytes, width: int) -> None:
    """Low nibbles and high pairs, blocks[:, :192], for the scales [16 n] as they are stored.

    `width` is 16, said at run time as `lanes` is.
    """
    L = np.empty(256, dtype=np.uint8)
    for block in range(len(blocks)):
        for sub in range(16):
            scale = stored[block * 16 + sub]
            first = block * 256 + sub * 16
            for i in range(width):
                level = (x[first + i] / scale + _MAGIC) - _MAGIC
                level = min(max(level, _BOTTOM), _TOP) + _MIDDLE
                L[sub * 16 + i] = np.uint8(np.int32(level))
        for half in range(2):
            for i in range(32):
                at = half * 128 + i
                one, two, three, four = L[at], L[at + 32], L[at + 64], L[at + 96]
                blocks[block, half * 64 + i] = (one & 15) | ((three & 15) << 4)
                blocks[block, half * 64 + 32 + i] = (two & 15) | ((four & 15) << 4)
                high = (one >> 4) | ((two >> 4) << 2) | ((three >> 4) << 4) | ((four >> 4) << 6)
                blocks[block, 128 + half * 32 + i] = high
