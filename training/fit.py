"""The training loop: pictures and text, Muon for matrices, AdamW for the rest, one core."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2VLForConditionalGeneration

from training.batches import CELL_CLASSES, Batch, Sampler
from training.forward import encode_pictures, label_logits, labels_of
from training.questions import KINDS


@dataclass(frozen=True)
class Schedule:
    """Sizes and rates of a training run."""

    steps: int = 1700
    warm_up: int = 100
    pictures: int = 16
    kinds: tuple[str, ...] = KINDS
    text_every: int = 4
    text_windows: int = 2
    text_length: int = 512
    text_weight: float = 0.5
    adamw_rate: float = 1e-3
    muon_rate: float = 4e-3
    weight_decay: float = 0.05
    last_rate: float = 0.02

    def rate(self, step: int) -> float:
        """Share of the full learning rate: warm-up, then a cosine down to `last_rate`."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / self.warm_up) * max(self.last_rate, cosine)


def make_optimizers(
    model: nn.Module, probe: nn.Module, schedule: Schedule
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for hidden matrices; AdamW for embedding, filter and vectors."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in trained if p.ndim == 2 and "embed_tokens" not in name]
    tables = [p for name, p in trained if p.ndim > 2 or "embed_tokens" in name]
    vectors = [p for _, p in trained if p.ndim < 2]
    groups = [
        {"params": tables, "weight_decay": schedule.weight_decay},
        {"params": [*vectors, *probe.parameters()], "weight_decay": 0.0},
    ]
    return [
        torch.optim.AdamW(groups, lr=schedule.adamw_rate, betas=(0.9, 0.98), fused=True),
        torch.optim.Muon(
            hidden,
            lr=schedule.muon_rate,
            weight_decay=schedule.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
    ]


def _answer_loss(
    model: Qwen2VLForConditionalGeneration, batch: Batch, features: torch.Tensor | None
) -> torch.Tensor:
    losses = cross_entropy(label_logits(model, batch, features), labels_of(batch), reduction="none")
    return (losses * batch.weights).sum() / batch.weights.sum()


def _probe_loss(probe: nn.Module, features: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Every image token names colour, kind, size and place of its cell (training only).

    Without it the model sits at the answers' prior for a thousand steps: nothing rewards
    seeing before looking up works, nor the other way round.
    """
    parts = probe(features.float()).split(CELL_CLASSES, dim=-1)
    losses = [cross_entropy(p.flatten(0, 1), cells[..., i].flatten()) for i, p in enumerate(parts)]
    return torch.stack(losses).mean()


@dataclass
class _Run:
    """All that a run is made of, so that a killed one goes on where its checkpoint left it."""

    model: Qwen2VLForConditionalGeneration
    probe: nn.Module
    optimizers: list[torch.optim.Optimizer]
    sampler: Sampler
    step: int = 0
    earlier_minutes: float = 0.0

    def minutes(self) -> float:
        """CPU-minutes spent on this run, by this process and by those before it."""
        return self.earlier_minutes + time.process_time() / 60

    def save(self, path: Path) -> None:
        """Write the checkpoint; the file is replaced at once."""
        staged = path.with_suffix(".part")
        state = {
            "model": self.model.state_dict(),
            "probe": self.probe.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.sampler.rng.bit_generator.state,
            "step": self.step,
            "minutes": self.minutes(),
        }
        torch.save(state, staged)
        staged.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.probe.load_state_dict(state["probe"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.sampler.rng.bit_generator.state = state["generator"]
        self.step, self.earlier_minutes = state["step"], state["minutes"]


def fit(
    model: Qwen2VLForConditionalGeneration,
    sampler: Sampler,
    schedule: Schedule,
    checkpoint: Path,
    report: Callable[[int, str], None],
) -> float:
    """Train in place, from `checkpoint` on where there is one; returns CPU-minutes spent.

    `report` is called every 50 steps with the step and a line of figures; the checkpoint is
    written as often.
    """
    probe = nn.Linear(model.config.text_config.hidden_size, sum(CELL_CLASSES))
    optimizers = make_optimizers(model, probe, schedule)
    base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    run = _Run(model, probe, optimizers, sampler)
    if checkpoint.exists():
        run.load(checkpoint)
    weights = [p for p in model.parameters() if p.requires_grad]
    seen = torch.zeros(3)
    for step in range(run.step, schedule.steps):
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.rate(step)
        seen[:2] += _picture_step(model, probe, sampler.pictures(schedule.pictures, schedule.kinds))
        if step % schedule.text_every == 0:
            texts = sampler.texts(schedule.text_windows, schedule.text_length)
            seen[2] += schedule.text_every * _text_step(model, texts, schedule.text_weight)
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step = step + 1
        if run.step % 50 == 0:
            run.save(checkpoint)
            report(run.step, f"{_line(seen / 50)}  {run.minutes():.1f} CPU-min")
            seen.zero_()
    return run.minutes()


def _line(losses: torch.Tensor) -> str:
    names = ("answers", "cells", "text")
    return "  ".join(f"{n} {x:.4f}" for n, x in zip(names, losses.tolist(), strict=True))


def _text_step(model: Qwen2VLForConditionalGeneration, batch: Batch, weight: float) -> torch.Tensor:
    """Forward and backward on text; its loss."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = _answer_loss(model, batch, None)
    torch.autograd.backward(weight * loss)
    return loss.detach()


def _picture_step(
    model: Qwen2VLForConditionalGeneration, probe: nn.Module, batch: Batch
) -> torch.Tensor:
    """Forward and backward on pictures; the losses of answers and cells, float32 [2]."""
    assert batch.patches is not None
    assert batch.cells is not None
    with torch.autocast("cpu", torch.bfloat16):
        features = encode_pictures(model.model.visual, batch.patches)
        answers = _answer_loss(model, batch, features)
    cells = _probe_loss(probe, features, batch.cells)
    torch.autograd.backward(answers + cells)
    return torch.stack([answers.detach(), cells.detach()])
