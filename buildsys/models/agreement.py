"""How far a variant is from the model as it is: layer by layer, and in what it predicts.

On some windows of text the reference's states behind every layer and some of its logits are
kept; a variant runs on the same windows and is compared. Rotated variants compute in another
basis of the residual stream: the turn is found from the two embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from buildsys.models.runtime import hidden_states
from buildsys.quant.metrics import kl_divergence

if TYPE_CHECKING:
    from buildsys.models.samples import Sample

# Tokens whose states are kept: at 28 layers of width 3,584 they take 205 MB.
TOKENS = 512
# Positions whose logits are kept: with a vocabulary of 150,000 they take 77 MB.
POSITIONS = 128
WORST = 10


@dataclass(frozen=True)
class LayerError:
    """Of the state behind a layer: signal to noise in dB, as the mean over tokens of
    |error|^2 / |state|^2, and how much of that ratio the layer added."""

    layer: int
    sqnr: float
    added: float


@dataclass(frozen=True)
class Agreement:
    """kl: mean over positions of KL(reference || variant), nats. layers: in order."""

    kl: float
    layers: tuple[LayerError, ...]

    def worst(self) -> list[LayerError]:
        """The layers that added most, first."""
        return sorted(self.layers, key=lambda layer: -layer.added)[:WORST]


@dataclass(frozen=True)
class Trace:
    """What one module computes on the windows: states [layers + 1, tokens, hidden], logits
    [positions, vocabulary], and rows of its embedding."""

    states: Tensor
    logits: Tensor
    embedding: Tensor


class Reference:
    """The trace of the model as it is, and the comparison of variants with it."""

    def __init__(self, module: nn.Module, windows: Sequence[Sample]) -> None:
        self._windows = _first_tokens(windows)
        self._trace = _trace(module, self._windows)

    def compare(self, module: nn.Module) -> Agreement:
        """Run a variant on the same windows."""
        trace = _trace(module, self._windows)
        turn = _turn(self._trace.embedding, trace.embedding)
        errors = []
        for mine, its in zip(self._trace.states, trace.states, strict=True):
            expected = mine.double() if turn is None else mine.double() @ turn
            lost = (its.double() - expected).square().sum(-1)
            errors.append(float((lost / expected.square().sum(-1).clamp(min=1e-300)).mean()))
        layers = tuple(
            LayerError(index, _decibels(errors[index + 1]), errors[index + 1] - errors[index])
            for index in range(len(errors) - 1)
        )
        return Agreement(float(kl_divergence(self._trace.logits, trace.logits).mean()), layers)


def _decibels(noise: float) -> float:
    return -10.0 * math.log10(noise) if noise > 0.0 else math.inf


def _first_tokens(windows: Sequence[Sample]) -> list[Sample]:
    """The first windows, as many as have at most TOKENS tokens; at least one."""
    chosen: list[Sample] = []
    count = 0
    for window in windows:
        count += window.input_ids.shape[1]
        if chosen and count > TOKENS:
            break
        chosen.append(window)
    return chosen


@torch.inference_mode()
def _trace(module: nn.Module, windows: Sequence[Sample]) -> Trace:
    states: list[Tensor] = []
    hidden: list[Tensor] = []
    for window in windows:
        seen: list[Tensor] = []
        with _watched(module, seen):
            hidden.append(hidden_states(module, window))
        states.append(torch.stack(seen))
    every = torch.cat(hidden)
    step = max(1, len(every) // POSITIONS)
    whole: Any = module
    embedding: Any = _language(module).embed_tokens
    rows: Tensor = embedding.weight
    kept = rows[:: max(1, len(rows) // (4 * rows.shape[1]))]
    return Trace(torch.cat(states, dim=1), whole.lm_head(every[::step]), kept.clone())


def _language(module: nn.Module) -> Any:
    backbone: Any = module.model
    return getattr(backbone, "language_model", backbone)


@contextmanager
def _watched(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Takes the state in front of the first layer, and behind every layer."""

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0][0])

    def behind(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    layers = list(_language(module).layers)
    handles = [layers[0].register_forward_pre_hook(before)]
    handles += [layer.register_forward_hook(behind) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turn(reference: Tensor, variant: Tensor) -> Tensor | None:
    """The orthogonal matrix that takes one embedding's rows nearest to the other's; None where
    they are equal. Source: the orthogonal Procrustes problem (Schoenemann, 1966)."""
    if torch.equal(reference, variant):
        return None
    u, _, vt = torch.linalg.svd(reference.double().T @ variant.double())
    turn: Tensor = u @ vt
    return turn
