"""GPTQ's 4-bit blocks keep the format and lose less."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from buildsys.quant.calibrated_blocks import GPTQ_TYPES, gptq_blocks
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
