"""GPTQ: rounding that makes up for its own error, on a fixed grid.

Columns are rounded one by one; the error of each is spread over the columns that are still to
come, as far as the inputs of the layer correlate (the Hessian H = sum of x x^T). Format and
scale stay what they are, only the choice of whole numbers changes. Columns go by descending
diagonal of H; damping adds a share of the mean diagonal.
Source: Frantar et al., "GPTQ" (arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from buildsys.quant.errors import QuantError
from buildsys.quant.int8 import LEVELS, Quantized, weight_scale

DAMPING = 0.01
BLOCK = 128
# The search for a scale: steps of a twentieth, until the loss is so many times the least.
_SCALE_STEP = 0.95
_SCALE_STEPS = 60
_HOPELESS = 1.5
# Rounds one column of weights [rows] (its index in the weight is given) to values on the grid.
RoundColumn = Callable[[Tensor, int], Tensor]


class Hessian:
    """Running sums over the inputs x of one linear: H = sum of x x^T, and the mean of x.

    Memory: one float32 [in, in].
    """

    def __init__(self, features: int) -> None:
        self.H = torch.zeros(features, features)
        self._sum = torch.zeros(features, dtype=torch.float64)
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Take in inputs x [..., in]."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.H.addmm_(rows.T, rows)
        self._sum += rows.sum(0)  # float32 within a sample, float64 over all
        self._rows += len(rows)

    @property
    def mean(self) -> Tensor:
        """The mean input [in], float32."""
        return (self._sum / max(self._rows, 1)).to(torch.float32)


def damped(H: Tensor, damping: float = DAMPING, name: str = "weight") -> Tensor:
    """H in float64 with `damping` times its mean diagonal added; a dead input gets 1 instead.

    Raises QuantError, naming `name`, where H is not finite.
    """
    if not bool(torch.isfinite(H).all()):
        raise QuantError(f"{name}: its inputs are not finite; check the checkpoint")
    wide = H.to(torch.float64, copy=True)
    diagonal = wide.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return wide


def gptq(W: Tensor, H: Tensor, round_column: RoundColumn, *, damping: float = DAMPING) -> Tensor:
    """W [out, in] on the grid of `round_column`, float32, with the error spread by H [in, in]."""
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    U = _factor_of_inverse(damped(H, damping)[order][:, order]).to(torch.float32)
    rest = W.to(torch.float32).T[order].contiguous()  # [in, out]: a column lies in one piece
    made = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        errors = torch.empty(stop - start, rest.shape[1])
        for at in range(start, stop):
            made[at] = round_column(rest[at], int(order[at]))
            error = (rest[at] - made[at]) / U[at, at]
            rest[at + 1 : stop] -= U[at, at + 1 : stop, None] * error
            errors[at - start] = error
        rest[stop:] -= U[start:stop, stop:].T @ errors
    result = torch.empty_like(made)
    result[order] = made
    return result.T.contiguous()


def _factor_of_inverse(wide: Tensor) -> Tensor:
    """U with U^T U = the inverse of a positive matrix; each matrix goes when the next is there."""
    lower = torch.linalg.cholesky(wide)
    del wide
    inverse = torch.cholesky_inverse(lower)
    del lower
    U: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return U


def gptq_int8(
    W: Tensor, H: Tensor, scale: Tensor, *, damping: float = DAMPING, name: str = "weight"
) -> Quantized:
    """W [out, in] as int8 under the given scale (0-d float32), rounded by GPTQ.

    Raises QuantError, naming `name`, where the weight or its inputs are not finite.
    """
    if not bool(torch.isfinite(W).all()):
        raise QuantError(f"{name}: has values that are not finite; the checkpoint is damaged")
    damped(H, damping, name)

    def round_column(column: Tensor, index: int) -> Tensor:
        return torch.round(column / scale).clamp_(-LEVELS, LEVELS) * scale

    values = gptq(W, H, round_column, damping=damping) / scale
    return Quantized(torch.round(values).to(torch.int8), scale)


def best_scale(W: Tensor, H: Tensor) -> Tensor:
    """The scale of W [out, in] under which rounding to the nearest loses least by H [in, in].

    From max|W| / 127 downwards in steps of a twentieth: large weights saturate, all others get
    finer levels. GPTQ's own loss is least at about the same scale. 0-d float32.
    """
    largest, wide = weight_scale(W), W.to(torch.float32)
    best, least = largest, _nearest_loss(wide, largest, H)
    for step in range(1, _SCALE_STEPS):
        scale = largest * _SCALE_STEP**step
        loss = _nearest_loss(wide, scale, H)
        if loss < least:
            best, least = scale, loss
        elif loss > _HOPELESS * least:
            break
    return best


def _nearest_loss(W: Tensor, scale: Tensor, H: Tensor) -> float:
    """`layer_loss` of rounding to the nearest, in float32."""
    lost = torch.round(W / scale).clamp_(-LEVELS, LEVELS).mul_(scale).sub_(W)
    return float((lost @ H).mul_(lost).sum())


def layer_loss(W: Tensor, made: Tensor, H: Tensor) -> float:
    """sum over inputs of |(W - made) x|^2 = trace((W - made) H (W - made)^T), float64."""
    difference = (W - made).to(torch.float64)
    return float(((difference @ H.to(torch.float64)) * difference).sum())
