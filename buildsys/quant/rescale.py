"""Exact rescaling between two linears, from the weights alone.

SwiGLU is linear in up: down(silu(gate x) * up x) does not change when row j of up is divided by
s_j and column j of down is multiplied by s_j. Attention is linear in v in the same way, and a
product of q and k keeps its value when a row of k is divided and its row of q multiplied.
Source: cross-layer equalization (Nagel et al., "Data-Free Quantization", 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from buildsys.quant.errors import QuantError
from buildsys.quant.factored import spans


def equal_peaks(divided: Tensor, multiplied: Tensor, powers_of_two: bool) -> Tensor:
    """s [n], float64: sqrt(divided / multiplied), after which both maxima are equal.

    divided, multiplied [n]: the largest magnitude of what s divides and what it multiplies; a
    zero gives 1. With `powers_of_two` every factor is the nearest one in the exponent, so that
    dividing and multiplying are exact in any binary floating type (but for underflow).
    Raises QuantError where s is not finite.
    """
    dead = (divided == 0) | (multiplied == 0)
    s = torch.sqrt(divided / multiplied).masked_fill(dead, 1.0)
    if not bool(torch.isfinite(s).all()):
        raise QuantError("weights that are to be balanced have values that are not finite")
    return torch.exp2(torch.round(torch.log2(s))) if powers_of_two else s


def divide_rows(W: Tensor, s: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Row j of W [rows, columns] divided by s_j, in float64, rounded once to `out`."""
    out = torch.empty(W.shape, dtype=W.dtype) if out is None else out
    for first, count in spans(len(W), W.shape[1]):
        rows = slice(first, first + count)
        out[rows] = W[rows].to(torch.float64) / s[rows, None]
    return out


def multiply_columns(W: Tensor, s: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Column j of W [rows, columns] times s_j, in float64, rounded once to `out`."""
    out = torch.empty(W.shape, dtype=W.dtype) if out is None else out
    for first, count in spans(len(W), W.shape[1]):
        rows = slice(first, first + count)
        out[rows] = W[rows].to(torch.float64) * s
    return out
