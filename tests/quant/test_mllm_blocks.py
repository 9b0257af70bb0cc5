"""mllm's Q8_0 is ggml's but for exact halves; its other types are ggml's."""

from __future__ import annotations

import numpy as np
import pytest

from buildsys.quant import ggml_blocks, mllm_blocks


def test_halves_go_to_even_and_nothing_else_differs():
    # A maximum of 127 makes the scale 1, so levels are the numbers themselves.
    halves = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.25] + [0.0] * 24, dtype=np.float32)
    levels = mllm_blocks.quantize(halves, "Q8_0")[0, 2:].view(np.int8)
    assert levels[:8].tolist() == [127, 0, 2, 2, 0, -2, -2, 3]
    reference = ggml_blocks.quantize(halves, "Q8_0")[0, 2:].view(np.int8)
    assert reference[:8].tolist() == [127, 1, 2, 3, -1, -2, -3, 3]


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_tensors_without_halves_get_ggmls_bytes(kind: str):
    x = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    x[0], x[1] = 0.0, 1e-41
    same = mllm_blocks.quantize(x, kind) == ggml_blocks.quantize(x, kind)
    assert same.all()
