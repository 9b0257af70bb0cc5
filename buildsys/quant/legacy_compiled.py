"""Q4_0 and Q8_0 compiled, a block of 32 weights after the other.

The bytes of `legacy_blocks`; a block whose scale is subnormal, overflows or is NaN is given to it.
Magnitudes are compared as whole numbers, which order floats as they are ordered: unlike a maximum
of floats that is a reduction which the compiler may spread over a vector.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant import legacy_blocks
from buildsys.quant.compiled import compiled
from buildsys.quant.rounding import F32, I32, fp16_bytes

Bytes = npt.NDArray[np.uint8]

_WIDTH = 32
_MAGNITUDE, _SIGN = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
_ZERO, _ONE = np.float32(0), np.float32(1)
_SHIFT, _TOP, _DIVISOR = np.float32(8.5), np.float32(15), np.float32(-8)
_SIGNED_TOP = np.float32(127)
_BELOW_HALF = legacy_blocks.BELOW_HALF


def quantize_q4_0(x: F32) -> Bytes:
    """x [n, 32] -> [n, 18]."""
    blocks, odd = _run(x, 18, _q4_0)
    if odd.any():
        blocks[odd] = legacy_blocks.quantize_q4_0(x[odd])
    return blocks


def quantize_q8_0(x: F32) -> Bytes:
    """x [n, 32] -> [n, 34]."""
    blocks, odd = _run(x, 34, _q8_0)
    if odd.any():
        blocks[odd] = legacy_blocks.quantize_q8_0(x[odd])
    return blocks


def _run(x: F32, size: int, kernel: object) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Blocks [n, size], and which of them the kernel has not made right."""
    x = np.ascontiguousarray(x)
    blocks = np.empty((len(x), size), dtype=np.uint8)
    d = np.empty(len(x), dtype=np.float32)
    assert callable(kernel)
    kernel(x, x.view(np.int32), blocks, d)
    blocks[:, :2] = fp16_bytes(d)
    return blocks, ~np.isfinite(np.float32(1) / d) & (d != 0)


@compiled
def _q4_0(x: F32, bits: I32, blocks: Bytes, d: F32) -> None:
    for block in range(len(d)):
        up = down = np.int32(0)  # the largest positive and negative magnitude
        for i in range(_WIDTH):
            up = max(up, bits[block, i])
            down = max(down, bits[block, i] ^ _SIGN)
        largest = max(up, down)
        first = 0
        if up == down:  # both signs: the first one counts
            while bits[block, first] & _MAGNITUDE != largest:
                first += 1
            down = np.int32(0) if bits[block, first] == up else down
        peak = np.int32(up if up > down else down ^ _SIGN).view(np.float32)
        scale = (peak if largest else _ZERO) / _DIVISOR
        d[block] = scale
        inverse = _ONE / scale if scale != _ZERO else _ZERO
        for j in range(16):
            low = min(x[block, j] * inverse + _SHIFT, _TOP)
            high = min(x[block, j + 16] * inverse + _SHIFT, _TOP)
            blocks[block, 2 + j] = np.uint8(np.int32(low) | np.int32(high) << 4)


@compiled
def _q8_0(x: F32, bits: I32, blocks: Bytes, d: F32) -> None:
    for block in range(len(d)):
        largest = np.int32(0)
        for i in range(_WIDTH):
            largest = max(largest, bits[block, i] & _MAGNITUDE)
        scale = np.int32(largest).view(np.float32) / _SIGNED_TOP
        d[block] = scale
        inverse = _ONE / scale if scale != _ZERO else _ZERO
        for j in range(_WIDTH):
            v = x[block, j] * inverse
            v += _BELOW_HALF if v >= _ZERO else -_BELOW_HALF
            blocks[block, 2 + j] = np.uint8(np.int32(v))
