"""Descent over orthogonal matrices: every step is a Cayley transform, so it stays on the manifold.

X -> (I + A/2)^-1 (I - A/2) X with a skew A is orthogonal whatever A is. Here the linear system
is solved in float64, where Li et al. iterate a fixed point: matrices of a model's width take a
second, and nothing drifts. Source: Li, Fuxin, Todorovic 2020 (arXiv 2002.01113), its Cayley ADAM;
SpinQuant (arXiv 2405.16406).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from buildsys.quant.errors import QuantError

MOMENTUM, SECOND_MOMENT = 0.9, 0.99


def skew(G: Tensor, X: Tensor) -> Tensor:
    """The gradient G [..., n, n] at orthogonal X as a turn: the skew part of G X^T.

    For an orthogonal square X this is the projection of G on the tangent space, times X^T.
    """
    product = G @ X.mT
    return (product - product.mT) / 2


def cayley(A: Tensor, X: Tensor) -> Tensor:
    """(I + A/2)^-1 (I - A/2) X for skew A: X turned against A. [..., n, n], float64."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype)
    turned: Tensor = torch.linalg.solve(identity + A / 2, X - A @ X / 2)
    return turned


def nearest_orthogonal(X: Tensor) -> Tensor:
    """The orthogonal factor of X's polar decomposition, the nearest orthogonal matrix; float64."""
    U, _, Vh = torch.linalg.svd(X.to(torch.float64))
    nearest: Tensor = U @ Vh
    return nearest


@dataclass
class CayleyDescent:
    """Orthogonal matrices on their way down; each has a step length of its own.

    matrices: [count, n, n] float64, orthogonal to rounding after any number of steps.
    momentum: their mean turns; second: the mean squared norms of the turns [count].
    """

    matrices: Tensor
    momentum: Tensor = field(init=False)
    second: Tensor = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.matrices = nearest_orthogonal(self.matrices)
        self.momentum = torch.zeros_like(self.matrices)
        self.second = torch.zeros(len(self.matrices), dtype=torch.float64)

    def step(self, gradient: Tensor, angle: float) -> None:
        """Turn against the gradient [count, n, n], by at most about `angle` radians (root mean
        square over the axes): less where successive gradients disagree.

        Raises QuantError where the gradient is not finite.
        """
        if not bool(torch.isfinite(gradient).all()):
            raise QuantError("the gradient of the rotation is not finite; take a smaller rate")
        turn = skew(gradient.to(torch.float64), self.matrices)
        self.steps += 1
        self.momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * turn
        square = turn.square().sum(dim=(-2, -1))
        self.second = SECOND_MOMENT * self.second + (1 - SECOND_MOMENT) * square
        mean = self.momentum / (1 - MOMENTUM**self.steps)
        norm = (self.second / (1 - SECOND_MOMENT**self.steps)).sqrt()
        # A matrix of order 1, or one that nothing depends on, has no turn.
        length = angle * math.sqrt(self.matrices.shape[-1]) / norm.clamp(min=1e-300)
        length = torch.where(norm > 0, length, 0.0)
        self.matrices = cayley(mean * length[:, None, None], self.matrices)

    def state(self) -> dict[str, Tensor]:
        """What `restore` goes on from."""
        steps = torch.tensor(self.steps)
        return {
            "matrices": self.matrices,
            "momentum": self.momentum,
            "second": self.second,
            "steps": steps,
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self.matrices, self.momentum = state["matrices"], state["momentum"]
        self.second, self.steps = state["second"], int(state["steps"])
