"""Q5_K: Q4_K with a fifth bit for each weight, in a plane of its own.

Bytes as ggml's scalar reference without FMA contraction gives them.
Source: ggml `quantize_row_q5_K_ref`, `dequantize_row_q5_K`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant.min_max_search import Grid, final_levels, search
from buildsys.quant.q3_k import bit_planes
from buildsys.quant.q4_k import (
    pack_nibbles,
    pack_scales,
    six_bits,
    times_six_bits,
    unpack_scales,
)
from buildsys.quant.rounding import F32, fp16_bytes, fp16_values

Bytes = npt.NDArray[np.uint8]

BLOCK_BYTES = 176
GRID = Grid(size=32, top=31, first=-0.5, steps=15)
_PLACES = np.arange(8, dtype=np.uint8)


def quantize_q5_k(x: F32) -> Bytes:
    """x [n, 256] float32 -> [n, 176] bytes: d, dmin, 12 bytes of scales, fifth bits, nibbles."""
    columns = np.ascontiguousarray(x.reshape(-1, GRID.size).T)
    best = search(columns, GRID)
    d, ls = six_bits(best.scale.reshape(-1, 8))
    dmin, lm = six_bits(-best.minimum.reshape(-1, 8))
    stored = times_six_bits(d, ls), times_six_bits(dmin, lm)
    return pack(d, ls, dmin, lm, final_levels(columns, best, *stored, GRID))


def pack(d: F32, ls: Bytes, dmin: F32, lm: Bytes, levels: Bytes) -> Bytes:
    """Blocks [n, 176] of factors [n], 6-bit multiples [n, 8] and levels [8 n, 32]."""
    fifth = bit_planes(levels.reshape(-1, 8, 32) >> np.uint8(4))
    scales = [fp16_bytes(d), fp16_bytes(dmin), pack_scales(ls, lm)]
    return np.hstack([*scales, fifth, pack_nibbles(levels & np.uint8(15))])


def dequantize_q5_k(blocks: Bytes) -> F32:
    """[n, 176] -> [n, 256]: d * scale * level - dmin * minimum."""
    ls, lm = unpack_scales(blocks[:, 4:16])
    scale = fp16_values(blocks[:, 0:2])[:, None] * ls.astype(np.float32)
    minimum = fp16_values(blocks[:, 2:4])[:, None] * lm.astype(np.float32)
    pairs = blocks[:, 48:].reshape(-1, 4, 1, 32)
    nibbles = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    fifth = blocks[:, 16:48].reshape(-1, 1, 32) >> _PLACES[:, None] & 1
    levels = (nibbles | fifth << 4).astype(np.float32)
    y: F32 = scale[:, :, None] * levels - minimum[:, :, None]
    return y.reshape(-1, 256)
