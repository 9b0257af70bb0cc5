"""GPTQ stays on the grid and loses less than rounding to the nearest, by the same Hessian."""

from __future__ import annotations

import itertools

import pytest
import torch

from buildsys.quant.errors import QuantError
from buildsys.quant.gptq import Hessian, best_scale, gptq, gptq_int8, layer_loss
from buildsys.quant.int8 import quantize_weight, weight_scale


def correlated_inputs(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    """Inputs that lie near a space of a few dimensions, as a language model's do."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(features // 4, features, generator=generator)
    shared = torch.randn(rows, features // 4, generator=generator) @ basis
    return shared + 0.1 * torch.randn(rows, features, generator=generator)


def weight(out: int, features: int) -> torch.Tensor:
    return torch.randn(out, features, generator=torch.Generator().manual_seed(1))


def test_the_hessian_is_the_sum_of_outer_products_whatever_the_parts() -> None:
    x = correlated_inputs(50, 12)
    hessian = Hessian(12)
    hessian.add(x[:20].reshape(4, 5, 12))
    hessian.add(x[20:])
    torch.testing.assert_close(hessian.H, x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(hessian.mean, x.mean(0))


def test_the_layer_loses_less_than_by_rounding_to_nearest() -> None:
    x, W = correlated_inputs(400, 200), weight(40, 200)  # two blocks of columns
    H, scale = x.T @ x, weight_scale(W) * 8  # coarse: five bits
    nearest = quantize_weight(W, scale=scale)
    made = gptq_int8(W, H, scale)
    assert made.values.dtype == torch.int8
    assert torch.equal(made.scale, scale)
    losses = [layer_loss(W, q.values * q.scale, H) for q in (made, nearest)]
    assert losses[0] < 0.5 * losses[1]


def test_the_loss_is_the_squared_error_of_the_outputs() -> None:
    x, W = correlated_inputs(60, 16).double(), weight(5, 16).double()
    made = torch.round(W)
    expected = float(((x @ W.T - x @ made.T) ** 2).sum())
    assert layer_loss(W, made, x.T @ x) == pytest.approx(expected)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    W = weight(6, 32)
    scale = weight_scale(W)
    made = gptq_int8(W, torch.eye(32) * 7, scale)
    assert torch.equal(made.values, quantize_weight(W, scale=scale).values)


def test_it_is_the_papers_recursion_column_by_column() -> None:
    """Each column's error goes to the later ones by the inverse of what is left of H."""
    x, W = correlated_inputs(80, 10).double(), weight(3, 10).double()
    H, step = x.T @ x, 0.4
    order = torch.argsort(H.diagonal(), descending=True, stable=True).tolist()
    damping = 0.01 * float(H.diagonal().mean())
    rest = W.clone()
    expected = torch.empty_like(W)
    for place, column in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv((H + damping * torch.eye(10).double())[left][:, left])
        expected[:, column] = torch.round(rest[:, column] / step) * step
        error = (rest[:, column] - expected[:, column]) / inverse[0, 0]
        rest[:, left] -= error[:, None] * inverse[0]
    found = gptq(W, H, lambda values, _: torch.round(values / step) * step)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_two_weights_reach_the_optimum_that_all_choices_give() -> None:
    x = torch.tensor([[1.0, 0.9], [1.0, 1.1], [0.5, 0.6]])
    W, H = torch.tensor([[0.45, 0.45]]), x.T @ x
    every = [torch.tensor([[a, b]]) for a, b in itertools.product((0.0, 1.0), repeat=2)]
    best = min(layer_loss(W, choice, H) for choice in every)
    found = gptq_int8(W, H, torch.tensor(1.0)).values.float()
    assert layer_loss(W, found, H) == pytest.approx(best)
    assert layer_loss(W, torch.round(W), H) > 3 * best


def test_the_scale_that_is_searched_loses_least_of_a_fine_grid() -> None:
    """A few large weights, on inputs that hardly come: they had better saturate."""
    x, W = correlated_inputs(400, 64), weight(40, 64)
    W[:, 0] *= 6
    x[:, 0] *= 0.01
    H = x.T @ x
    found = best_scale(W, H)
    grid = weight_scale(W) * torch.linspace(0.05, 1.0, 96)

    def loss(scale: torch.Tensor) -> float:
        made = quantize_weight(W, scale=scale)
        return layer_loss(W, made.values * made.scale, H)

    assert float(found / weight_scale(W)) < 0.5
    assert loss(found) < 1.1 * min(map(loss, grid))
    assert loss(found) < 0.3 * loss(weight_scale(W))


def test_where_nothing_is_large_the_scale_is_that_of_the_maximum() -> None:
    x, W = correlated_inputs(400, 64), weight(40, 64).sign()
    assert torch.equal(best_scale(W, x.T @ x), weight_scale(W))


def test_dead_inputs_are_no_error() -> None:
    x, W = correlated_inputs(50, 16), weight(4, 16)
    x[:, 3] = 0.0
    scale = weight_scale(W)
    made = gptq_int8(W, x.T @ x, scale)
    assert torch.equal(made.values[:, 3], quantize_weight(W, scale=scale).values[:, 3])


def test_values_that_are_not_finite_are_named() -> None:
    W = weight(4, 8)
    with pytest.raises(QuantError, match="up_proj: its inputs are not finite"):
        gptq_int8(W, torch.full((8, 8), torch.nan), weight_scale(W), name="up_proj")
    W[0, 0] = torch.inf
    with pytest.raises(QuantError, match="up_proj: has values that are not finite"):
        gptq_int8(W, torch.eye(8), torch.tensor(1.0), name="up_proj")
