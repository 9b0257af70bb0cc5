"""An orthogonal matrix as a product of cheap factors, and the one path by which it is applied.

A stored rotation R is a dense float64 matrix and stays exactly what it is; `recover` finds
factors whose product is that matrix bit for bit, and `Rotation.turn` multiplies by the
factors. Sums are then ordered differently than in a dense product, so results differ from it
by float64 rounding (about 1e-16 of the largest term). Every product with a rotation takes
this path. Cost per element: the sum of the factors' orders (36 for 1536) in place of n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from buildsys.quant.hadamard import Matrix, sylvester

# Larger Sylvester factors do more arithmetic, smaller ones more passes over memory.
_SYLVESTER_FACTOR = 16
# Numbers handled at a time: the float64 temporaries of a step stay within a few times 2 MiB,
# inside the cache.
CHUNK = 1 << 18
# Rows are turned fewer at a time: their temporaries are transposed, which the cache must hold.
ROWS_CHUNK = 1 << 16


@dataclass(frozen=True)
class Kronecker:
    """The Kronecker product of square float64 factors, leftmost outermost."""

    factors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        # A factor of order 1 is a number: it rides in another factor and saves a pass.
        wide = [factor for factor in self.factors if len(factor) > 1]
        numbers = [factor for factor in self.factors if len(factor) == 1]
        if wide and numbers:
            wide[0] = torch.stack(numbers).prod() * wide[0]
            object.__setattr__(self, "factors", tuple(wide))

    def transpose_times_rows(self, x: Tensor) -> Tensor:
        """K^T x^T [n, m] for x [m, n]: the last factor first, each product transposed.

        A product of many rows with a small factor, written transposed, moves that factor's axis
        to the front; after all of them the axes stand in order before the rows.
        """
        count, size = x.shape
        for factor in reversed(self.factors):
            x = torch.matmul(factor.T, x.reshape(-1, len(factor)).T)
        return x.reshape(size, count)

    def transpose_times(self, x: Tensor) -> Tensor:
        """K^T x for x [n, m], without forming K."""
        shape, before, after = x.shape, 1, x.numel()
        for factor in self.factors:
            order = len(factor)
            after //= order
            x = torch.matmul(factor.T, x.reshape(before, order, after))
            before *= order
        return x.reshape(shape)

    def transposed(self) -> Kronecker:
        """K^T: the same product with every factor transposed."""
        return Kronecker(tuple(factor.T.contiguous() for factor in self.factors))


@dataclass(frozen=True)
class SignedPermutation:
    """M[i, target[i]] = sign[i] and zero elsewhere; sign is +-1 in float64, target int64.

    No target: diag(sign).
    """

    sign: Tensor
    target: Tensor | None = None

    def transpose_times_rows(self, x: Tensor) -> Tensor:
        """M^T x^T [n, m] for x [m, n]."""
        return self.transpose_times(x.T.contiguous())

    def transpose_times(self, x: Tensor) -> Tensor:
        """M^T x for x [n, m]."""
        if self.target is None:
            return x * self.sign[:, None]
        y = torch.empty_like(x)
        y[self.target] = x * self.sign[:, None]
        return y

    def transposed(self) -> SignedPermutation:
        """M^T, which is also the inverse."""
        if self.target is None:
            return self
        source = torch.argsort(self.target)
        return SignedPermutation(self.sign[source], source)


Stage = Kronecker | SignedPermutation


@dataclass(frozen=True)
class Rotation:
    """R = stage_1 stage_2 ... / divisor, [size, size] float64, orthogonal to rounding.

    The divisor is kept apart so that Hadamard factors are whole numbers and `dense` is exact.
    The inverse is the transpose, also where R is a little off orthogonal: mllm evaluates
    sqrt(n) in float32, which leaves R R^T = I to 6e-8.
    """

    size: int
    stages: tuple[Stage, ...]
    divisor: float = 1.0

    def turn(self, x: Tensor) -> Tensor:
        """R^T x for x [size, m] float64: a column v, read as a row vector, becomes v R."""
        for stage in self.stages:
            x = stage.transpose_times(x)
        return x if self.divisor == 1.0 else x / self.divisor

    def turn_rows(self, x: Tensor) -> Tensor:
        """x R for x [m, size] of any floating type; float64, as the transpose of a new tensor."""
        first, *rest = self.stages
        if isinstance(first, SignedPermutation) and first.target is None and rest:
            x = x * first.sign
            first, *rest = rest
        columns = first.transpose_times_rows(x.to(torch.float64))
        return Rotation(self.size, tuple(rest), self.divisor).turn(columns).T

    def inverse(self) -> Rotation:
        """The rotation by R^T."""
        stages = tuple(stage.transposed() for stage in reversed(self.stages))
        return Rotation(self.size, stages, self.divisor)

    def dense(self) -> Tensor:
        """R [size, size] float64; without rounding but for one division by the divisor,
        where the factors are whole numbers or there is no sum of more than one term."""
        R = torch.empty(self.size, self.size, dtype=torch.float64)
        transpose = self.inverse()
        for first, count in spans(self.size, self.size):
            unit = torch.zeros(self.size, count, dtype=torch.float64)
            unit[torch.arange(first, first + count), torch.arange(count)] = 1.0
            R[:, first : first + count] = transpose.turn(unit)
        return R

    @property
    def cost(self) -> int:
        """Multiplications per element turned; `size` for a matrix without known factors."""
        return sum(
            len(factor)
            for stage in self.stages
            if isinstance(stage, Kronecker)
            for factor in stage.factors
        )


def dense_rotation(R: Tensor) -> Rotation:
    """A Rotation that is the matrix R [n, n] itself: no factors known."""
    return Rotation(len(R), (Kronecker((R.to(torch.float64).contiguous(),)),))


def sylvester_factors(order: int) -> tuple[Tensor, ...]:
    """Sylvester(order) as a Kronecker product of Sylvester matrices of order <= 16."""
    factors = []
    while order > 1:
        step = min(order, _SYLVESTER_FACTOR)
        factors.append(as_factor(sylvester(step)))
        order //= step
    return tuple(factors)


def as_factor(matrix: Matrix) -> Tensor:
    """A numpy matrix as a float64 tensor of its own."""
    return torch.tensor(matrix, dtype=torch.float64)


def spans(count: int, width: int, chunk: int | None = None) -> Iterator[tuple[int, int]]:
    """(first, length) of runs of `count` vectors of `width` numbers, about `chunk` numbers each."""
    step = max(1, (chunk or CHUNK) // max(1, width))
    for first in range(0, count, step):
        yield first, min(step, count - first)
