"""Q4_K: 256 weights in 8 sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum.

Bytes as ggml's scalar reference without FMA contraction gives them.
Source: ggml `quantize_row_q4_K_ref`, `dequantize_row_q4_K`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant.min_max_search import Grid, final_levels, search
from buildsys.quant.rounding import F32, fp16_bytes, fp16_values, nearest_int

Bytes = npt.NDArray[np.uint8]

BLOCK_BYTES = 144
GRID = Grid(size=32, top=15, first=-1, steps=20)


def quantize_q4_k(x: F32) -> Bytes:
    """x [n, 256] float32 -> [n, 144] bytes: d, dmin (float16), 12 bytes of scales, nibbles."""
    columns = np.ascontiguousarray(x.reshape(-1, GRID.size).T)
    best = search(columns, GRID)
    scales, minima = best.scale.reshape(-1, 8), (-best.minimum).reshape(-1, 8)
    d, ls = six_bits(scales)
    dmin, lm = six_bits(minima)
    stored = times_six_bits(d, ls), times_six_bits(dmin, lm)
    return pack(d, ls, dmin, lm, final_levels(columns, best, *stored, GRID))


def pack(d: F32, ls: Bytes, dmin: F32, lm: Bytes, levels: Bytes) -> Bytes:
    """Blocks [n, 144] of factors [n], 6-bit multiples [n, 8] and levels [8 n, 32]."""
    scales = [fp16_bytes(d), fp16_bytes(dmin), pack_scales(ls, lm)]
    return np.hstack([*scales, pack_nibbles(levels)])


def dequantize_q4_k(blocks: Bytes) -> F32:
    """[n, 144] -> [n, 256]: d * scale * level - dmin * minimum."""
    ls, lm = unpack_scales(blocks[:, 4:16])
    scale = fp16_values(blocks[:, 0:2])[:, None] * ls.astype(np.float32)
    minimum = fp16_values(blocks[:, 2:4])[:, None] * lm.astype(np.float32)
    pairs = blocks[:, 16:].reshape(-1, 4, 1, 32)
    levels = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    y = scale[:, :, None] * levels.astype(np.float32) - minimum[:, :, None]
    return y.reshape(-1, 256)


def six_bits(values: F32) -> tuple[F32, Bytes]:
    """[n, 8] -> (the super-block's factor [n], 6-bit multiples of it [n, 8])."""
    largest = np.maximum(values.max(axis=1), np.float32(0))
    inverse = np.where(largest > 0, np.float32(63) / largest, np.float32(0))
    multiples = nearest_int(inverse[:, None] * values).astype(np.uint8)
    return largest / np.float32(63), np.minimum(multiples, np.uint8(63))


def times_six_bits(factor: F32, multiples: Bytes) -> F32:
    """What is stored stands for: the factor [n], as float16, times the multiples [n, 8]; [8 n]."""
    return (fp16_values(fp16_bytes(factor))[:, None] * multiples.astype(np.float32)).reshape(-1)


def pack_scales(ls: Bytes, lm: Bytes) -> Bytes:
    """Eight 6-bit scales and minima [n, 8] in 12 bytes: the upper four's top bits ride above."""
    first = ls[:, :4] | (ls[:, 4:] >> 4) << 6
    second = lm[:, :4] | (lm[:, 4:] >> 4) << 6
    third = ls[:, 4:] & 15 | (lm[:, 4:] & 15) << 4
    return np.hstack([first, second, third])


def unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The inverse: 12 bytes [n, 12] -> scales and minima [n, 8]."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    ls = np.hstack([first & 63, third & 15 | first >> 6 << 4])
    lm = np.hstack([second & 63, third >> 4 | second >> 6 << 4])
    return ls, lm


def pack_nibbles(levels: Bytes) -> Bytes:
    """Nibbles [8 n, 32] -> [n, 128]: sub-blocks 2 k and 2 k + 1 share 32 bytes, low and high."""
    pairs = levels.reshape(-1, 4, 2, 32)
    nibbles: Bytes = pairs[:, :, 0] | np.left_shift(pairs[:, :, 1], np.uint8(4))
    return nibbles.reshape(-1, 128)
