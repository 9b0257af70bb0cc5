"""Metrics are what other implementations and closed forms say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from buildsys.quant.errors import QuantError
from buildsys.quant.metrics import (
    cosine,
    kl_divergence,
    perplexity,
    perplexity_difference,
    sqnr_db,
    token_nll,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sqnr_of_a_known_noise():
    x = normal(1000)
    assert sqnr_db(x, 1.1 * x.double()) == pytest.approx(20.0, abs=1e-5)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


def test_uniform_quantization_has_six_decibels_per_bit():
    """A uniform quantizer of b bits on a full-scale uniform signal: 6.02 b dB."""
    x = 2 * torch.rand(200_000, generator=torch.Generator().manual_seed(0)) - 1
    for bits in (8, 12):
        step = 2.0 / 2**bits
        assert sqnr_db(x, torch.round(x / step) * step) == pytest.approx(6.02 * bits, abs=0.05)


def test_cosine_is_torchs():
    a, b = normal(300), normal(300, seed=1)
    expected = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)
    assert cosine(a, b) == pytest.approx(float(expected), abs=1e-12)
    assert cosine(torch.zeros(2), torch.zeros(2)) == 1.0
    assert cosine(torch.zeros(2), torch.ones(2)) == 0.0


def test_kl_is_torchs_and_zero_for_equal_logits():
    p, q = normal(5, 40), normal(5, 40, seed=1)
    expected = torch.nn.functional.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), expected)
    assert float(kl_divergence(p, p + 3.0).abs().max()) < 1e-6


def test_nll_and_perplexity_are_the_cross_entropy():
    logits, targets = normal(64, 50), torch.arange(64) % 50
    nll = token_nll(logits, targets)
    mean = torch.nn.functional.cross_entropy(logits.double(), targets)
    sums = nll.view(4, 16).sum(dim=1).tolist()
    found = perplexity(sums, [16] * 4)
    assert found.value == pytest.approx(math.exp(float(mean)), rel=1e-12)
    assert (found.predictions, found.windows) == (64, 4)
    uniform = perplexity([16 * math.log(50)], [16])
    assert uniform.value == pytest.approx(50)


def test_paired_difference_ignores_what_windows_share():
    """Windows differ by whole nats, the variant by 0.01: the pairing must see 0.01."""
    rng = np.random.default_rng(0)
    reference = 511 * rng.normal(3.5, 0.5, 12)
    variant = reference + 511 * rng.normal(0.01, 0.001, 12)
    found = perplexity_difference(reference, variant, [511] * 12)
    gaps = (variant - reference) / 511
    assert found.nats == pytest.approx(gaps.mean())
    assert found.nats_error == pytest.approx(gaps.std(ddof=1) / math.sqrt(12))
    ratio = perplexity(variant, [511] * 12).value / perplexity(reference, [511] * 12).value
    assert found.relative == pytest.approx(ratio - 1)
    assert found.nats_error < 0.001


def test_one_window_has_no_standard_error():
    found = perplexity_difference([10.0], [11.0], [10])
    assert found.nats == pytest.approx(0.1)
    assert math.isnan(found.nats_error)


def test_windows_that_do_not_match_are_refused():
    with pytest.raises(QuantError, match="2 NLL sums for 1 windows"):
        perplexity([1.0, 2.0], [4])
    with pytest.raises(QuantError, match="0 NLL sums for 0 windows; the text is too short"):
        perplexity([], [])
    with pytest.raises(QuantError, match=r"cannot compare shapes \(2,\) and \(3,\)"):
        sqnr_db(torch.ones(2), torch.ones(3))
