"""Hadamard matrices: square, entries +1 and -1, rows orthogonal (H H^T = n I).

Powers of two are Sylvester's. The orders that are not powers of two and that mllm, QuaRot
and SpinQuant use as blocks are constructed here: Paley's two constructions over a prime
field, and Goethals and Seidel's array of four circulants for 52, 156 and 172, whose orders
Paley does not reach with a prime.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import numpy.typing as npt

from buildsys.quant.errors import QuantError

Matrix = npt.NDArray[np.float64]

# mllm takes the first of these that divides the size, else 1 (QuaRot's get_hadK).
BLOCK_ORDERS = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)


def sylvester(order: int) -> Matrix:
    """Sylvester's Hadamard matrix [order, order], entries +-1; order must be a power of two."""
    if not is_power_of_two(order):
        raise QuantError(f"Sylvester's Hadamard matrix: {order} is not a power of two")
    H: Matrix = np.ones((1, 1))
    while len(H) < order:
        H = np.block([[H, H], [H, -H]])
    return H


def is_power_of_two(n: int) -> bool:
    """True for 1, 2, 4, 8 ..."""
    return n > 0 and n & (n - 1) == 0


def mllm_block_order(size: int) -> int | None:
    """The order K of the block that mllm takes for `size`; None where mllm has no matrix.

    The first divisor decides, as in mllm: a later one is not tried.
    """
    order = next((k for k in BLOCK_ORDERS if size % k == 0), 1)
    return order if is_power_of_two(size // order) else None


@cache
def block(order: int) -> Matrix:
    """A Hadamard matrix [order, order] for a power of two or one of `BLOCK_ORDERS`.

    Read-only, entries +-1. The same order gives the same matrix on every machine.
    Raises QuantError for another order.
    """
    if is_power_of_two(order):
        H = sylvester(order)
    elif order in _CONSTRUCTIONS:
        H = _CONSTRUCTIONS[order]()
    else:
        known = ", ".join(str(k) for k in sorted(BLOCK_ORDERS))
        raise QuantError(
            f"no Hadamard matrix of order {order} is constructed here (powers of two and "
            f"{known} are); use method: kronecker"
        )
    H.setflags(write=False)
    return H


def hadamard_matrix(size: int) -> Matrix:
    """block(K) kron Sylvester(size / K) [size, size], entries +-1, with mllm's K.

    Raises QuantError where mllm has none: the message offers `kronecker`.
    """
    order = require_mllm_order(size)
    return _kronecker(block(order), sylvester(size // order))


def require_mllm_order(size: int) -> int:
    """`mllm_block_order`, or a QuantError that says why there is none and what to do."""
    order = mllm_block_order(size)
    if order is None:
        first = next((k for k in BLOCK_ORDERS if size % k == 0), 1)
        raise QuantError(
            f"size {size} has no Hadamard rotation: {size} = {first} x {size // first}, and "
            f"{size // first} is not a power of two; use method: kronecker"
        )
    return order


def paley_one(q: int) -> Matrix:
    """Paley's first construction: order q + 1, q a prime = 3 mod 4 (Paley 1933)."""
    S = np.zeros((q + 1, q + 1))
    S[0, 1:], S[1:, 0] = 1.0, -1.0
    S[1:, 1:] = _jacobsthal(q)
    return S + np.eye(q + 1)


def paley_two(q: int) -> Matrix:
    """Paley's second construction: order 2 (q + 1), q a prime = 1 mod 4 (Paley 1933)."""
    C = np.zeros((q + 1, q + 1))
    C[0, 1:] = C[1:, 0] = 1.0
    C[1:, 1:] = _jacobsthal(q)
    zero = np.array([[1.0, -1.0], [-1.0, -1.0]])
    sign = np.array([[1.0, 1.0], [1.0, -1.0]])
    return _kronecker(C, sign) + _kronecker(np.eye(q + 1), zero)


def doubled(order: int) -> Matrix:
    """Sylvester's step: order 2 * order from `block(order)`."""
    H = block(order)
    return np.block([[H, H], [H, -H]])


def goethals_seidel(
    n: int, multipliers: tuple[int, ...], minus: tuple[tuple[int, ...], ...]
) -> Matrix:
    """Goethals and Seidel's array of four circulants: order 4 n (Goethals, Seidel 1967).

    `minus` says, for each of the four first rows, where the entries are -1: at r * h mod n
    for each r given and each h in the group `multipliers`. The four rows are valid when
    their periodic autocorrelations sum to zero; a search over the few rows that are constant
    on the cosets of the group finds them in seconds, which is where these come from.
    """
    a, b, c, d = (_coset_row(n, multipliers, representatives) for representatives in minus)
    shift = (np.arange(n)[None, :] - np.arange(n)[:, None]) % n
    A, B, C, D = a[shift], b[shift], c[shift], d[shift]
    R = np.eye(n)[::-1]
    return np.block(
        [
            [A, B @ R, C @ R, D @ R],
            [-B @ R, A, D.T @ R, -C.T @ R],
            [-C @ R, -D.T @ R, A, B.T @ R],
            [-D @ R, C.T @ R, -B.T @ R, A],
        ]
    )


def _kronecker(a: Matrix, b: Matrix) -> Matrix:
    rows, columns = a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]
    product = np.multiply(a[:, None, :, None], b[None, :, None, :])
    return np.asarray(product.reshape(rows, columns), dtype=np.float64)


def _coset_row(n: int, multipliers: tuple[int, ...], representatives: tuple[int, ...]) -> Matrix:
    row = np.ones(n)
    row[[r * h % n for r in representatives for h in multipliers]] = -1.0
    return row


def _jacobsthal(q: int) -> Matrix:
    """Q[i, j] = the quadratic character of j - i modulo the prime q."""
    character = np.full(q, -1.0)
    character[[i * i % q for i in range(1, q)]] = 1.0
    character[0] = 0.0
    difference = (np.arange(q)[None, :] - np.arange(q)[:, None]) % q
    return np.take(character, difference)


_CONSTRUCTIONS: dict[int, Callable[[], Matrix]] = {
    12: partial(paley_one, 11),
    20: partial(paley_one, 19),
    28: partial(paley_two, 13),
    36: partial(paley_two, 17),
    40: partial(doubled, 20),
    52: partial(goethals_seidel, 13, (1, 3, 9), ((1,), (1, 7), (1, 2), (1, 2))),
    60: partial(paley_one, 59),
    108: partial(paley_one, 107),
    140: partial(paley_one, 139),
    156: partial(
        goethals_seidel,
        39,
        (1, 16, 22),
        (
            (2, 3, 4, 7, 8, 12, 14, 21),
            (1, 2, 4, 6, 7, 12, 13, 17),
            (1, 2, 4, 7, 12, 17, 21, 26),
            (1, 2, 6, 7, 8, 12, 13, 21),
        ),
    ),
    172: partial(
        goethals_seidel,
        43,
        (1, 4, 11, 16, 21, 35, 41),
        ((1, 2, 3), (1, 2, 3, 6), (1, 2, 3), (1, 2, 7)),
    ),
}
