"""Q3_K: 256 weights in 16 sub-blocks of 16, each with a 6-bit scale; levels -4 .. 3.

A sub-block's levels are improved one after the other (`level_steps`). Bytes as ggml's scalar
reference without FMA contraction gives them.
Source: ggml `quantize_row_q3_K_ref`, `make_q3_quants`, `dequantize_row_q3_K`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant.level_steps import step_levels
from buildsys.quant.q2_k import pack_pairs, unpack_pairs
from buildsys.quant.q6_k import ZERO
from buildsys.quant.rounding import F32, I32, fp16_bytes, fp16_values, nearest_int

Bytes = npt.NDArray[np.uint8]

BLOCK_BYTES = 110
_HALF_RANGE = 4
_BITS = np.arange(8, dtype=np.uint8)[:, None]


def quantize_q3_k(x: F32) -> Bytes:
    """x [n, 256] float32 -> [n, 110] bytes: high bits, low pairs, 12 bytes of scales, d."""
    columns = np.ascontiguousarray(x.reshape(-1, 16).T)
    scale, searched = _search(columns)
    d, multiples = super_scale(scale.reshape(-1, 16))
    stored = times_multiples(d, multiples)
    levels = _clipped(nearest_int(columns / stored)) + _HALF_RANGE
    # Where the stored scale is zero C leaves the levels of the search.
    dead = stored == 0
    levels[:, dead] = searched[:, dead]
    return pack(d, multiples, np.ascontiguousarray(levels.T).astype(np.uint8))


def _search(x: F32) -> tuple[F32, I32]:
    """make_q3_quants(16, 4, .., true) for x [16, m]: scale [m] and levels 0 .. 7 [16, m].

    A group that counts as zero has scale 0 and levels 0, not in the middle.
    """
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    weight = x * x
    levels = _clipped(nearest_int((np.float32(-_HALF_RANGE) / peak) * x)).astype(np.float32)
    sum_xl, sum_l2 = step_levels(x, weight, levels, _clipped, alone=True)
    scale: F32 = np.where(sum_l2 > 0, sum_xl / sum_l2, np.float32(0))
    empty = np.abs(peak) < ZERO
    scale[empty] = 0
    found = levels.astype(np.int32) + _HALF_RANGE
    found[:, empty] = 0
    return scale, found


def super_scale(scales: F32) -> tuple[F32, npt.NDArray[np.int8]]:
    """[n, 16] -> d [n] and its multiples -32 .. 31 [n, 16]; -32 all over where d is 0."""
    # C compares with >, which no NaN passes.
    known = np.where(np.isnan(scales), np.float32(0), scales)
    largest = np.take_along_axis(known, np.abs(known).argmax(axis=1)[:, None], axis=1)
    inverse: F32 = np.divide(np.float32(-32), largest)
    # C narrows to eight bits before it clips.
    narrow = nearest_int(inverse * scales).astype(np.int8)
    multiples = np.clip(narrow, -32, 31).astype(np.int8)
    nothing = largest[:, 0] == 0
    multiples[nothing] = -32
    d: F32 = np.where(nothing, np.float32(0), np.float32(1) / inverse[:, 0])
    return d, multiples


def times_multiples(d: F32, multiples: npt.NDArray[np.int8]) -> F32:
    """What is stored stands for: d [n], as float16, times the multiples [n, 16]; [16 n]."""
    return (fp16_values(fp16_bytes(d))[:, None] * multiples.astype(np.float32)).reshape(-1)


def _clipped(levels: I32) -> I32:
    return np.clip(levels, -_HALF_RANGE, _HALF_RANGE - 1)


def pack(d: F32, multiples: npt.NDArray[np.int8], levels: Bytes) -> Bytes:
    """Blocks [n, 110] of d [n], multiples [n, 16] and levels 0 .. 7 [16 n, 16]."""
    mask = bit_planes(levels.reshape(-1, 8, 32) >> np.uint8(2))
    scales = _pack_scales((multiples + 32).astype(np.uint8))
    return np.hstack([mask, pack_pairs(levels & np.uint8(3)), scales, fp16_bytes(d)])


def bit_planes(bits: Bytes) -> Bytes:
    """Bits [n, 8, 32] -> [n, 32]: run i of 32 weights is bit i of each byte."""
    planes = bits[:, 0].copy()
    for place in range(1, 8):
        planes |= bits[:, place] << np.uint8(place)
    return planes


def _pack_scales(six: Bytes) -> Bytes:
    """Sixteen 6-bit numbers [n, 16] in 12 bytes: low nibbles two by two, high pairs by four."""
    low = six[:, :8] & 15 | (six[:, 8:] & 15) << 4
    quarters = six.reshape(-1, 4, 4) >> 4 << _BITS[:4] * np.uint8(2)
    high: Bytes = np.bitwise_or.reduce(quarters, axis=1)
    return np.hstack([low, high])


def _unpack_scales(packed: Bytes) -> Bytes:
    low = np.hstack([packed[:, :8] & 15, packed[:, :8] >> 4])
    high = packed[:, None, 8:] >> _BITS[:4] * np.uint8(2) & 3
    six: Bytes = low | high.reshape(-1, 16) << 4
    return six


def dequantize_q3_k(blocks: Bytes) -> F32:
    """[n, 110] -> [n, 256]: d * scale * (level - 4)."""
    multiples = _unpack_scales(blocks[:, 96:108]).astype(np.float32) - np.float32(32)
    scale = fp16_values(blocks[:, 108:])[:, None] * multiples
    high = blocks[:, :32].reshape(-1, 1, 32) >> _BITS & 1
    levels = unpack_pairs(blocks[:, 32:96]) | high.reshape(-1, 16, 16) << 2
    y: F32 = scale[:, :, None] * (levels.astype(np.float32) - np.float32(_HALF_RANGE))
    return y.reshape(-1, 256)
