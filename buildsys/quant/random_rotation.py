"""Seeded rotations: mllm's randomised Hadamard, a Kronecker product for every other size, and
one that LayerNorm survives.

The same size, method, seed and stream give the same matrix whatever the machine or the version
of numpy (raw words of PCG64, no distribution of a library), but for the odd factor of
`kronecker`, whose last bits follow the machine's LAPACK.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buildsys.quant import hadamard
from buildsys.quant.errors import QuantError
from buildsys.quant.factored import (
    Kronecker,
    Rotation,
    SignedPermutation,
    as_factor,
    sylvester_factors,
)

Method = Literal["auto", "hadamard", "kronecker"]
# What tells the matrices of one seed apart, such as ("R_v", 3).
Stream = Sequence[str | int]


def make_rotation(
    size: int, *, method: Method = "auto", seed: int = 0, stream: Stream = ()
) -> Rotation:
    """A random rotation [size, size] for a residual stream (R1) or a head (R2).

    `hadamard`: mllm's, diag(s) (H_K kron Sylvester)^T / sqrt(n) with sqrt(n) in float32; every
    entry has the same magnitude. `kronecker`: diag(s) (Sylvester(2^k) kron Q) / sqrt(2^k), Q a
    random orthogonal matrix of the odd order size / 2^k. `auto`: the first where it exists,
    else the second (`method_of` tells which).
    Raises QuantError for a size below 1 or one without a Hadamard matrix under `hadamard`.
    Source: mllm v1 tools/rotate; QuaRot (Ashkboos et al. 2024).
    """
    words = _Words(seed, stream)
    if method_of(size, method) == "hadamard":
        order = hadamard.require_mllm_order(size)
        factors = (as_factor(hadamard.block(order).T), *sylvester_factors(size // order))
        divisor = float(np.sqrt(np.float32(size)))
    else:
        power, odd = _split(size)
        factors = (*sylvester_factors(power), words.orthogonal(odd))
        divisor = math.sqrt(power)
    return Rotation(size, (SignedPermutation(words.signs(size)), Kronecker(factors)), divisor)


def method_of(size: int, method: Method) -> Literal["hadamard", "kronecker"]:
    """The construction that `method` means for this size; QuantError where there is none."""
    if size < 1:
        raise QuantError(f"a rotation needs a size of at least 1, not {size}")
    if method == "auto":
        return "hadamard" if hadamard.mllm_block_order(size) else "kronecker"
    if method not in ("hadamard", "kronecker"):
        raise QuantError(f"method: {method!r} is unknown; use auto, hadamard or kronecker")
    return method


def make_layernorm_rotation(size: int, *, seed: int = 0, stream: Stream = ()) -> Rotation:
    """R = H D P H^T, which keeps the vector of ones: LayerNorm(x R) = LayerNorm(x) R.

    H is a Hadamard matrix over sqrt(n) whose first column is constant, D random signs with
    D[0] = 1 and P a random permutation that keeps the first index, so 1 R = 1: a centred x stays
    centred and keeps its norm. Where no Hadamard matrix exists, H = Sylvester(2^k) kron Q with Q
    orthogonal, of odd order and first column constant.
    """
    method = method_of(size, "auto")
    words = _Words(seed, stream)
    H, divisor = layernorm_basis(size) if method == "hadamard" else _odd_basis(size, words)
    sign = words.signs(size)
    sign[0] = 1.0
    target = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + words.permutation(size - 1)])
    return Rotation(size, (H, SignedPermutation(sign, target), H.transposed()), divisor)


def layernorm_basis(size: int) -> tuple[Kronecker, float]:
    """(H, n): a Hadamard matrix with entries +-1 and first column 1; n divides H .. H^T."""
    order = hadamard.require_mllm_order(size)
    block = hadamard.block(order)
    factors = (as_factor(block * block[:, :1]), *sylvester_factors(size // order))
    return Kronecker(factors), float(size)


def _odd_basis(size: int, words: _Words) -> tuple[Kronecker, float]:
    power, odd = _split(size)
    factors = (*sylvester_factors(power), words.orthogonal(odd, first_column_constant=True))
    return Kronecker(factors), float(power)


def _split(size: int) -> tuple[int, int]:
    """(the largest power of two that divides size, the odd rest)."""
    power = size & -size
    return power, size // power


class _Words:
    """A stream of random 64-bit words; each draw takes the next ones."""

    def __init__(self, seed: int, stream: Stream) -> None:
        if seed < 0:
            raise QuantError(f"seed: {seed} is negative; a seed is a whole number from 0 up")
        path = [int.from_bytes(f"{part!r}".encode(), "little") for part in stream]
        self._generator = np.random.PCG64(np.random.SeedSequence([seed, *path]))

    def signs(self, count: int) -> Tensor:
        """+1 and -1 [count], float64."""
        return torch.tensor(1.0 - 2.0 * (self._draw(count) >> np.uint64(63)), dtype=torch.float64)

    def permutation(self, count: int) -> Tensor:
        """A permutation of 0 .. count - 1, int64."""
        return torch.tensor(np.argsort(self._draw(count), kind="stable"), dtype=torch.int64)

    def orthogonal(self, order: int, *, first_column_constant: bool = False) -> Tensor:
        """A random orthogonal matrix [order, order] float64 (QR of normals, signs of R fixed)."""
        normals = self._normals(order * order).reshape(order, order)
        if first_column_constant:
            normals[:, 0] = 1.0
        Q, upper = np.linalg.qr(normals)
        Q = Q * np.where(np.diagonal(upper) < 0, -1.0, 1.0)
        if first_column_constant:
            Q[:, 0] = 1.0 / math.sqrt(order)
        return torch.tensor(Q, dtype=torch.float64)

    def _normals(self, count: int) -> npt.NDArray[np.float64]:
        """Box and Muller's transform of uniform words."""
        uniform = (self._draw(2 * count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log1p(-uniform[:count]))
        return radius * np.cos(2.0 * np.pi * uniform[count:])

    def _draw(self, count: int) -> npt.NDArray[np.uint64]:
        return np.asarray(self._generator.random_raw(count), dtype=np.uint64)
