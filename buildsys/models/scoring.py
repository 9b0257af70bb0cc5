"""Scores of a module: likelihood of text windows, and of given answers to questions.

Exact match needs no generation. Greedy decoding gives the reference answer if and only if at
every position of the answer, its end of turn included, the most likely token after the prompt
and the reference so far is the reference token: by induction, the first difference would be the
first position where the argmax differs. So one forward pass over prompt and answer decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from buildsys.models.errors import ModelError
from buildsys.models.runtime import hidden_states, position_ids
from buildsys.models.samples import Sample
from buildsys.quant.metrics import token_nll

# Tokens whose logits exist at a time: a vocabulary of 150,000 takes 80 MB in float64.
HEAD_TOKENS = 64
# Tokens in one forward pass over questions of equal length.
BATCH_TOKENS = 4096

Progress = Callable[[int], None]


@dataclass(frozen=True)
class WindowScore:
    """One window of text: the sum of -log p (nats) over its predictions."""

    nll: float
    predictions: int


@dataclass(frozen=True)
class AnswerScore:
    """One given answer under greedy decoding.

    exact: greedy decoding gives it. logprob: log p of the whole answer (nats). margin: how far
    the logit of the reference token is above the best other one, at the worst position.
    """

    exact: bool
    logprob: float
    margin: float


@dataclass(frozen=True)
class _Prompt:
    """A question made ready: ids [n], merged vision tokens [k, hidden], positions [n] or [3, n]."""

    ids: Tensor
    vision: Tensor | None
    positions: Tensor
    answer: slice


@torch.inference_mode()
def score_text(
    module: nn.Module, windows: Iterable[Sample], progress: Progress = lambda tokens: None
) -> list[WindowScore]:
    """The likelihood of every window; no token is predicted across a border."""
    scores = []
    for window in windows:
        ids = window.input_ids[0]
        parts = _head_parts(hidden_states(module, window)[:-1], ids[1:])
        nll = sum(float(token_nll(_head(module, part), wanted).sum()) for part, wanted in parts)
        scores.append(WindowScore(nll, len(ids) - 1))
        progress(len(ids))
    return scores


@torch.inference_mode()
def score_answers(
    module: nn.Module, samples: Iterable[Sample], progress: Progress = lambda tokens: None
) -> list[AnswerScore]:
    """The score of every question's given answer, in order.

    Questions of equal length run together, without padding; the vision tower runs once for
    consecutive questions about one image. Raises ModelError for a sample without an answer.
    """
    prompts = list(_prompts(module, samples))
    scores: dict[int, AnswerScore] = {}
    for batch in _batches([len(prompt.ids) for prompt in prompts]):
        chosen = [prompts[index] for index in batch]
        hidden = _run(module, chosen)
        for index, prompt, states in zip(batch, chosen, hidden, strict=True):
            scores[index] = _score(module, prompt, states)
        progress(sum(len(prompt.ids) for prompt in chosen))
    return [scores[index] for index in range(len(prompts))]


def _prompts(module: nn.Module, samples: Iterable[Sample]) -> Iterator[_Prompt]:
    backbone: Any = module.model
    pixels: Tensor | None = None
    vision: Tensor | None = None
    for sample in samples:
        if sample.answer is None:
            raise ModelError(
                f"{sample.origin}: has no given answer to compare with",
                field="answers",
                remedy="Give the images source `answers`.",
            )
        if sample.pixel_values is None:
            vision = None
        elif sample.pixel_values is not pixels:
            pixels = sample.pixel_values
            vision = backbone.visual(pixels, grid_thw=sample.image_grid_thw).pooler_output
        positions = position_ids(module, sample)
        yield _Prompt(sample.input_ids[0], vision, positions[..., 0, :], sample.answer)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of samples of one length, as many as fit a pass, shortest first."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    for length in sorted(groups):
        step = max(1, BATCH_TOKENS // length)
        for first in range(0, len(groups[length]), step):
            yield groups[length][first : first + step]


def _run(module: nn.Module, prompts: Sequence[_Prompt]) -> Tensor:
    """The head's inputs [batch, n, hidden] of prompts of one length."""
    backbone: Any = module.model
    language = getattr(backbone, "language_model", backbone)
    ids = torch.stack([prompt.ids for prompt in prompts])
    embeds = language.embed_tokens(ids)
    vision = [prompt.vision for prompt in prompts if prompt.vision is not None]
    if vision:
        # Row by row, as the prompts stand: the order of the concatenated vision tokens.
        embeds[ids == backbone.config.image_token_id] = torch.cat(vision).to(embeds.dtype)
    # [n] each for a text model, [3, n] for mrope: the batch is the second to last axis.
    positions = torch.stack([prompt.positions for prompt in prompts], dim=-2)
    found: Tensor = language(
        inputs_embeds=embeds, position_ids=positions, use_cache=False
    ).last_hidden_state
    return found


def _score(module: nn.Module, prompt: _Prompt, states: Tensor) -> AnswerScore:
    begin, end = prompt.answer.start, prompt.answer.stop
    wanted = prompt.ids[begin:end]
    exact, logprob, margin = True, 0.0, float("inf")
    # The state at position i predicts token i + 1.
    for part, tokens in _head_parts(states[begin - 1 : end - 1], wanted):
        logits = _head(module, part)
        exact = exact and bool((logits.argmax(-1) == tokens).all())
        logprob -= float(token_nll(logits, tokens).sum())
        chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
        others = logits.scatter(-1, tokens[:, None], float("-inf")).amax(-1)
        margin = min(margin, float((chosen - others).min()))
    return AnswerScore(exact, logprob, margin)


def _head_parts(states: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """States and the tokens that they predict, a few at a time: logits are large."""
    parts = torch.split(states, HEAD_TOKENS), torch.split(wanted, HEAD_TOKENS)
    yield from zip(*parts, strict=True)


def _head(module: nn.Module, hidden: Tensor) -> Tensor:
    head: Any = module.lm_head
    logits: Tensor = head(hidden)
    return logits
