"""The compiled pass over values gives the numpy pass' sums to the last bit, and the same values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from buildsys.quant import observers, sweep
from buildsys.quant.observers import Observer

pytest.importorskip("numba", reason="pip install numba (extra: fast)")
from buildsys.quant import sweep_lanes

Passes = {"numpy": sweep.sweep, "lanes": sweep_lanes.sweep}


def in_order(values):
    """Sorted by their bits, which tell the two zeros apart."""
    return np.sort(values.view(np.uint32)).view(np.float32)


def swept(one, values, floor, both):
    """Sums of all values, and those above the floor in the order of their bits."""
    sums, found, at = sweep.no_sums(), [], 0
    while at < len(values):
        at, part = one(values, at, floor, both, sums)
        found.append(part)
    return sums, in_order(np.concatenate(found))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("count", [1, 255, 4097, sweep.BLOCK, sweep.BLOCK + 1, 300_000])
@pytest.mark.parametrize("floor", [-math.inf, 0.0, 1.0, 30.0])
def test_both_passes_give_the_same_bits(count, floor, both):
    rng = np.random.default_rng(count)
    values = rng.standard_t(3, count).astype(np.float32) * np.float32(1.3)
    values[::7] = np.resize(np.float32([0.0, -0.0]), len(values[::7]))
    sums, found = swept(sweep.sweep, values, floor, both)
    again, also = swept(sweep_lanes.sweep, values, floor, both)
    assert sums.tobytes() == again.tobytes()
    assert found.tobytes() == also.tobytes()
    magnitudes = np.abs(values) if both else values
    assert found.tobytes() == in_order(magnitudes[magnitudes > np.float32(floor)]).tobytes()


@pytest.mark.parametrize("name", Passes)
def test_sums_are_those_of_the_defined_order(name):
    values = np.random.default_rng(0).standard_normal(2 * sweep.BLOCK + 700).astype(np.float32)
    sums, _ = swept(Passes[name], values, 1.0, True)
    expected = sweep.no_sums()
    padded = np.zeros(3 * sweep.BLOCK, dtype=np.float32)
    padded[: len(values)] = values
    for block in padded.reshape(3, sweep.ROWS, sweep.LANES):
        for total, terms in zip(expected, (block, block * block), strict=True):
            lanes = np.zeros(sweep.LANES, dtype=np.float32)
            for row in terms:
                lanes = lanes + row
            total += lanes
    assert sums.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", Passes)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, sweep.BLOCK + 5])
def test_a_value_that_is_not_finite_is_in_the_sums(name, bad, at):
    values = np.ones(sweep.BLOCK + 9, dtype=np.float32)
    values[at] = bad
    sums, found = swept(Passes[name], values, 2.0, True)
    assert not math.isfinite(sums[1].sum())
    assert list(found) == ([] if np.isnan(bad) else [np.inf])


@pytest.mark.parametrize("mode", ["absmax", "mllm"])
def test_an_observer_says_the_same_with_either_pass(mode, monkeypatch):
    monkeypatch.setattr(observers, "MANY", 1_000_000)
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(111_111, generator=generator) * 0.9**i for i in range(9)]
    found = []
    for many in (0, 1_000_000):
        observer = Observer(mode, expected=999_999, many=many)
        for part in parts:
            observer.update(part)
        found.append(observer.result())
    assert found[0] == found[1]
    assert observers.sweep_for(1_000_000) is sweep_lanes.sweep
    assert observers.sweep_for(0) is sweep.sweep
