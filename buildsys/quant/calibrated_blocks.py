"""4-bit blocks by what a linear reads: GPTQ rounding.

Formats stay what they are: the scales and minima that the plain quantizer finds are kept, and the
levels chosen anew. Source: GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from buildsys.quant.errors import QuantError
from buildsys.quant.ggml_blocks import Bytes, quantize
from buildsys.quant.gptq import gptq
from buildsys.quant.q4_k import pack_nibbles, unpack_scales
from buildsys.quant.rounding import F32, fp16_values

GPTQ_TYPES = ("Q4_0", "Q4_K")
_SUB_BLOCK = 32
_TOP = 15
_ROWS = 256  # whose levels are found together


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
    chosen = torch.empty(made.shape, dtype=torch.uint8)
    for start in range(0, len(W), _ROWS):
        rows = slice(start, start + _ROWS)
        own = made[rows].view(-1, scale.shape[1], _SUB_BLOCK)
        found = torch.round((own + minimum[rows, :, None]) * inverse[rows, :, None])
        chosen[rows] = found.clamp_(0, _TOP).to(torch.uint8).view(own.shape[0], -1)
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
