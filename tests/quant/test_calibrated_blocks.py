"""Calibrated 4-bit blocks keep the format, lose less, and are ggml's where ggml has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from buildsys.quant.calibrated_blocks import GPTQ_TYPES, gptq_blocks, imatrix_blocks
from buildsys.quant.errors import QuantError
from buildsys.quant.ggml_blocks import dequantize, quantize
from buildsys.quant.gptq import layer_loss
from tests.quant.test_gptq import correlated_inputs, weight


@pytest.mark.parametrize("type_name", GPTQ_TYPES)
def test_gptq_keeps_the_scales_and_loses_less(type_name: str) -> None:
    x, W = correlated_inputs(600, 512), weight(24, 512)
    H = x.T @ x
    nearest = quantize(W.numpy(), type_name)
    made = gptq_blocks(W, H, type_name)
    header = 2 if type_name == "Q4_0" else 16
    assert made.shape == nearest.shape
    assert np.array_equal(made[:, :header], nearest[:, :header])
    losses = [
        layer_loss(W, torch.from_numpy(dequantize(blocks, type_name)).reshape(W.shape), H)
        for blocks in (made, nearest)
    ]
    assert losses[0] < 0.6 * losses[1]


@pytest.mark.parametrize("type_name", GPTQ_TYPES)
def test_without_correlation_the_nearest_level_is_taken(type_name: str) -> None:
    W = weight(3, 256)
    made = gptq_blocks(W, torch.eye(256), type_name)
    error = torch.from_numpy(dequantize(made, type_name)).reshape(W.shape) - W
    plain = torch.from_numpy(dequantize(quantize(W.numpy(), type_name), type_name))
    assert float(error.square().sum()) <= float((plain.reshape(W.shape) - W).square().sum()) + 1e-6


def test_a_type_that_gptq_does_not_make_is_refused() -> None:
    with pytest.raises(QuantError, match="up_proj: GPTQ makes Q4_0, Q4_K here, not Q6_K"):
        gptq_blocks(weight(2, 256), torch.eye(256), "Q6_K", name="up_proj")


def importance(width: int) -> np.ndarray:
    return np.exp(np.random.default_rng(3).normal(size=width)).astype(np.float32)


def test_the_importance_matrix_gives_ggmls_bytes() -> None:
    libgguf = pytest.importorskip("libgguf")
    W = np.random.default_rng(4).standard_t(5, size=(64, 512)).astype(np.float32)
    W[3, 32:64] = 0.0
    W[5] *= 1e-3
    weights = importance(512)
    theirs = libgguf.quantize_rows(W, libgguf.GGMLQuantizationType.Q4_0, imatrix=weights)
    assert np.array_equal(imatrix_blocks(W, weights), np.asarray(theirs).reshape(-1, 18))


def test_important_columns_lose_less() -> None:
    W = np.random.default_rng(5).normal(size=(40, 128)).astype(np.float32)
    weights = importance(128) ** 2

    def loss(blocks: np.ndarray) -> float:
        error = dequantize(blocks, "Q4_0").reshape(W.shape) - W
        return float((error**2 @ weights).sum())

    assert loss(imatrix_blocks(W, weights)) < 0.95 * loss(quantize(W, "Q4_0"))


def test_importances_of_another_width_are_refused() -> None:
    with pytest.raises(QuantError, match="up_proj: 64 columns with 32 importances"):
        imatrix_blocks(np.ones((2, 64), np.float32), np.ones(32, np.float32), name="up_proj")
