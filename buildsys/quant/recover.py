"""From a stored rotation to its factors: which fast product is this matrix, bit for bit?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from buildsys.quant.errors import QuantError
from buildsys.quant.factored import (
    Kronecker,
    Rotation,
    SignedPermutation,
    as_factor,
    dense_rotation,
    spans,
    sylvester_factors,
)
from buildsys.quant.hadamard import mllm_block_order, sylvester
from buildsys.quant.random_rotation import layernorm_basis

# mllm's matrices are 6e-8 off orthogonal; one stored in bfloat16 or of another model is far more.
_ORTHOGONAL = 1e-5


def recover(R: Tensor, name: str = "rotation") -> Rotation:
    """The rotation that a stored matrix R [n, n] is, in factors where it has any.

    Found: diag(s) (A kron Sylvester) and diag(s) (Sylvester kron A) for any A (mllm's, QuaRot's
    and `make_rotation`'s), their transposes, and `make_layernorm_rotation` over a Hadamard
    matrix. The product of the factors equals R exactly, or R itself is used (cost n).
    Raises QuantError, naming `name`, where R is not square, finite and orthogonal to 1e-5.
    """
    R = R.detach().to(device="cpu", dtype=torch.float64)
    check_orthogonal(R, name)
    for candidate in _candidates(R):
        return candidate
    return dense_rotation(R)


def check_orthogonal(R: Tensor, name: str) -> None:
    """QuantError unless R is square, finite and keeps the length of random vectors to 1e-5."""
    if R.ndim != 2 or R.shape[0] != R.shape[1]:
        raise QuantError(f"{name}: a rotation is a square matrix, this has shape {tuple(R.shape)}")
    if not bool(torch.isfinite(R).all()):
        raise QuantError(f"{name}: has values that are not finite; make the rotation anew")
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(len(R), 8, dtype=torch.float64, generator=generator)
    error = float(((R.T @ (R @ probe)) - probe).abs().max() / probe.abs().max())
    if error > _ORTHOGONAL:
        raise QuantError(
            f"{name}: not orthogonal (R^T R differs from I by {error:.1e}, allowed {_ORTHOGONAL});"
            " it may be stored in too few bits, or be another kind of matrix"
        )


def _candidates(R: Tensor) -> Iterator[Rotation]:
    for matrix, transposed in ((R, False), (R.T, True)):
        order = len(R) & -len(R)
        while order > 1:
            for sylvester_inner in (True, False):
                found = _signed_kronecker(matrix, order, sylvester_inner)
                if found is not None:
                    yield found.inverse() if transposed else found
            order //= 2
    found = _layernorm_rotation(R)
    if found is not None:
        yield found


def _signed_kronecker(R: Tensor, order: int, sylvester_inner: bool) -> Rotation | None:
    """diag(s) (A kron S) or diag(s) (S kron A) with S = Sylvester(order), if R is that."""
    n, rest = len(R), len(R) // order
    H = as_factor(sylvester(order))
    if sylvester_inner:
        parts = R.reshape(rest, order, rest, order)
        A, first_column = parts[:, 0, :, 0], parts[:, :, :, 0]
    else:
        parts = R.reshape(order, rest, order, rest).permute(1, 0, 3, 2)
        A, first_column = parts[:, 0, :, 0], parts[:, :, :, 0]
    # Sylvester's first column is ones, so there every row is +A or -A: the largest entry tells.
    pivot = A.abs().argmax(dim=1)
    here = torch.arange(rest)
    agrees = (first_column[here, :, pivot] < 0) == (A[here, pivot] < 0)[:, None]
    sign = torch.where(agrees, 1.0, -1.0).to(torch.float64)
    for p in range(rest):
        for first, count in spans(order, n):
            rows = slice(first, first + count)
            expected = sign[p, rows, None, None] * A[p][None, :, None] * H[rows, None, :]
            if not torch.equal(expected, parts[p, rows]):
                return None
    A = A.contiguous()
    if sylvester_inner:
        factors, row_sign = (A, *sylvester_factors(order)), sign.reshape(n)
    else:
        factors, row_sign = (*sylvester_factors(order), A), sign.T.reshape(n)
    return Rotation(n, (SignedPermutation(row_sign), Kronecker(factors)))


def _layernorm_rotation(R: Tensor) -> Rotation | None:
    """H D P H^T over the Hadamard basis of `make_layernorm_rotation`, if R is that."""
    n = len(R)
    whole = torch.round(R * n)
    if mllm_block_order(n) is None or not torch.equal(whole / n, R):
        return None
    H, divisor = layernorm_basis(n)
    # H^T (n R) H = n^2 D P, in whole numbers that float64 holds exactly.
    middle = H.transpose_times(H.transpose_times(whole).T.contiguous()).T / n**2
    target = middle.abs().argmax(dim=1)
    sign = middle[torch.arange(n), target]
    if not torch.equal(target.sort().values, torch.arange(n)):
        return None
    found = Rotation(n, (H, SignedPermutation(sign, target), H.transposed()), divisor)
    return found if torch.equal(found.dense(), R) else None
