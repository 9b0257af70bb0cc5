"""Q4_0 and Q8_0 with 16 blocks side by side, one in each lane of a vector.

The bytes of `legacy_blocks`; a block whose scale is subnormal or overflows is given to it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant import legacy_blocks
from buildsys.quant.compiled import compiled
from buildsys.quant.rounding import F32, I32, fp16_bytes

Bytes = npt.NDArray[np.uint8]

_LANES = 16
# x [32, lanes], then one value per lane.
_PEAK, _LARGEST, _INVERSE, _MASK = ((32 + part) * _LANES for part in range(4))
_SCRATCH = (32 + 4) * _LANES

_ZERO, _ONE = np.float32(0), np.float32(1)
_SHIFT, _TOP, _DIVISOR = np.float32(8.5), np.float32(15), np.float32(-8)
_SIGNED_TOP = np.float32(127)
_BELOW_HALF = legacy_blocks.BELOW_HALF


def quantize_q4_0(x: F32) -> Bytes:
    """x [n, 32] -> [n, 18]."""
    blocks, d = _run(x, 18, _q4_0)
    odd = ~np.isfinite(np.float32(1) / d) & (d != 0)
    if odd.any():
        blocks[odd] = legacy_blocks.quantize_q4_0(x[odd])
    return blocks


def quantize_q8_0(x: F32) -> Bytes:
    """x [n, 32] -> [n, 34]."""
    blocks, d = _run(x, 34, _q8_0)
    odd = ~np.isfinite(np.float32(1) / d) & (d != 0)
    if odd.any():
        blocks[odd] = legacy_blocks.quantize_q8_0(x[odd])
    return blocks


def _run(x: F32, size: int, kernel: object) -> tuple[Bytes, F32]:
    count = len(x)
    padded = -count % _LANES
    if padded:
        x = np.concatenate([x, np.ones((padded, 32), dtype=np.float32)])
    blocks = np.empty((len(x), size), dtype=np.uint8)
    d = np.empty(len(x), dtype=np.float32)
    assert callable(kernel)
    kernel(np.ascontiguousarray(x), blocks, d, _LANES)
    blocks[:, :2] = fp16_bytes(d)
    return blocks[:count], d[:count]


@compiled
def _load(x: F32, first: int, S: F32, bits: I32, lanes: int) -> None:
    """16 blocks of x, and the first value of largest magnitude of each."""
    for lane in range(_LANES):
        for i in range(32):
            S[i * _LANES + lane] = x[first + lane, i]
    for lane in range(lanes):
        S[_PEAK + lane] = _ZERO
        S[_LARGEST + lane] = _ZERO
    for i in range(0, 32 * _LANES, _LANES):
        for lane in range(lanes):
            bits[_MASK + lane] = -np.int32(abs(S[i + lane]) > S[_LARGEST + lane])
        for lane in range(lanes):
            larger, value = bits[_MASK + lane], bits[i + lane]
            bits[_PEAK + lane] = value & larger | bits[_PEAK + lane] & ~larger
            size = value & np.int32(0x7FFFFFFF)
            bits[_LARGEST + lane] = size & larger | bits[_LARGEST + lane] & ~larger


@compiled
def _q4_0(x: F32, blocks: Bytes, d: F32, lanes: int) -> None:
    S = np.empty(_SCRATCH, dtype=np.float32)
    bits = S.view(np.int32)
    for first in range(0, len(d), _LANES):
        _load(x, first, S, bits, lanes)
        for lane in range(_LANES):
            scale = S[_PEAK + lane] / _DIVISOR
            d[first + lane] = scale
            inverse = _ONE / scale if scale != _ZERO else _ZERO
            for j in range(16):
                low = min(x[first + lane, j] * inverse + _SHIFT, _TOP)
                high = min(x[first + lane, j + 16] * inverse + _SHIFT, _TOP)
                nibbles = np.int32(low) | np.int32(high) << 4
                blocks[first + lane, 2 + j] = np.uint8(nibbles)


@compiled
def _q8_0(x: F32, blocks: Bytes, d: F32, lanes: int) -> None:
    S = np.empty(_SCRATCH, dtype=np.float32)
    bits = S.view(np.int32)
    for first in range(0, len(d), _LANES):
        _load(x, first, S, bits, lanes)
        for lane in range(_LANES):
            scale = S[_LARGEST + lane] / _SIGNED_TOP
            d[first + lane] = scale
            inverse = _ONE / scale if scale != _ZERO else _ZERO
            for j in range(32):
                v = x[first + lane, j] * inverse
                v += _BELOW_HALF if v >= _ZERO else -_BELOW_HALF
                blocks[first + lane, 2 + j] = np.uint8(np.int32(v))
