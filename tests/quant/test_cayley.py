"""Cayley steps stay orthogonal, go down, and can be interrupted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buildsys.quant.cayley import CayleyDescent, cayley, nearest_orthogonal, skew
from buildsys.quant.errors import QuantError

N = 12


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def departure(X: Tensor) -> float:
    """How far X is from orthogonal."""
    return float((X @ X.mT - torch.eye(X.shape[-1])).abs().max())


def test_a_turn_however_long_gives_an_orthogonal_matrix() -> None:
    X = nearest_orthogonal(noise(N, N))
    for length in (1e-6, 1.0, 1e3):
        A = noise(N, N, seed=1) * length
        assert departure(cayley(A - A.T, X)) < 1e-12


def test_the_turn_is_the_gradient_projected_on_the_manifold() -> None:
    """Moving along the turn changes the loss by the turn's squared norm, to first order."""
    X, G = nearest_orthogonal(noise(N, N)), noise(N, N, seed=1)
    A = skew(G, X)
    assert torch.equal(A, -A.T)
    small = 1e-6
    change = (G * (cayley(small * A, X) - X)).sum()
    assert float(change) == pytest.approx(-small * float(A.square().sum()), rel=1e-4)


def test_hundreds_of_steps_find_the_rotation_between_two_bases_and_stay_orthogonal() -> None:
    source = noise(3, N, N)
    wanted = nearest_orthogonal(noise(3, N, N, seed=1))
    wanted[:, 0] *= wanted.det().sign()[:, None]  # reachable from the identity without a mirror
    target = source @ wanted
    descent = CayleyDescent(torch.eye(N, dtype=torch.float64).repeat(3, 1, 1))

    def loss() -> Tensor:
        return (source @ descent.matrices - target).square().sum(dim=(-2, -1))

    first, steps = loss(), 400
    for step in range(steps):
        gradient = 2 * source.mT @ (source @ descent.matrices - target)
        descent.step(gradient, 0.1 * (1 - step / steps))
    assert bool((loss() < 1e-3 * first).all())
    assert departure(descent.matrices) < 1e-12


def test_a_step_turns_by_the_angle_that_it_is_given_whatever_the_gradients_size() -> None:
    start = torch.eye(N, dtype=torch.float64)[None]
    for size in (1e-9, 1e9):
        descent = CayleyDescent(start)
        descent.step(size * noise(1, N, N), 0.01)
        moved = (descent.matrices - start).square().sum().sqrt() / N**0.5
        assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_a_restored_descent_goes_on_bit_for_bit() -> None:
    start = nearest_orthogonal(noise(2, N, N))
    whole, part = CayleyDescent(start), CayleyDescent(start)
    for step in range(4):
        whole.step(noise(2, N, N, seed=step), 0.1)
        part.step(noise(2, N, N, seed=step), 0.1)
        resumed = CayleyDescent(start)
        resumed.restore(part.state())
        part = resumed
    assert torch.equal(whole.matrices, part.matrices)


def test_a_matrix_that_nothing_depends_on_does_not_move() -> None:
    start = nearest_orthogonal(noise(2, N, N))
    descent = CayleyDescent(start)
    gradient = torch.zeros(2, N, N)
    gradient[0] = noise(N, N, seed=2)
    descent.step(gradient, 0.1)
    assert float((descent.matrices[1] - start[1]).abs().max()) < 1e-14
    assert float((descent.matrices[0] - start[0]).abs().max()) > 1e-3


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    descent = CayleyDescent(torch.eye(N, dtype=torch.float64)[None])
    with pytest.raises(QuantError, match="not finite; take a smaller rate"):
        descent.step(torch.full((1, N, N), float("nan")), 0.1)
