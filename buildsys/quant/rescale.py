"""Exact rescaling of up_proj's rows against down_proj's columns, from the weights alone.

SwiGLU is linear in up: down(silu(gate x) * up x) does not change when row j of up is divided by
s_j and column j of down is multiplied by s_j. Source: cross-layer equalization (Nagel et al.,
"Data-Free Quantization", 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from buildsys.quant.errors import QuantError
from buildsys.quant.factored import spans


def up_down_factors(up: Tensor, down: Tensor, *, powers_of_two: bool = True) -> Tensor:
    """s [intermediate], float64: sqrt(max|row j of up| / max|column j of down|).

    up [intermediate, hidden], down [hidden, intermediate]. Afterwards both maxima are equal.
    With `powers_of_two` every factor is the nearest one in the exponent, so that dividing and
    multiplying are exact in any binary floating type (but for underflow). A row or column of
    zeros gives 1. Raises QuantError where the shapes do not belong together or s is not finite.
    """
    if up.ndim != 2 or down.ndim != 2 or up.shape != down.shape[::-1]:
        raise QuantError(
            f"up_proj {tuple(up.shape)} and down_proj {tuple(down.shape)} do not belong together"
        )
    rows = up.abs().amax(dim=1).to(torch.float64)
    columns = down.abs().amax(dim=0).to(torch.float64)
    dead = (rows == 0) | (columns == 0)
    s = torch.sqrt(rows / columns).masked_fill(dead, 1.0)
    if not bool(torch.isfinite(s).all()):
        raise QuantError("up_proj or down_proj has values that are not finite")
    return torch.exp2(torch.round(torch.log2(s))) if powers_of_two else s


def rescale_up(up: Tensor, s: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Row j of up [intermediate, hidden] divided by s_j, in float64, rounded once to `out`."""
    out = torch.empty(up.shape, dtype=up.dtype) if out is None else out
    for first, count in spans(len(up), up.shape[1]):
        rows = slice(first, first + count)
        out[rows] = up[rows].to(torch.float64) / s[rows, None]
    return out


def rescale_down(down: Tensor, s: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Column j of down [hidden, intermediate] times s_j, in float64, rounded once to `out`."""
    out = torch.empty(down.shape, dtype=down.dtype) if out is None else out
    for first, count in spans(len(down), down.shape[1]):
        rows = slice(first, first + count)
        out[rows] = down[rows].to(torch.float64) * s
    return out
