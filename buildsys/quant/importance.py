"""The importance of a linear's columns, as llama.cpp's imatrix has it: the mean square of each."""

from __future__ import annotations

import torch
from torch import Tensor


class MeanSquare:
    """Running mean of x^2 over the inputs x of one linear. Memory: one float64 [in]."""

    def __init__(self, features: int) -> None:
        self._sum = torch.zeros(features, dtype=torch.float64)
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Take in inputs x [..., in]."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self._sum += rows.square().sum(0)  # float32 within a sample, float64 over all
        self._rows += len(rows)

    @property
    def value(self) -> Tensor:
        """The mean of x^2 [in], float32."""
        return (self._sum / max(self._rows, 1)).to(torch.float32)
