"""The HVX kernels under qemu-hexagon, against the scalar reference: every element of every case.

The reference itself is measured against real arithmetic in tests/quant/test_fixed_point.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from buildsys.quant import fixed_point as fp
from buildsys.quant.fixed_point import FixedScale
from tests.hexagon.emulator import build_harness, run_kernel

ARCHS = ("v73", "v75", "v79")
EXTREMES8 = np.array([-128, -127, -1, 0, 1, 126, 127], np.int8)
EXTREMES16 = np.array([-32768, -32767, -256, -1, 0, 1, 255, 32766, 32767], np.int16)
# Nearly 1, tiny, beyond 1 (results saturate), halves that must round upwards, and nothing.
FACTORS = [0.999999, 3.1e-4, 2.7, 0.5, 2**-15, 0.0]


@pytest.fixture(scope="module", params=ARCHS)
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_harness(request.param, tmp_path_factory.mktemp("hexagon"))


def some8(rng: np.random.Generator, *shape: int) -> fp.Int8:
    """Random bytes with every extreme among them."""
    values = rng.integers(-128, 128, shape, np.int8)
    values.reshape(-1)[: len(EXTREMES8)] = EXTREMES8
    return values


def some16(rng: np.random.Generator, *shape: int) -> fp.Int16:
    values = rng.integers(-32768, 32768, shape, np.int16)
    values.reshape(-1)[: len(EXTREMES16)] = EXTREMES16
    return values


@pytest.mark.parametrize("factor", FACTORS)
def test_quantize_is_exact(harness: Path, factor: float) -> None:
    x = some16(np.random.default_rng(1), 1280)
    scale = fp.fixed_scale(factor, headroom=15, zero_point=-3)
    got = run_kernel(harness, "quantize", [x], shape=(1, x.size), scale=scale)
    np.testing.assert_array_equal(np.frombuffer(got, np.int8), fp.quantize(x, scale))


@pytest.mark.parametrize("factor", [*FACTORS, 255.0])
def test_dequantize_add_is_exact(harness: Path, factor: float) -> None:
    rng = np.random.default_rng(2)
    x, residual = some8(rng, 1280), some16(rng, 1280)[::-1].copy()
    scale = fp.fixed_scale(factor, headroom=21)
    got = run_kernel(
        harness,
        "dequantize_add",
        [x, residual],
        shape=(1, x.size),
        scale=scale,
        x_zero_point=-11,
    )
    expected = fp.dequantize_add(x, -11, residual, scale)
    np.testing.assert_array_equal(np.frombuffer(got, np.int16), expected)


@pytest.mark.parametrize(
    ("rows", "k", "n"), [(1, 128, 128), (4, 128, 128), (7, 256, 384), (5, 896, 130)]
)
def test_matmul_is_exact(harness: Path, rows: int, k: int, n: int) -> None:
    rng = np.random.default_rng(3)
    x, weights = some8(rng, rows, k), some8(rng, n, k)
    x[0], weights[0] = -128, -128  # the greatest sum that there is
    bias = rng.integers(-(2**20), 2**20, n, np.int32)
    scales = [fp.fixed_scale(f) for f in rng.uniform(1e-6, 1e-3, n)]
    multiplier = np.array([each.multiplier for each in scales], np.int32)
    right = np.array([each.right for each in scales], np.int32)
    columns = -(-n // 128) * 128
    pads = [np.pad(each, (0, columns - n)) for each in (bias, multiplier, right)]
    got = run_kernel(
        harness,
        "matmul",
        [x, weights, *pads],
        shape=(rows, k),
        outputs=n,
        scale=FixedScale(0, 0, 0, 5),
    )
    y = np.frombuffer(got, np.int8).reshape(rows, columns)
    np.testing.assert_array_equal(y[:, :n], fp.matmul(x, weights, bias, multiplier, right, 5))
    assert (y[:, n:] == 5).all()  # behind the last column: weights of nothing


@pytest.mark.parametrize("factor", FACTORS)
def test_silu_multiply_is_exact_for_every_gate(harness: Path, factor: float) -> None:
    rng = np.random.default_rng(4)
    gate = np.tile(np.arange(256, dtype=np.uint8).view(np.int8), 8)
    rng.shuffle(gate)
    up = some8(rng, gate.size)
    table = fp.silu_table(0.05, 7, 6.4 / 32767)
    scale = fp.fixed_scale(factor / 256, headroom=7, zero_point=9)
    got = run_kernel(
        harness,
        "silu_multiply",
        [gate, up, table],
        shape=(1, gate.size),
        scale=scale,
        x_zero_point=4,
    )
    expected = fp.silu_multiply(gate, up, 4, table, scale)
    np.testing.assert_array_equal(np.frombuffer(got, np.int8), expected)


@pytest.mark.parametrize("spread", [1, 40, 3000, 32767])
def test_rms_norm_is_exact_for_rows_of_every_size(harness: Path, spread: int) -> None:
    rng = np.random.default_rng(5)
    rows, width, real = 4, 1024, 1000
    x = rng.integers(-spread, spread + 1, (rows, width), np.int16)
    x[1, ::7] = -32768
    x[2] = 0  # a padding token
    weight = rng.integers(0, 32767, width).astype(np.int16)
    x[:, real:] = weight[real:] = 0
    scale = fp.fixed_scale(np.sqrt(real) / 1000.0, zero_point=-20)
    for epsilon in (0, 1, 12_345_678_901):
        got = run_kernel(
            harness,
            "rms_norm",
            [x, weight],
            shape=(rows, width),
            scale=scale,
            epsilon=epsilon,
        )
        expected = fp.rms_norm(x, weight, epsilon, scale)
        np.testing.assert_array_equal(np.frombuffer(got, np.int8).reshape(rows, width), expected)


def test_a_misaligned_vector_or_an_unpadded_length_is_refused(harness: Path) -> None:
    x = np.zeros(256, np.int16)
    for skew, count in ((64, 256), (0, 200)):
        with pytest.raises(subprocess.CalledProcessError) as told:
            run_kernel(harness, "quantize", [x], shape=(1, count), skew=skew)
        assert told.value.returncode == 255  # -1
