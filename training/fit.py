"""The training loop: pictures and text, Muon for matrices, AdamW for the rest, one core."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2VLForConditionalGeneration

from training.batches import CELL_CLASSES, Batch, Sampler
from training.forward import encode_pictures, label_logits, labels_of
from training.questions import FIRST_KINDS, TRAINING_KINDS


@dataclass(frozen=True)
class Schedule:
    """Sizes and rates of a training run."""

    steps: int = 2200
    warm_up: int = 100
    pictures: int = 16
    kinds: tuple[str, ...] = TRAINING_KINDS
    first_kinds: tuple[str, ...] = FIRST_KINDS
    first_steps: int = 400
    text_every: int = 3
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


def fit(
    model: Qwen2VLForConditionalGeneration,
    sampler: Sampler,
    schedule: Schedule,
    report: Callable[[int, str], None],
) -> None:
    """Train in place; `report` is called every 50 steps with the step and a line of figures."""
    probe = nn.Linear(model.config.text_config.hidden_size, sum(CELL_CLASSES))
    optimizers = make_optimizers(model, probe, schedule)
    full_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    weights = [p for p in model.parameters() if p.requires_grad]
    seen = torch.zeros(3)
    for step in range(schedule.steps):
        for optimizer, rates in zip(optimizers, full_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.rate(step)
        kinds = schedule.first_kinds if step < schedule.first_steps else schedule.kinds
        seen[:2] += _picture_step(model, probe, sampler.pictures(schedule.pictures, kinds))
        if step % schedule.text_every == 0:
            texts = sampler.texts(schedule.text_windows, schedule.text_length)
            with torch.autocast("cpu", torch.bfloat16):
                loss = _answer_loss(model, texts, None)
            torch.autograd.backward(schedule.text_weight * loss)
            seen[2] += schedule.text_every * loss.detach()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            answer, cells, text = (seen / 50).tolist()
            minutes = time.process_time() / 60
            report(
                step + 1,
                f"answers {answer:.4f}  cells {cells:.4f}  text {text:.3f}  {minutes:.1f} CPU-min",
            )
            seen.zero_()


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
