"""Q4_0 and Q8_0: 32 weights, one float16 scale. Bytes as ggml's reference quantizers give.

Source: ggml `quantize_row_q4_0_ref`, `quantize_row_q8_0_ref` and their dequantizers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant.rounding import F32, fp16_bytes, fp16_values

Bytes = npt.NDArray[np.uint8]

# The float32 before 0.5: trunc(v + copysign(it, v)) is C's roundf for every v, where 0.5 itself
# would take 0.49999997 up to 1.
BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))


def quantize_q4_0(x: F32) -> Bytes:
    """x [n, 32] -> [n, 18]: scale, then 16 bytes with weight j low and weight j + 16 high."""
    columns = np.ascontiguousarray(x.T)
    d = _peak(columns) / np.float32(-8)
    scaled = columns * _inverse(d)
    scaled += np.float32(8.5)
    levels = np.minimum(_levels(scaled), np.uint8(15))
    return _blocks(d, levels[:16] | levels[16:] << 4)


def dequantize_q4_0(blocks: Bytes) -> F32:
    """[n, 18] -> [n, 32]: (level - 8) * scale."""
    nibbles = np.hstack([blocks[:, 2:] & 15, blocks[:, 2:] >> 4])
    return (nibbles.astype(np.float32) - np.float32(8)) * fp16_values(blocks[:, :2])[:, None]


def quantize_q8_0(x: F32) -> Bytes:
    """x [n, 32] -> [n, 34]: scale, then 32 signed bytes; halves are rounded away from zero."""
    columns = np.ascontiguousarray(x.T)
    d: F32 = np.divide(np.abs(_peak(columns)), np.float32(127))
    scaled = columns * _inverse(d)
    scaled += np.copysign(BELOW_HALF, scaled)
    return _blocks(d, _levels(scaled))


def dequantize_q8_0(blocks: Bytes) -> F32:
    """[n, 34] -> [n, 32]: level * scale."""
    levels = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)
    return levels * fp16_values(blocks[:, :2])[:, None]


def _peak(columns: F32) -> F32:
    """The first value of largest magnitude of every column of [32, n]."""
    low, high = columns.min(axis=0), columns.max(axis=0)
    peak: F32 = np.where(-low > high, low, high)
    tied = np.flatnonzero(-low == high)
    first = np.abs(columns[:, tied]).argmax(axis=0)
    peak[tied] = columns[first, tied]
    return peak + np.float32(0)  # -0 becomes 0, as C's maximum starts there


def _inverse(d: F32) -> F32:
    """1 / d, and 0 where d is 0; a subnormal d gives infinity, as in C."""
    return np.where(d != 0, np.float32(1) / d, np.float32(0))


def _levels(v: F32) -> Bytes:
    """C's (int8_t) v as a byte: truncated; what is not finite becomes 0, as x86 converts it."""
    if not np.isfinite(v).all():
        v = np.where(np.isfinite(v), v, np.float32(0))
    return v.astype(np.int8).view(np.uint8)


def _blocks(d: F32, payload: Bytes) -> Bytes:
    """Scales [n] and payload columns [bytes, n] as blocks [n, 2 + bytes]."""
    blocks = np.empty((len(d), 2 + len(payload)), dtype=np.uint8)
    blocks[:, :2] = fp16_bytes(d)
    blocks[:, 2:] = payload.T
    return blocks
