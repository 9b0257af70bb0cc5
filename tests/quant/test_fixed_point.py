"""The fixed-point reference against real arithmetic: at most half a step off, and a little."""

from __future__ import annotations

import numpy as np
import pytest

from buildsys.quant import fixed_point as fp
from buildsys.quant.errors import QuantError

RNG = np.random.default_rng(7)
HALF_STEP = 0.5 + 2e-3  # rounded once; the multiplier and a first rounding give the rest


def off(got: np.ndarray, real: np.ndarray, bits: int) -> float:
    """The greatest distance from the real result, saturated, in steps."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return float(np.abs(got - np.clip(real, low, high)).max())


@pytest.mark.parametrize("factor", [1e-6, 0.1, 0.5, 0.99999999999, 1.0, 7.3])
def test_a_factor_is_held_to_31_bits(factor: float) -> None:
    scale = fp.fixed_scale(factor)
    assert abs(scale.factor / factor - 1) <= 2**-31
    assert 2**30 <= scale.multiplier < 2**31


def test_a_factor_that_does_not_fit_is_refused() -> None:
    for factor in (-1.0, 2.0**40, 2.0**-40, float("nan"), float("inf")):
        with pytest.raises(QuantError, match=r"no multiplier|is no factor"):
            fp.fixed_scale(factor)


def test_halves_round_upwards() -> None:
    half = fp.fixed_scale(0.5, headroom=15)
    values = np.array([-3, -1, 1, 3, 5], np.int16)
    np.testing.assert_array_equal(fp.quantize(values, half), [-1, 0, 1, 2, 3])


@pytest.mark.parametrize("factor", [0.7, 0.0039, 1.5e-3])
def test_quantize_is_half_a_step_off_at_most(factor: float) -> None:
    x = RNG.integers(-32768, 32768, 4096).astype(np.int16)
    got = fp.quantize(x, fp.fixed_scale(factor, headroom=15, zero_point=3))
    assert off(got, x * factor + 3, 8) <= HALF_STEP


def test_dequantize_add_is_half_a_step_off_at_most() -> None:
    x = RNG.integers(-128, 128, 4096).astype(np.int8)
    residual = RNG.integers(-32768, 32768, 4096).astype(np.int16)
    got = fp.dequantize_add(x, -5, residual, fp.fixed_scale(13.37, headroom=20))
    assert off(got, residual + (x.astype(float) + 5) * 13.37, 16) <= HALF_STEP


def test_matmul_with_zero_points_in_its_bias_is_half_a_step_off_at_most() -> None:
    rows, k, n, sx, x_zero, sy, y_zero = 6, 256, 64, 0.031, 17, 0.11, -9
    x = RNG.integers(-128, 128, (rows, k)).astype(np.int8)
    weights = RNG.integers(-127, 128, (n, k)).astype(np.int8)
    sw = RNG.uniform(1e-3, 4e-3, n)
    b = RNG.normal(size=n)
    bias = np.rint(b / (sx * sw) - x_zero * weights.astype(np.int64).sum(1)).astype(np.int32)
    scales = [fp.fixed_scale(float(f)) for f in sx * sw / sy]
    multiplier = np.array([each.multiplier for each in scales], np.int32)
    right = np.array([each.right for each in scales], np.int32)
    got = fp.matmul(x, weights, bias, multiplier, right, y_zero)
    real = (x.astype(float) - x_zero) * sx @ (weights * sw[:, None]).T + b
    # Besides the rounding: the bias is a whole number of sx * sw, and there are two roundings.
    assert off(got, real / sy + y_zero, 8) <= 0.5 + float((sx * sw / sy).max()) / 2 + 2e-3


def test_silu_multiply_follows_silu() -> None:
    gate_scale, gate_zero, up_scale, up_zero, y_scale, y_zero = 0.06, 5, 0.02, -8, 0.12, 1
    gate, up = (RNG.integers(-128, 128, 4096).astype(np.int8) for _ in range(2))
    entry = 7.4 / 32767
    table = fp.silu_table(gate_scale, gate_zero, entry)
    scale = fp.fixed_scale(entry * up_scale / y_scale, headroom=7, zero_point=y_zero)
    got = fp.silu_multiply(gate, up, up_zero, table, scale)
    g = (gate.astype(float) - gate_zero) * gate_scale
    real = g / (1 + np.exp(-g)) * (up.astype(float) - up_zero) * up_scale / y_scale + y_zero
    assert off(got, real, 8) <= 0.51  # an entry of the table is half of `entry` off


@pytest.mark.parametrize("spread", [3, 500, 32000])
def test_rms_norm_follows_its_definition(spread: int) -> None:
    width, x_scale, w_scale, y_scale, eps = 896, 3e-3, 1e-4, 0.05, 1e-6
    x = RNG.integers(-spread, spread + 1, (8, width)).astype(np.int16)
    weight = RNG.integers(5000, 15000, width).astype(np.int16)
    scale = fp.fixed_scale(np.sqrt(width) * w_scale / y_scale, zero_point=2)
    got = fp.rms_norm(x, weight, round(eps * width / x_scale**2), scale)
    real_x = x * x_scale
    norm = real_x / np.sqrt((real_x**2).mean(-1, keepdims=True) + eps)
    assert off(got, norm * (weight * w_scale) / y_scale + 2, 8) <= 0.51


def test_a_row_of_zeros_is_the_zero_point() -> None:
    zeros = np.zeros((2, 128), np.int16)
    got = fp.rms_norm(zeros, np.ones(128, np.int16), 0, fp.fixed_scale(1.0, zero_point=6))
    assert (got == 6).all()
