"""Blocks by an importance matrix are ggml's, and lose less where it matters."""

from __future__ import annotations

import numpy as np
import pytest

from buildsys.quant.errors import QuantError
from buildsys.quant.ggml_blocks import BLOCKS, dequantize, quantize
from buildsys.quant.imatrix_blocks import IMATRIX_TYPES, imatrix_blocks
from buildsys.quant.rounding import F32


def importance(width: int) -> F32:
    return np.exp(np.random.default_rng(3).normal(size=width)).astype(np.float32)


def odd_weights() -> F32:
    """Rows as they come, and every kind that C treats on its own."""
    W = np.random.default_rng(4).standard_t(5, size=(64, 1024)).astype(np.float32) / 50
    W[3, 32:64] = 0.0
    W[4] = 0.0
    W[5] *= 1e-3
    W[6] *= 1e-30  # scales underflow in float16
    W[7], W[8] = np.abs(W[7]), -np.abs(W[8])
    W[9, :256] = 0.0
    W[10] = 0.25
    return W


@pytest.mark.parametrize("type_name", IMATRIX_TYPES)
def test_the_importance_matrix_gives_ggmls_bytes(type_name: str) -> None:
    libgguf = pytest.importorskip("libgguf")
    W, weights = odd_weights(), importance(1024)
    weights[5] = 0.0  # an input that is always zero
    kind = getattr(libgguf.GGMLQuantizationType, type_name)
    theirs = np.asarray(libgguf.quantize_rows(W, kind, imatrix=weights))
    assert np.array_equal(
        imatrix_blocks(W, weights, type_name), theirs.reshape(-1, BLOCKS[type_name].size)
    )


def test_rows_may_come_in_any_parts() -> None:
    W, weights = odd_weights(), importance(1024)
    parts = [imatrix_blocks(part, weights, "Q4_K") for part in (W[:1], W[1:40], W[40:])]
    assert np.array_equal(np.concatenate(parts), imatrix_blocks(W, weights, "Q4_K"))


@pytest.mark.parametrize("type_name", IMATRIX_TYPES)
def test_important_columns_lose_less(type_name: str) -> None:
    W = np.random.default_rng(5).normal(size=(40, 256)).astype(np.float32)
    weights = importance(256) ** 2

    def loss(blocks: np.ndarray) -> float:
        error = dequantize(blocks, type_name).reshape(W.shape) - W
        return float((error**2 @ weights).sum())

    assert loss(imatrix_blocks(W, weights, type_name)) < 0.97 * loss(quantize(W, type_name))


def test_what_cannot_be_made_is_refused_by_name() -> None:
    with pytest.raises(QuantError, match="up_proj: 64 columns with 32 importances in Q4_0"):
        imatrix_blocks(np.ones((2, 64), np.float32), np.ones(32, np.float32), name="up_proj")
    ones = np.ones((2, 128), np.float32)
    with pytest.raises(QuantError, match="up_proj: 128 columns with 128 importances in Q4_K"):
        imatrix_blocks(ones, ones[0], "Q4_K", name="up_proj")
    with pytest.raises(QuantError, match=r"an imatrix makes Q4_0, .* here, not Q8_0"):
        imatrix_blocks(ones, ones[0], "Q8_0", name="up_proj")
