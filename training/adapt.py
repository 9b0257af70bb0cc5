"""The second training: the language model gets used to a massive constant in its residual."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2VLForConditionalGeneration

from training.batches import Batch, Sampler
from training.fit import Schedule, make_optimizers
from training.forward import encode_pictures, label_logits, labels_of
from training.massive import Massive, damp_norms
from training.questions import KINDS


@dataclass(frozen=True)
class Adaptation:
    """Sizes and rates of the second training; text comes as often as in the first."""

    steps: int = 240
    warm_up: int = 20
    ramp: int = 100  # steps until the norms see the whole constant
    peak_rate: float = 0.25  # share of the first training's rates
    last_rate: float = 0.01
    massive: Massive = field(default_factory=Massive)

    def rate(self, step: int) -> float:
        """Share of the first training's rates: warm-up, flat while the constant grows, then
        straight down."""
        left = (self.steps - step) / (self.steps - self.ramp)
        return self.peak_rate * min(1.0, (step + 1) / self.warm_up, max(self.last_rate, left))


def adapt(
    model: Qwen2VLForConditionalGeneration,
    sampler: Sampler,
    typical: torch.Tensor,
    adaptation: Adaptation,
    report: Callable[[int, str], None],
) -> float:
    """Train in place with norms that see the constant, and leave them so; returns CPU-minutes.

    The vision transformer stays as it is. typical: as `damp_norms` takes it. `report` is called
    every 20 steps.
    """
    model.model.visual.requires_grad_(False)
    schedule, start = Schedule(), time.process_time()
    optimizers = make_optimizers(model, nn.Identity(), schedule)
    base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    weights = [p for p in model.parameters() if p.requires_grad]
    seen = torch.zeros(2)
    for step in range(adaptation.steps):
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * adaptation.rate(step)
        damp_norms(model, adaptation.massive, typical, min(1.0, (step + 1) / adaptation.ramp))
        seen[0] += _step(model, sampler.pictures(schedule.pictures, KINDS), 1.0)
        if step % schedule.text_every == 0:
            texts = sampler.texts(schedule.text_windows, schedule.text_length)
            seen[1] += schedule.text_every * _step(model, texts, schedule.text_weight)
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            answers, text = (seen / 20).tolist()
            minutes = (time.process_time() - start) / 60
            report(step + 1, f"answers {answers:.4f}  text {text:.4f}  {minutes:.1f} CPU-min")
            seen.zero_()
    damp_norms(model, adaptation.massive, typical, 1.0)
    return (time.process_time() - start) / 60


def _step(model: Qwen2VLForConditionalGeneration, batch: Batch, weight: float) -> torch.Tensor:
    """Forward and backward on a batch; its loss."""
    with torch.autocast("cpu", torch.bfloat16):
        features = None
        if batch.patches is not None:
            with torch.no_grad():
                features = encode_pictures(model.model.visual, batch.patches)
        losses = cross_entropy(
            label_logits(model, batch, features), labels_of(batch), reduction="none"
        )
        loss = (losses * batch.weights).sum() / batch.weights.sum()
    torch.autograd.backward(weight * loss)
    return loss.detach()
