"""Q4_K: 256 weights in 8 sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum.

Bytes as ggml's scalar reference without FMA contraction gives them. A sub-block's scale and
minimum come from a weighted least-squares search over 21 roundings; sub-blocks are independent,
so all of a chunk are searched side by side, each with its sums in C's order.
Source: ggml `quantize_row_q4_K_ref`, `make_qkx2_quants`, `dequantize_row_q4_K`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from buildsys.quant.rounding import (
    F32,
    I32,
    ROUND_LIMIT,
    fp16_bytes,
    fp16_values,
    nearest_int,
    sum_in_order,
)

Bytes = npt.NDArray[np.uint8]

BLOCK_BYTES = 144
_TOP = np.float32(15)
_STEPS = 20


@dataclass
class _Best:
    """Per sub-block [m]: the best fit so far, and the rounding that its levels came from."""

    scale: F32
    minimum: F32
    error: F32
    inverse_scale: F32
    offset: F32


def quantize_q4_k(x: F32) -> Bytes:
    """x [n, 256] float32 -> [n, 144] bytes: d, dmin (float16), 12 bytes of scales, nibbles."""
    columns = np.ascontiguousarray(x.reshape(-1, 32).T)
    best = _search(columns)
    scales, minima = best.scale.reshape(-1, 8), (-best.minimum).reshape(-1, 8)
    d, ls = six_bits(scales)
    dmin, lm = six_bits(minima)
    levels = _final_levels(columns, best, d, ls, dmin, lm)
    return np.hstack([fp16_bytes(d), fp16_bytes(dmin), pack_scales(ls, lm), _pack_nibbles(levels)])


def dequantize_q4_k(blocks: Bytes) -> F32:
    """[n, 144] -> [n, 256]: d * scale * level - dmin * minimum."""
    ls, lm = _unpack_scales(blocks[:, 4:16])
    scale = fp16_values(blocks[:, 0:2])[:, None] * ls.astype(np.float32)
    minimum = fp16_values(blocks[:, 2:4])[:, None] * lm.astype(np.float32)
    pairs = blocks[:, 16:].reshape(-1, 4, 1, 32)
    levels = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    y = scale[:, :, None] * levels.astype(np.float32) - minimum[:, :, None]
    return y.reshape(-1, 256)


def _search(x: F32) -> _Best:
    """make_qkx2_quants(32, 15, .., rmin -1, rdelta 0.1, nstep 20) for x [32, m]."""
    weight = np.sqrt(sum_in_order(x * x) / np.float32(32)) + np.abs(x)
    sum_w, sum_x = sum_in_order(weight), sum_in_order(weight * x)
    low, high = x.min(axis=0), x.max(axis=0)
    best = _first_fit(x, weight, np.minimum(low, np.float32(0)), high)
    for step in range(_STEPS + 1):
        # `best.minimum` has moved since the last step: C uses the moved one, for both.
        grid = np.float32(0.1) * np.float32(step) + np.float32(-1) + _TOP
        inverse = grid / (high - best.minimum)
        levels = _round_to_levels(x, inverse, best.minimum, low, high)
        wl = weight * levels
        sum_l, sum_xl = sum_in_order(wl), sum_in_order(wl * x)
        wl *= levels
        sum_l2 = sum_in_order(wl)
        D = sum_w * sum_l2 - sum_l * sum_l
        scale: F32 = np.divide(sum_w * sum_xl - sum_x * sum_l, D)
        minimum: F32 = np.divide(sum_l2 * sum_x - sum_l * sum_xl, D)
        positive = minimum > 0
        np.copyto(scale, sum_xl / sum_l2, where=positive)
        minimum[positive] = 0
        error = _error(x, weight, levels, scale, minimum)
        _keep_better(best, (D > 0) & (error < best.error), scale, minimum, error, inverse)
    flat = high == np.minimum(low, np.float32(0))
    best.scale[flat] = 0
    best.minimum[flat] = high[flat]
    best.inverse_scale[flat] = 0
    return best


def _first_fit(x: F32, weight: F32, minimum: F32, high: F32) -> _Best:
    inverse = _TOP / (high - minimum)
    scale = np.float32(1) / inverse
    levels = _round_to_levels(x, inverse, minimum, minimum, high)
    error = _error(x, weight, levels, scale, minimum)
    return _Best(scale, minimum, error, inverse, minimum.copy())


def _keep_better(
    best: _Best, better: npt.NDArray[np.bool_], scale: F32, minimum: F32, error: F32, inverse: F32
) -> None:
    np.copyto(best.offset, best.minimum, where=better)
    np.copyto(best.inverse_scale, inverse, where=better)
    np.copyto(best.scale, scale, where=better)
    np.copyto(best.minimum, minimum, where=better)
    np.copyto(best.error, error, where=better)


def _round_to_levels(x: F32, inverse: F32, minimum: F32, low: F32, high: F32) -> F32:
    """Levels 0 .. 15 as float32. Products are monotone in x: the ends tell if rint will do."""
    ends = np.maximum(np.abs(inverse * (low - minimum)), np.abs(inverse * (high - minimum)))
    v = inverse * (x - minimum)
    if bool((ends <= ROUND_LIMIT).all()):
        np.rint(v, out=v)
        return np.clip(v, np.float32(0), _TOP, out=v)
    return np.clip(nearest_int(v), 0, 15).astype(np.float32)


def _error(x: F32, weight: F32, levels: F32, scale: F32, minimum: F32) -> F32:
    difference = scale * levels
    difference += minimum
    difference -= x
    difference *= difference
    difference *= weight
    return sum_in_order(difference)


def six_bits(values: F32) -> tuple[F32, Bytes]:
    """[n, 8] -> (the super-block's factor [n], 6-bit multiples of it [n, 8])."""
    largest = np.maximum(values.max(axis=1), np.float32(0))
    inverse = np.where(largest > 0, np.float32(63) / largest, np.float32(0))
    multiples = nearest_int(inverse[:, None] * values).astype(np.uint8)
    return largest / np.float32(63), np.minimum(multiples, np.uint8(63))


def times_six_bits(factor: F32, multiples: Bytes) -> F32:
    """What is stored stands for: the factor [n], as float16, times the multiples [n, 8]; [8 n]."""
    return (fp16_values(fp16_bytes(factor))[:, None] * multiples.astype(np.float32)).reshape(-1)


def _final_levels(x: F32, best: _Best, d: F32, ls: Bytes, dmin: F32, lm: Bytes) -> I32:
    """Levels [32, m] for the scales as they are stored.

    Where the stored scale is zero C leaves the levels of the search, so they are made again.
    """
    scale, minimum = times_six_bits(d, ls), times_six_bits(dmin, lm)
    levels = nearest_int((x + minimum) / scale)
    dead = scale == 0
    if bool(dead.any()):
        v = best.inverse_scale[dead] * (x[:, dead] - best.offset[dead])
        levels[:, dead] = nearest_int(v)
    return np.clip(levels, 0, 15)


def pack_scales(ls: Bytes, lm: Bytes) -> Bytes:
    """Eight 6-bit scales and minima [n, 8] in 12 bytes: the upper four's top bits ride above."""
    first = ls[:, :4] | (ls[:, 4:] >> 4) << 6
    second = lm[:, :4] | (lm[:, 4:] >> 4) << 6
    third = ls[:, 4:] & 15 | (lm[:, 4:] & 15) << 4
    return np.hstack([first, second, third])


def _unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    ls = np.hstack([first & 63, third & 15 | first >> 6 << 4])
    lm = np.hstack([second & 63, third >> 4 | second >> 6 << 4])
    return ls, lm


def _pack_nibbles(levels: I32) -> Bytes:
    """[32, m] -> [n, 128]: sub-blocks 2 k and 2 k + 1 share 32 bytes, low and high."""
    pairs = levels.T.astype(np.uint8).reshape(-1, 4, 2, 32)
    nibbles: Bytes = pairs[:, :, 0] | np.left_shift(pairs[:, :, 1], np.uint8(4))
    return nibbles.reshape(-1, 128)
