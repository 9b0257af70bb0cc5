"""4-bit blocks by what a linear reads: GPTQ rounding, and ggml's importance matrix for Q4_0.

Formats stay what they are. GPTQ keeps the scales and minima that the plain quantizer finds and
chooses the levels anew. The importance matrix (mean x^2 of every column) chooses Q4_0's scales.
Source: GPTQ, arXiv 2210.17323; ggml `quantize_q4_0` with an imatrix (`make_qx_quants`), without
FMA contraction.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buildsys.quant.errors import QuantError
from buildsys.quant.ggml_blocks import BLOCKS, Bytes, quantize
from buildsys.quant.gptq import gptq
from buildsys.quant.q4_k import pack_nibbles, unpack_scales
from buildsys.quant.rounding import F32, fp16_bytes, fp16_values, nearest_int, sum_in_order

GPTQ_TYPES = ("Q4_0", "Q4_K")
IMATRIX_TYPES = ("Q4_0",)
_SUB_BLOCK = 32
_TOP = 15


def gptq_blocks(W: Tensor, H: Tensor, type_name: str, *, name: str = "tensor") -> Bytes:
    """W [rows, columns] float32 as blocks [n, bytes] in row order, levels rounded by GPTQ.

    H [columns, columns]: sum of x x^T over the inputs. Raises QuantError, naming `name`, for a
    type other than GPTQ_TYPES or columns that do not divide into blocks.
    """
    if type_name not in GPTQ_TYPES:
        raise QuantError(f"{name}: GPTQ makes {', '.join(GPTQ_TYPES)} here, not {type_name}")
    blocks = quantize(W.numpy(), type_name, name=name)
    scale, minimum = (torch.from_numpy(part).view(len(W), -1) for part in _grid(blocks, type_name))
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)

    def levels(values: Tensor, at: int | slice) -> Tensor:
        return torch.round((values + minimum[:, at]) * inverse[:, at]).clamp_(0, _TOP)

    def round_column(column: Tensor, index: int) -> Tensor:
        at = index // _SUB_BLOCK
        return levels(column, at) * scale[:, at] - minimum[:, at]

    made = gptq(W, H, round_column)
    spread = [part.repeat_interleave(_SUB_BLOCK, dim=1) for part in (scale, minimum, inverse)]
    chosen = torch.round((made + spread[1]) * spread[2]).clamp_(0, _TOP).to(torch.uint8)
    return _with_levels(blocks, chosen.numpy().reshape(-1, _SUB_BLOCK), type_name)


def _grid(blocks: Bytes, type_name: str) -> tuple[F32, F32]:
    """Scale and minimum of every sub-block in row order: value = scale * level - minimum."""
    if type_name == "Q4_0":
        d = fp16_values(blocks[:, :2])
        return d, np.float32(8) * d
    ls, lm = unpack_scales(blocks[:, 4:16])
    scale = fp16_values(blocks[:, 0:2])[:, None] * ls.astype(np.float32)
    minimum = fp16_values(blocks[:, 2:4])[:, None] * lm.astype(np.float32)
    return scale.reshape(-1), minimum.reshape(-1)


def _with_levels(blocks: Bytes, levels: Bytes, type_name: str) -> Bytes:
    """The blocks with other levels [sub-blocks, 32]."""
    made = blocks.copy()
    if type_name == "Q4_0":
        made[:, 2:] = levels[:, :16] | levels[:, 16:] << 4
    else:
        made[:, 16:] = pack_nibbles(levels)
    return made


def imatrix_blocks(
    W: npt.NDArray[np.float32], importance: npt.NDArray[np.float32], *, name: str = "tensor"
) -> Bytes:
    """W [rows, columns] as Q4_0 blocks, scales chosen by the importance of each column [columns].

    Bytes of ggml's `quantize_q4_0` with this imatrix. Raises QuantError, naming `name`, where
    the columns do not divide into blocks.
    """
    width = W.shape[1]
    if width % BLOCKS["Q4_0"].weights or importance.shape != (width,):
        raise QuantError(f"{name}: {width} columns with {importance.size} importances in Q4_0")
    squares = (W * W).astype(np.float32)
    # C adds a row up from left to right in float32.
    sigma2 = np.add.accumulate(squares, axis=1, dtype=np.float32)[:, -1] / np.float32(width)
    weights = importance[None] * np.sqrt(sigma2[:, None] + squares)
    x = np.ascontiguousarray(W.reshape(-1, _SUB_BLOCK).T)
    scale, levels = _weighted_scales(x, np.ascontiguousarray(weights.reshape(-1, _SUB_BLOCK).T))
    nibbles = levels[:16] | levels[16:] << 4
    return np.hstack([fp16_bytes(scale), np.ascontiguousarray(nibbles.T)])


def _weighted_scales(x: F32, weights: F32) -> tuple[F32, Bytes]:
    """ggml's make_qx_quants for 8 levels on each side: columns of [32, n] -> scales [n], levels."""
    peak = x[np.abs(x).argmax(axis=0), np.arange(x.shape[1])]
    dead = np.abs(peak) < np.float32(1e-15)
    safe = np.where(dead, np.float32(1), peak)
    best: F32 = np.full(x.shape[1], -1, np.float32)
    scale = np.zeros(x.shape[1], np.float32)
    levels = np.full(x.shape, 8, np.uint8)
    for step in (0, *range(-9, 0), *range(1, 10)):
        factor = np.float32(8) if step == 0 else np.float32(8) + np.float32(0.1) * np.float32(step)
        scaled: F32 = (-factor / safe * x).astype(np.float32, copy=False)
        q = np.clip(nearest_int(scaled), -8, 7).astype(np.float32)
        product, square = sum_in_order(weights * x * q), sum_in_order(weights * q * q)
        found = (square > 0) if step == 0 else (square > 0) & (product * product > best * square)
        ratio = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
        scale = np.where(found, ratio, scale)
        best = np.where(found, ratio * product, np.float32(0) if step == 0 else best)
        levels = np.where(found, (q + 8).astype(np.uint8), levels)
    levels[:, dead] = 0  # as ggml leaves it; the scale is zero
    return np.where(dead, np.float32(0), scale), levels
