"""Q2_K: 256 weights in 16 sub-blocks of 16, each with a 4-bit scale and a 4-bit minimum.

Bytes as ggml's scalar reference without FMA contraction gives them.
Source: ggml `quantize_row_q2_K_ref`, `dequantize_row_q2_K`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant.min_max_search import Grid, final_levels, search
from buildsys.quant.rounding import F32, fp16_bytes, fp16_values, nearest_int

Bytes = npt.NDArray[np.uint8]

BLOCK_BYTES = 84
GRID = Grid(size=16, top=3, first=-0.5, steps=15, absolute=True)
_SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)[:, None]


def quantize_q2_k(x: F32) -> Bytes:
    """x [n, 256] float32 -> [n, 84] bytes: 16 bytes of scales and minima, levels, d, dmin."""
    columns = np.ascontiguousarray(x.reshape(-1, GRID.size).T)
    best = search(columns, GRID)
    d, ls = four_bits(best.scale.reshape(-1, 16))
    dmin, lm = four_bits(-best.minimum.reshape(-1, 16))
    stored = times_four_bits(d, ls), times_four_bits(dmin, lm)
    return pack(d, ls, dmin, lm, final_levels(columns, best, *stored, GRID))


def four_bits(values: F32) -> tuple[F32, Bytes]:
    """[n, 16] -> (the super-block's factor [n], 4-bit multiples of it [n, 16])."""
    largest = np.maximum(values.max(axis=1), np.float32(0))
    inverse = np.where(largest > 0, np.float32(15) / largest, np.float32(0))
    multiples = nearest_int(inverse[:, None] * values).astype(np.uint8)
    return largest / np.float32(15), multiples


def times_four_bits(factor: F32, multiples: Bytes) -> F32:
    """What is stored stands for: the factor [n], as float16, times the multiples' low four bits
    [n, 16]; [16 n]."""
    kept = (multiples & 15).astype(np.float32)
    return (fp16_values(fp16_bytes(factor))[:, None] * kept).reshape(-1)


def pack(d: F32, ls: Bytes, dmin: F32, lm: Bytes, levels: Bytes) -> Bytes:
    """Blocks [n, 84] of factors [n], multiples [n, 16] and levels [16 n, 16]."""
    scales = ls | np.left_shift(lm, np.uint8(4))
    return np.hstack([scales, pack_pairs(levels), fp16_bytes(d), fp16_bytes(dmin)])


def pack_pairs(levels: Bytes) -> Bytes:
    """Two bits each, [16 n, 16] -> [n, 64]: four runs of 32 weights share 32 bytes."""
    runs = levels.reshape(-1, 2, 4, 32)
    pairs: Bytes = runs[:, :, 0].copy()
    for place in (1, 2, 3):
        pairs |= runs[:, :, place] << np.uint8(2 * place)
    return pairs.reshape(-1, 64)


def unpack_pairs(pairs: Bytes) -> Bytes:
    """The inverse: [n, 64] -> [n, 16, 16]."""
    spread: Bytes = (pairs.reshape(-1, 2, 1, 32) >> _SHIFTS) & np.uint8(3)
    return spread.reshape(-1, 16, 16)


def dequantize_q2_k(blocks: Bytes) -> F32:
    """[n, 84] -> [n, 256]: d * scale * level - dmin * minimum."""
    ls, lm = blocks[:, :16] & 15, blocks[:, :16] >> 4
    scale = fp16_values(blocks[:, 80:82])[:, None] * ls.astype(np.float32)
    minimum = fp16_values(blocks[:, 82:84])[:, None] * lm.astype(np.float32)
    levels = unpack_pairs(blocks[:, 16:80]).astype(np.float32)
    y = scale[:, :, None] * levels - minimum[:, :, None]
    return y.reshape(-1, 256)
