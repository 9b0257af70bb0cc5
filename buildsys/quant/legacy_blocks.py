"""Q4_0 and Q8_0: 32 weights, one float16 scale. Bytes as ggml's reference quantizers give.

Source: ggml `quantize_row_q4_0_ref`, `quantize_row_q8_0_ref` and their dequantizers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant.rounding import F32, fp16_bytes, fp16_values

Bytes = npt.NDArray[np.uint8]

_HALF = np.float32(0.5)


def quantize_q4_0(x: F32) -> Bytes:
    """x [n, 32] -> [n, 18]: scale, then 16 bytes with weight j low and weight j + 16 high."""
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    d = peak / np.float32(-8)
    levels = _levels(x * _inverse(d) + np.float32(8.5))
    levels = np.minimum(levels, np.uint8(15))
    return np.hstack([fp16_bytes(d[:, 0]), levels[:, :16] | levels[:, 16:] << 4])


def dequantize_q4_0(blocks: Bytes) -> F32:
    """[n, 18] -> [n, 32]: (level - 8) * scale."""
    nibbles = np.hstack([blocks[:, 2:] & 15, blocks[:, 2:] >> 4])
    return (nibbles.astype(np.float32) - np.float32(8)) * fp16_values(blocks[:, :2])[:, None]


def quantize_q8_0(x: F32) -> Bytes:
    """x [n, 32] -> [n, 34]: scale, then 32 signed bytes; halves are rounded away from zero."""
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    # trunc(v + copysign(0.5, v)) is C's roundf but for 0.49999997, whose sum rounds up to 1.
    rounded = np.trunc(scaled + np.copysign(_HALF, scaled))
    rounded[np.abs(scaled) < _HALF] = 0.0
    return np.hstack([fp16_bytes(d[:, 0]), _levels(rounded)])


def dequantize_q8_0(blocks: Bytes) -> F32:
    """[n, 34] -> [n, 32]: level * scale."""
    levels = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)
    return levels * fp16_values(blocks[:, :2])[:, None]


def _inverse(d: F32) -> F32:
    """1 / d, and 0 where d is 0; a subnormal d gives infinity, as in C."""
    return np.where(d != 0, np.float32(1) / d, np.float32(0))


def _levels(v: F32) -> Bytes:
    """C's (int8_t) v as a byte: truncated; what is not finite becomes 0, as x86 converts it."""
    return np.where(np.isfinite(v), v, np.float32(0)).astype(np.int8).view(np.uint8)
