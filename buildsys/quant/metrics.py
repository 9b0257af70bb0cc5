"""How far an approximation is from the original: SQNR, cosine, KL, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from buildsys.quant.errors import QuantError


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 log10(sum ref^2 / sum (ref - approx)^2) in dB, float64; inf where they are equal."""
    wide = _wide(reference, approximation)
    signal = float(wide[0] @ wide[0])
    difference = wide[0] - wide[1]
    noise = float(difference @ difference)
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def cosine(reference: Tensor, approximation: Tensor) -> float:
    """The cosine of the angle between the two, seen as vectors, float64; 1 for two zero vectors."""
    a, b = _wide(reference, approximation)
    lengths = float(a.norm()) * float(b.norm())
    if lengths == 0.0:
        return 1.0 if torch.equal(a, b) else 0.0
    return float(a @ b) / lengths


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) in nats per position, float64.

    Both [..., vocabulary]; the result has the leading shape. Mean over positions is the
    caller's.
    """
    _same_shape(reference_logits, logits)
    p = torch.log_softmax(reference_logits.to(torch.float64), dim=-1)
    q = torch.log_softmax(logits.to(torch.float64), dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] in nats, float64. logits [n, vocabulary], targets [n] int64."""
    wide = torch.log_softmax(logits.to(torch.float64), dim=-1)
    return -wide.gather(-1, targets[:, None]).squeeze(-1)


@dataclass(frozen=True)
class Perplexity:
    """exp(sum of NLL / predictions) over equal-sized, non-overlapping windows."""

    value: float
    predictions: int
    windows: int


@dataclass(frozen=True)
class Difference:
    """A variant against its reference on the same windows.

    nats: mean difference of NLL per prediction; relative: ppl / ppl_reference - 1. The standard
    errors are of the paired differences between windows (relative by the delta method); nan
    for a single window.
    """

    nats: float
    nats_error: float
    relative: float
    relative_error: float


def perplexity(nll_sums: Sequence[float], predictions: Sequence[int]) -> Perplexity:
    """Perplexity from one NLL sum (nats) and one number of predictions per window."""
    _check_windows(nll_sums, predictions)
    total = sum(predictions)
    return Perplexity(math.exp(math.fsum(nll_sums) / total), total, len(predictions))


def perplexity_difference(
    reference: Sequence[float], variant: Sequence[float], predictions: Sequence[int]
) -> Difference:
    """How much worse `variant` is than `reference`, window by window, with its standard error.

    NLL sums (nats) of the same windows in the same order. Windows weigh by their predictions.
    """
    _check_windows(reference, predictions)
    _check_windows(variant, predictions)
    count = len(predictions)
    mean_size = sum(predictions) / count
    gaps = [b - a for a, b in zip(reference, variant, strict=True)]
    nats = math.fsum(gaps) / sum(predictions)
    residuals = [gap - nats * size for gap, size in zip(gaps, predictions, strict=True)]
    variance = math.fsum(r * r for r in residuals) / (count - 1) if count > 1 else math.nan
    error = math.sqrt(variance / count) / mean_size
    ratio = math.exp(nats)
    return Difference(nats, error, ratio - 1.0, ratio * error)


def _check_windows(nll_sums: Sequence[float], predictions: Sequence[int]) -> None:
    if not predictions or len(nll_sums) != len(predictions):
        raise QuantError(
            f"perplexity: {len(nll_sums)} NLL sums for {len(predictions)} windows; "
            "the text is too short, or two runs saw different windows"
        )


def _wide(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    _same_shape(a, b)
    return a.reshape(-1).to(torch.float64), b.reshape(-1).to(torch.float64)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise QuantError(f"cannot compare shapes {tuple(a.shape)} and {tuple(b.shape)}")
