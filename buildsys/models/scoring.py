"""Scores of a module: likelihood of text windows, and of given answers to questions.

Exact match needs no generation. Greedy decoding gives the reference answer if and only if at
every position of the answer, its end of turn included, the most likely token after the prompt
and the reference so far is the reference token: by induction, the first difference would be the
first position where the argmax differs. So one forward pass over prompt and answer decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from buildsys.models.errors import ModelError
from buildsys.models.runtime import hidden_states, position_ids
from buildsys.models.samples import Sample
from buildsys.quant.metrics import token_nll

# Tokens whose logits exist at a time: a vocabulary of 150,000 takes 80 MB in float64.
HEAD_TOKENS = 64
# Tokens in one forward pass over questions.
BATCH_TOKENS = 4096

Progress = Callable[[int], None]


@dataclass(frozen=True)
class WindowScore:
    """One window of text: the sum of -log p (nats) over its predictions, and the token that was
    the likeliest at each."""

    nll: float
    predictions: int
    likeliest: tuple[int, ...] = ()


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


@dataclass(frozen=True)
class _Row:
    """Questions that begin with the same tokens, laid out behind one copy of them.

    prompts: with their indices among all. shared: how many tokens they begin with. A question's
    other tokens follow those of the questions before it.
    """

    prompts: tuple[tuple[int, _Prompt], ...]
    shared: int

    def tails(self) -> list[slice]:
        """Where each question's own tokens lie in the row."""
        ends = list(accumulate((len(p.ids) - self.shared for _, p in self.prompts), initial=0))
        return [slice(self.shared + a, self.shared + b) for a, b in pairwise(ends)]

    def __len__(self) -> int:
        return int(self.tails()[-1].stop)


@torch.inference_mode()
def score_text(
    module: nn.Module, windows: Iterable[Sample], progress: Progress = lambda tokens: None
) -> list[WindowScore]:
    """The likelihood of every window; no token is predicted across a border."""
    scores = []
    for window in windows:
        ids = window.input_ids[0]
        nll, likeliest = 0.0, []
        for part, wanted in _head_parts(hidden_states(module, window)[:-1], ids[1:]):
            logits = _head(module, part)
            nll += float(token_nll(logits, wanted).sum())
            likeliest += logits.argmax(-1).tolist()
        scores.append(WindowScore(nll, len(ids) - 1, tuple(likeliest)))
        progress(len(ids))
    return scores


@torch.inference_mode()
def score_answers(
    module: nn.Module, samples: Iterable[Sample], progress: Progress = lambda tokens: None
) -> list[AnswerScore]:
    """The score of every question's given answer, in order.

    Consecutive questions about one image share its vision tokens and what their prompts begin
    with: each attends to that and to itself only, so it sees what it would see alone.
    Raises ModelError for a sample without an answer.
    """
    rows = list(_rows(enumerate(_prompts(module, samples))))
    scores: dict[int, AnswerScore] = {}
    for batch in _batches(rows):
        for row, states in zip(batch, _run(module, batch), strict=True):
            for (index, prompt), tail in zip(row.prompts, row.tails(), strict=True):
                own = torch.cat([states[: row.shared], states[tail]])
                scores[index] = _score(module, prompt, own)
        progress(sum(len(prompt.ids) for row in batch for _, prompt in row.prompts))
    return [scores[index] for index in sorted(scores)]


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


def _rows(prompts: Iterable[tuple[int, _Prompt]]) -> Iterator[_Row]:
    """Consecutive questions about one image as one row; any other one as a row of its own."""
    for _, group in groupby(prompts, key=lambda item: _image_key(*item)):
        together = tuple(group)
        shared = min(len(prompt.ids) for _, prompt in together)
        first = together[0][1].ids[:shared]
        for _, prompt in together[1:]:
            differs = (prompt.ids[:shared] != first[:shared]).nonzero()
            shared = int(differs[0]) if len(differs) else shared
        yield _Row(together, shared)


def _image_key(index: int, prompt: _Prompt) -> tuple[str, int]:
    return ("alone", index) if prompt.vision is None else ("image", id(prompt.vision))


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows of about one length, as many as fit a pass, shortest first."""
    batch: list[_Row] = []
    for row in sorted(rows, key=len):
        if batch and (len(batch) + 1) * len(row) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _run(module: nn.Module, rows: Sequence[_Row]) -> Tensor:
    """The head's inputs [rows, longest row, hidden]."""
    backbone: Any = module.model
    language = getattr(backbone, "language_model", backbone)
    length = max(map(len, rows))
    laid_out = [_lay_out(row, length) for row in rows]
    ids, positions, segments = (torch.stack(parts, dim=-2) for parts in zip(*laid_out, strict=True))
    embeds = language.embed_tokens(ids)
    seen = [tokens for row in rows for tokens in _vision_of(row, backbone)]
    if seen:
        embeds[ids == backbone.config.image_token_id] = torch.cat(seen).to(embeds.dtype)
    mask = _mask(segments)
    found: Tensor = language(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask={"full_attention": mask, "sliding_attention": mask},
        use_cache=False,
    ).last_hidden_state
    return found


def _lay_out(row: _Row, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [length], positions [length] or [3, length], and segments [length] of a row.

    Segment 0 is what all share, -1 the padding at the end.
    """
    first = row.prompts[0][1]
    ids = torch.zeros(length, dtype=torch.int64)
    positions = first.positions.new_zeros(*first.positions.shape[:-1], length)
    segments = torch.full((length,), -1)
    ids[: row.shared], segments[: row.shared] = first.ids[: row.shared], 0
    positions[..., : row.shared] = first.positions[..., : row.shared]
    for number, ((_, prompt), tail) in enumerate(zip(row.prompts, row.tails(), strict=True), 1):
        ids[tail], segments[tail] = prompt.ids[row.shared :], number
        positions[..., tail] = prompt.positions[..., row.shared :]
    return ids, positions, segments


def _vision_of(row: _Row, backbone: Any) -> Iterator[Tensor]:
    """Merged vision tokens in the order of the row's image tokens."""
    vision = row.prompts[0][1].vision
    if vision is None:
        return
    parts = [row.prompts[0][1].ids[: row.shared]]
    parts += [prompt.ids[row.shared :] for _, prompt in row.prompts]
    for part in parts:
        if bool((part == backbone.config.image_token_id).any()):
            yield vision


def _mask(segments: Tensor) -> Tensor:
    """Who may look at whom: backwards, at what is shared and at the own segment.

    segments [rows, n] -> bool [rows, 1, n, n], true where a query (second last) may look.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    return ((key == 0) | (key == query)).tril()[:, None]


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
