"""Streaming statistics are those of the whole, and mllm's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.quant import observers
from buildsys.quant.errors import QuantError
from buildsys.quant.observers import Observer, order_index


def of_everything(values: np.ndarray, mode: str) -> tuple[float, float]:
    """mllm's two order statistics, by the call that mllm makes on all values at once."""
    values = np.abs(values) if mode == "absmax" else values
    n = len(values)
    at = [int(n * 1) - 1, int(n * 0.999) - 1]
    ordered = np.partition(values, at)
    return float(ordered[at[0]]), float(ordered[at[1]])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    mode=st.sampled_from(["absmax", "mllm"]),
    bounded=st.booleans(),
    uneven=st.booleans(),
)
def test_any_chunking_gives_the_exact_order_statistic(seed, lengths, mode, bounded, uneven):
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal(n).astype(np.float32) for n in lengths]
    if uneven and bounded:  # the first sample larger than all others
        parts = [part * 10.0**-i for i, part in enumerate(parts)]
    parts = [part.astype(np.float32) for part in parts]
    observer = Observer(mode, expected=sum(lengths) if bounded else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers, "_KEEP_ALL", 8 if bounded else 500)
        for part in parts:
            observer.update(torch.tensor(part).reshape(1, -1))
        whole = np.concatenate(parts)
        found = observer.result()
    assert (found.ori, found.top_0_1) == of_everything(whole, mode)
    assert found.count == len(whole)
    exact = whole.astype(np.float64)
    assert found.mean == pytest.approx(exact.mean(), abs=3e-7 * np.abs(exact).mean())
    assert found.std == pytest.approx(exact.std(), rel=1e-6, abs=1e-3 * abs(exact).mean())


@pytest.mark.parametrize("mode", ["absmax", "mllm"])
@pytest.mark.parametrize("bounded", [True, False])
def test_long_parts_give_the_exact_order_statistic(mode, bounded):
    rng = np.random.default_rng(1)
    parts = [rng.standard_t(3, 300_001).astype(np.float32) for _ in range(4)]
    observer = Observer(mode, expected=4 * 300_001 if bounded else None)
    for part in parts:
        observer.update(torch.from_numpy(part))
    found, whole = observer.result(), np.concatenate(parts)
    assert (found.ori, found.top_0_1) == of_everything(whole, mode)
    exact = whole.astype(np.float64)
    assert found.mean == pytest.approx(exact.mean(), abs=1e-7)
    assert found.std == pytest.approx(exact.std(), rel=1e-7)


def test_long_runs_of_one_value_are_kept_by_their_number():
    observer = Observer("absmax", expected=1_000_000)
    observer.update(torch.zeros(400_000))
    observer.update(torch.full((600_000,), 2.0))
    assert (observer.result().ori, observer.result().top_0_1) == (2.0, 2.0)


def test_values_in_16_bits_are_summed_in_32():
    values = torch.full((100_000,), 1.0, dtype=torch.bfloat16)
    observer = Observer("absmax")
    observer.update(values)
    assert (observer.result().mean, observer.result().std) == (1.0, 0.0)


def test_ties_at_the_order_statistic_are_counted_once_each():
    observer = Observer("mllm", expected=40_000)
    values = np.random.default_rng(0).integers(0, 9, 40_000).astype(np.float32)
    for part in np.split(values, 10):
        observer.update(torch.tensor(part))
    found = observer.result()
    assert (found.ori, found.top_0_1) == of_everything(values, "mllm")


def test_memory_is_bounded_by_the_order_statistic():
    expected = 4_000_000
    observer = Observer("absmax", expected=expected)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        observer.update(torch.randn(expected // 8, generator=generator))
    kept = sum(len(part) for part in observer._kept)
    assert kept <= 2 * (expected - order_index(expected)) + observers._KEEP_ALL


def test_buffer_of_the_caller_may_be_reused():
    observer = Observer("mllm")
    buffer = torch.tensor([1.0, 2.0])
    observer.update(buffer)
    buffer.fill_(9.0)
    assert observer.result().ori == 2.0


def test_uneven_stream_without_a_bound_is_refused_and_never_guessed(monkeypatch):
    monkeypatch.setattr(observers, "_KEEP_ALL", 0)
    observer = Observer("absmax")
    observer.update(torch.full((10_000,), 5.0) + torch.rand(10_000))
    observer.update(torch.rand(1_000_000))
    with pytest.raises(QuantError, match=r"up_proj: the first samples are so much larger"):
        observer.result("up_proj")


def test_signed_maximum_ignores_the_negative_side_as_mllm_does():
    x = torch.tensor([-9.0, 1.0, 2.0])
    signed, absolute = Observer("mllm"), Observer("absmax")
    signed.update(x)
    absolute.update(x)
    assert (signed.result().ori, absolute.result().ori) == (2.0, 9.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", ["absmax", "mllm"])
def test_values_that_are_not_finite_are_refused_by_name(bad, mode):
    observer = Observer(mode)
    observer.update(torch.tensor([1.0, bad]))
    with pytest.raises(QuantError, match="q_proj input: activations are not finite"):
        observer.result("q_proj input")


def test_layer_that_saw_nothing_is_refused_by_name():
    observer = Observer()
    observer.update(torch.empty(0, 4))
    with pytest.raises(QuantError, match="fc1: no activation was seen"):
        observer.result("fc1")
