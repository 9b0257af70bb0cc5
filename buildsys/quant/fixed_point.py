"""Integer arithmetic of the Hexagon kernels (templates/hexagon_kernels.c), element by element.

A real factor is a 32-bit multiplier and two shifts; rounding is to the nearest, halves upwards,
and results saturate. Every function gives exactly what the kernel of the same name gives.
Source: the multiplier and shift are those of gemmlowp and TFLite's int8 specification; vmpye,
vmpyo and vrmpy are described in Qualcomm's Hexagon HVX Programmer's Reference Manual.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from buildsys.quant.errors import QuantError

Int8: TypeAlias = npt.NDArray[np.int8]
Int16: TypeAlias = npt.NDArray[np.int16]
Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]


class FixedScale(NamedTuple):
    """multiplier * 2^(left - right - 31), then plus zero_point. multiplier: 2^30 .. 2^31 - 1,
    or 0; left, right: 0 .. 31."""

    multiplier: int
    left: int
    right: int
    zero_point: int = 0

    @property
    def factor(self) -> float:
        return math.ldexp(self.multiplier, self.left - self.right - 31)


def fixed_scale(factor: float, headroom: int = 0, zero_point: int = 0) -> FixedScale:
    """The integers that are nearest to a factor >= 0.

    headroom: by how many bits values may be shifted left before they are multiplied (15 for
    int16 in 32 bits, 23 for int8); it keeps small values exact.
    Raises QuantError for a factor that 31 bits of shift do not reach.
    """
    if factor == 0:
        return FixedScale(0, 0, 0, zero_point)
    if not 0 < factor < math.inf:
        raise QuantError(f"{factor} is no factor of a scale")
    mantissa, exponent = math.frexp(factor)
    multiplier = round(math.ldexp(mantissa, 31))
    if multiplier == 1 << 31:
        multiplier, exponent = 1 << 30, exponent + 1
    left = max(min(headroom, 31 + exponent), exponent, 0)
    right = left - exponent
    if left > 31 or right > 31:
        raise QuantError(f"the factor {factor} has no multiplier and shifts of 32 bits")
    return FixedScale(multiplier, left, right, zero_point)


def scaled(values: Int64, scale: FixedScale) -> Int64:
    """int32 values times the factor, in int64; the zero point is not added."""
    multiplier = np.int64(scale.multiplier)
    return _scaled(_wrapped(values << scale.left), multiplier, np.int64(scale.right))


def _scaled(values: Int64, multiplier: Int64 | np.int64, right: Int64 | np.int64) -> Int64:
    high = _saturated((values * multiplier + (1 << 30)) >> 31, 32)
    return _saturated(high + ((np.int64(1) << right) >> 1), 32) >> right


def _wrapped(values: Int64) -> Int64:
    return values.astype(np.int32).astype(np.int64)


def _saturated(values: Int64, bits: int) -> Int64:
    return np.clip(values, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _to_int8(values: Int64, zero_point: int) -> Int8:
    return _saturated(values + zero_point, 8).astype(np.int8)


def quantize(x: Int16, scale: FixedScale) -> Int8:
    """x times the factor, plus the zero point."""
    return _to_int8(scaled(x.astype(np.int64), scale), scale.zero_point)


def dequantize_add(x: Int8, x_zero_point: int, residual: Int16, scale: FixedScale) -> Int16:
    """residual + (x - x_zero_point) times the factor."""
    part = _saturated(scaled(x.astype(np.int64) - x_zero_point, scale), 16)
    return _saturated(residual + part, 16).astype(np.int16)


def matmul(
    x: Int8, weights: Int8, bias: Int32, multiplier: Int32, right: Int32, zero_point: int
) -> Int8:
    """x [rows, k] times weights [n, k] transposed, requantized per output.

    bias, multiplier, right: [n]. Sums must fit in 32 bits: they wrap, as vrmpy's do.
    """
    sums = x.astype(np.int64) @ weights.astype(np.int64).T + bias.astype(np.int64)
    done = _scaled(_wrapped(sums), multiplier.astype(np.int64), right.astype(np.int64))
    return _to_int8(_saturated(done + zero_point, 32), 0)


def silu_table(gate_scale: float, gate_zero_point: int, entry_scale: float) -> Int16:
    """SiLU of every value that a gate byte may stand for, by the byte read as unsigned, in units
    of entry_scale [256]."""
    byte = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)
    gate = (byte - gate_zero_point) * gate_scale
    silu = gate / (1.0 + np.exp(-gate))
    return np.clip(np.rint(silu / entry_scale), -32768, 32767).astype(np.int16)


def silu_multiply(
    gate: Int8, up: Int8, up_zero_point: int, table: Int16, scale: FixedScale
) -> Int8:
    """table[gate] * (up - up_zero_point) times the factor, plus the zero point."""
    silu = table[gate.view(np.uint8)].astype(np.int64)
    done = scaled(silu * (up.astype(np.int64) - up_zero_point), scale)
    return _to_int8(_saturated(_saturated(done + scale.zero_point, 32), 16), 0)


def rms_norm(x: Int16, weight: Int16, epsilon: int, scale: FixedScale) -> Int8:
    """x [rows, width] * weight [width] / sqrt(sum of squares + epsilon) times the factor, plus the
    zero point. The factor holds the square root of the width; epsilon is in units of the sum."""
    rows = []
    for row in x.astype(np.int64):
        own = over_root(scale, int((row * row).sum()) + epsilon)
        rows.append(_to_int8(scaled(row * weight.astype(np.int64), own), scale.zero_point))
    return np.stack(rows)


def over_root(scale: FixedScale, total: int) -> FixedScale:
    """scale / sqrt(total), with 31 bits of its own; 0 where there is nothing to scale."""
    if total == 0 or scale.multiplier == 0:
        return FixedScale(0, 0, 0, scale.zero_point)
    up = 0
    while total < 1 << 62:
        total, up = total << 2, up + 1
    product = ((1 << 62) - 1) // math.isqrt(total) * scale.multiplier
    drop = 31 if product >> 61 else 30
    multiplier = min((product + (1 << (drop - 1))) >> drop, (1 << 31) - 1)
    exponent = up + scale.left - scale.right + drop - 62
    if exponent < -31:
        return FixedScale(0, 0, 0, scale.zero_point)
    return FixedScale(multiplier, min(max(exponent, 0), 31), max(-exponent, 0), scale.zero_point)
