"""Ranges of static quantizers are the best there are by the error that they are chosen for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from buildsys.quant.clipping import (
    gate_up_ranges,
    kl_range,
    mse_range,
    repaired,
    repaired_range,
    weighted_range,
)
from buildsys.quant.profiles import fake_quantize


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * torch.exp(0.8 * torch.randn(shape, generator=generator))


def candidates(peak: float) -> list[float]:
    return [peak * 0.99**step for step in range(600)]


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_range_is_the_brute_force_optimum(bits: int) -> None:
    x = heavy_tailed(200, 100)
    peak = float(x.abs().max())

    def error(magnitude: float) -> float:
        return float((fake_quantize(x, magnitude, bits) - x).square().sum())

    best = min(error(candidate) for candidate in candidates(peak))
    assert error(mse_range(x, bits, peak)) <= 1.01 * best
    assert error(peak) > 1.1 * best


def test_a_bounded_tensor_keeps_its_maximum() -> None:
    x = torch.linspace(-1, 1, 5001)
    assert mse_range(x, 8, 1.0) == pytest.approx(1.0, rel=0.02)
    assert kl_range(x, 8, 1.0) == pytest.approx(1.0, rel=0.02)


def test_weighted_range_is_the_brute_force_optimum_of_its_own_error() -> None:
    x = heavy_tailed(300, 40)
    x[0] *= 100  # one token with massive activations, in a residual stream that is as large
    rows = 1.0 / x.square().sum(1)
    columns = torch.rand(40, generator=torch.Generator().manual_seed(2))
    peak = float(x.abs().max())

    def error(magnitude: float) -> float:
        return float(rows @ ((fake_quantize(x, magnitude, 8) - x) ** 2 @ columns))

    best = min(error(candidate) for candidate in candidates(peak))
    found = weighted_range(x, 8, peak, rows, columns)
    assert error(found) <= 1.01 * best
    # The squared error alone would spend the range on that token.
    assert found < 0.5 * mse_range(x, 8, peak)


def test_what_saturates_on_gates_negative_side_costs_nothing() -> None:
    gate, up = heavy_tailed(400, 30, seed=3), heavy_tailed(400, 30, seed=4)
    gate[:5] = -500.0  # silu makes nothing of it
    peaks = float(gate.abs().max()), float(up.abs().max())
    rows, columns = torch.ones(400), torch.ones(30)
    gate_range, up_range = gate_up_ranges(gate, up, 8, peaks, rows, columns)
    product = functional.silu(gate) * up

    def error(pair: tuple[float, float]) -> float:
        made = functional.silu(fake_quantize(gate, pair[0], 8)) * fake_quantize(up, pair[1], 8)
        return float((made - product).square().sum())

    assert gate_range < 0.1 * peaks[0]
    assert error((gate_range, up_range)) < 0.05 * error(peaks)
    pairs = [(peaks[0] * 0.93**a, peaks[1] * 0.93**b) for a in range(40, 80) for b in range(40)]
    assert error((gate_range, up_range)) <= 1.05 * min(map(error, pairs))


def test_relative_entropy_clips_a_long_tail_and_no_more() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(5))
    x[:20] = 60.0
    assert 3.0 < kl_range(x, 8, 60.0) < 15.0


def test_repaired_values_do_not_ask_for_range_and_few_may_be_repaired() -> None:
    x = heavy_tailed(400, 50, seed=6)
    x[0] *= 1000
    peak, rows, columns = float(x.abs().max()), torch.ones(400), torch.ones(50)
    few, more = (repaired_range(x, 8, peak, rows, columns, share) for share in (0.003, 0.05))
    assert more < few < 0.1 * peak
    assert float((x.abs() > few).float().mean()) <= 0.003
    kept = repaired(x, few, 8)
    assert torch.equal(kept[x.abs() > few], x[x.abs() > few])
    error = (kept - x).square().sum()
    assert error < 0.01 * (fake_quantize(x, peak, 8) - x).square().sum()


def test_a_token_that_others_attend_to_is_not_cut() -> None:
    """Massive activations in one row, in a residual stream that is as large as they are."""
    x = heavy_tailed(300, 40, seed=7)
    x[0] *= 1000
    residual = heavy_tailed(300, 40, seed=8) * 10 + x
    rows, columns, peak = 1.0 / residual.square().sum(1), torch.ones(40), float(x.abs().max())
    free = weighted_range(x, 8, peak, rows, columns)
    held = weighted_range(x, 8, peak, rows, columns, most=torch.full((300,), 0.25))

    def lost(magnitude: float) -> float:
        return float(rows[0] * (fake_quantize(x[0], magnitude, 8) - x[0]).square().sum())

    assert lost(free) > 0.9
    assert lost(held) <= 0.25
    assert held > 5 * free
