"""Blocks as mllm's quantizer writes them: ggml's, but for exact halves in Q8_0.

mllm v1 quantizes Q8_0 with ggml's SIMD code, which rounds halves to even and multiplies by
127 / max; ggml's reference rounds them away from zero. About two bytes in a million differ.
Source: mllm v1 `quantize_row_q8_0` (AVX2), and the files that it wrote.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buildsys.quant import ggml_blocks
from buildsys.quant.ggml_blocks import CHUNK, Bytes
from buildsys.quant.rounding import F32


def quantize(x: npt.ArrayLike, type_name: str, *, name: str = "tensor", threads: int = 1) -> Bytes:
    """x [..., in_features] float32 -> blocks [x.size / weights, bytes] in row order, mllm's bytes.

    Raises QuantError as `ggml_blocks.quantize` does.
    """
    blocks = ggml_blocks.quantize(x, type_name, name=name, threads=threads)
    if type_name == "Q8_0":
        rows = np.asarray(x, dtype=np.float32).reshape(len(blocks), -1)
        step = CHUNK // rows.shape[1]
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            blocks[part, 2:] = _levels(rows[part]).view(np.uint8)
    return blocks


def _levels(x: F32) -> npt.NDArray[np.int8]:
    """round-half-even(x * (127 / max|x|)) of blocks [n, 32]; 0 where the maximum is subnormal."""
    peak = np.abs(x).max(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        scaled = np.rint(x * (np.float32(127) / peak))
    return np.where(np.isfinite(scaled), scaled, np.float32(0)).astype(np.int8)
