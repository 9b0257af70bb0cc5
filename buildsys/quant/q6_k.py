"""Q6_K: 256 weights in 16 sub-blocks of 16, each with an 8-bit scale; 6 bits per weight.

Bytes as ggml's scalar reference without FMA contraction gives them.
Source: ggml `quantize_row_q6_K_ref`, `make_qx_quants` (rmse_type 1), `dequantize_row_q6_K`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant.rounding import F32, I32, fp16_bytes, fp16_values, nearest_int, sum_in_order

Bytes = npt.NDArray[np.uint8]

BLOCK_BYTES = 210
_HALF_RANGE = 32
# ggml's GROUP_MAX_EPS: smaller groups count as zero.
ZERO = np.float32(1e-15)
_SHIFTS = (0, *range(-9, 0), *range(1, 10))


def quantize_q6_k(x: F32) -> Bytes:
    """x [n, 256] float32 -> [n, 210] bytes: low nibbles, high pairs, 16 int8 scales, d."""
    columns = np.ascontiguousarray(x.reshape(-1, 16).T)
    scale, inverse = _search(columns)
    d, multiples, zero = super_scale(scale.reshape(-1, 16))
    levels = _final_levels(columns, inverse, d, multiples)
    blocks = pack(levels, multiples, d)
    blocks[zero] = 0
    return blocks


def dequantize_q6_k(blocks: Bytes) -> F32:
    """[n, 210] -> [n, 256]: d * scale * (level - 32)."""
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    nibbles = np.concatenate([low & 15, low >> 4], axis=2)
    levels = (nibbles | (high >> shifts & 3) << 4).reshape(-1, 16, 16)
    multiples = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    scale = fp16_values(blocks[:, 208:])[:, None] * multiples
    y: F32 = scale[:, :, None] * (levels.astype(np.float32) - np.float32(32))
    return y.reshape(-1, 256)


def _search(x: F32) -> tuple[F32, F32]:
    """make_qx_quants(16, 32, .., 1) for x [16, m]: scale, and 1 / scale of the best rounding.

    Both are 0 for a group that counts as zero; its levels stay at 0, not in the middle.
    """
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    weight = x * x
    wx = weight * x
    scale, best, kept = (np.zeros_like(peak) for _ in range(3))
    for shift in _SHIFTS:
        inverse = -(np.float32(_HALF_RANGE) + np.float32(0.1) * np.float32(shift)) / peak
        levels = inverse * x
        np.rint(levels, out=levels)
        np.clip(levels, np.float32(-_HALF_RANGE), np.float32(_HALF_RANGE - 1), out=levels)
        sum_xl = sum_in_order(wx * levels)
        wl = weight * levels
        wl *= levels
        sum_l2 = sum_in_order(wl)
        ratio = np.where(sum_l2 != 0, sum_xl / sum_l2, np.float32(0))
        if shift == 0:
            scale, best, kept = ratio, ratio * sum_xl, inverse
            continue
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        np.copyto(scale, ratio, where=better)
        np.copyto(best, ratio * sum_xl, where=better)
        np.copyto(kept, inverse, where=better)
    zero = np.abs(peak) < ZERO
    scale[zero] = 0
    kept[zero] = 0
    return scale, kept


def super_scale(scales: F32) -> tuple[F32, npt.NDArray[np.int8], npt.NDArray[np.bool_]]:
    """[n, 16] -> d [n], int8 multiples [n, 16], and which super-blocks are all zero [n]."""
    # C compares with >, which no NaN (weights beyond 1e19, whose squares overflow) passes.
    known = np.where(np.isnan(scales), np.float32(0), scales)
    largest = np.take_along_axis(known, np.abs(known).argmax(axis=1)[:, None], axis=1)
    inverse: F32 = np.divide(np.float32(-128), largest)
    multiples = np.minimum(nearest_int(inverse * scales), 127).astype(np.int8)
    d: F32 = np.divide(np.float32(1), inverse)
    return d[:, 0], multiples, np.abs(largest[:, 0]) < ZERO


def _final_levels(x: F32, inverse: F32, d: F32, multiples: npt.NDArray[np.int8]) -> I32:
    """Levels 0 .. 63 [16, m] for the scales as they are stored.

    Where the stored scale is zero C leaves the levels of the search, so they are made again.
    """
    scale = (fp16_values(fp16_bytes(d))[:, None] * multiples.astype(np.float32)).reshape(-1)
    levels = _centered(nearest_int(x / scale))
    dead = scale == 0
    if bool(dead.any()):
        searched = _centered(nearest_int(inverse[dead] * x[:, dead]))
        levels[:, dead] = np.where(inverse[dead] == 0, 0, searched)
    return levels


def _centered(levels: I32) -> I32:
    return np.clip(levels, -_HALF_RANGE, _HALF_RANGE - 1) + _HALF_RANGE


def pack(levels: I32, multiples: npt.NDArray[np.int8], d: F32) -> Bytes:
    """[16, m] -> [n, 210]. Of 128 weights, quarter q gives nibble q // 2 of byte q % 2 * 32 + l."""
    quarters = levels.T.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (quarters[:, :, :2] & 15 | (quarters[:, :, 2:] & 15) << 4).reshape(-1, 128)
    high = quarters >> 4
    pairs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return np.hstack([low, pairs.reshape(-1, 64), multiples.view(np.uint8), fp16_bytes(d)])
