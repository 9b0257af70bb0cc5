"""Scores are what transformers' own loss and greedy generation say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM, Qwen2VLForConditionalGeneration

from buildsys.models.errors import ModelError
from buildsys.models.open import open_model
from buildsys.models.runtime import load_module, logits
from buildsys.models.samples import Sample
from buildsys.models.scoring import AnswerScore, score_answers, score_text
from tests import tiny_models

GRID = torch.tensor([[1, 4, 4]])
VISION = [tiny_models.FIRST_SPECIAL + 3, *[tiny_models.IMAGE_TOKEN] * 4]
VISION += [tiny_models.FIRST_SPECIAL + 4]


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [5, 9, 5, 7, 9][:count]
    return [torch.randint(0, 250, (n,), generator=generator).tolist() for n in lengths]


def answered(prompt: list[int], answer: list[int], pixels: torch.Tensor | None = None) -> Sample:
    return Sample(
        torch.tensor([prompt + answer]),
        pixel_values=pixels,
        image_grid_thw=None if pixels is None else GRID,
        answer=slice(len(prompt), len(prompt) + len(answer)),
    )


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], **inputs: Any) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, **inputs
    )
    return [int(token) for token in made[0, len(prompt) :]]


def test_exact_match_is_that_of_greedy_generation(qwen2_folder: Path) -> None:
    theirs = Qwen2ForCausalLM.from_pretrained(qwen2_folder).eval()
    module = load_module(open_model(qwen2_folder))
    samples, expected = [], []
    for prompt in prompts(5):
        answer = greedy(theirs, prompt)
        for change in (None, 0, 3, 5):
            given = list(answer)
            if change is not None:
                given[change] = (given[change] + 1) % 250
            samples.append(answered(prompt, given))
            expected.append(change is None)
    assert [score.exact for score in score_answers(module, samples)] == expected


def test_exact_match_with_images_is_that_of_greedy_generation(qwen2vl_folder: Path) -> None:
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(qwen2vl_folder).eval()
    module = load_module(open_model(qwen2vl_folder))
    generator = torch.Generator().manual_seed(4)
    samples, expected = [], []
    for number, prompt in enumerate(prompts(5)):
        if number % 2 == 0:
            pixels = torch.randn(16, 1176, generator=generator)
        whole = [*prompt[:2], *VISION, *prompt[2:]]
        kinds = (torch.tensor([whole]) == tiny_models.IMAGE_TOKEN).to(torch.int32)
        answer = greedy(
            theirs, whole, pixel_values=pixels, image_grid_thw=GRID, mm_token_type_ids=kinds
        )
        samples.append(answered(whole, answer, pixels))
        samples.append(answered(whole, [*answer[:-1], (answer[-1] + 1) % 250], pixels))
        expected += [True, False]
    assert [score.exact for score in score_answers(module, samples)] == expected


def by_hand(rows: torch.Tensor, sample: Sample) -> AnswerScore:
    """From the logits [n, vocab] of one sample, run alone."""
    assert sample.answer is not None
    begin, end = sample.answer.start, sample.answer.stop
    chosen = rows[begin - 1 : end - 1].double()
    wanted = sample.input_ids[0, begin:end]
    logprob = torch.log_softmax(chosen, -1)[range(end - begin), wanted].sum()
    lead = []
    for row, token in zip(chosen, wanted.tolist(), strict=True):
        others = torch.cat([row[:token], row[token + 1 :]])
        lead.append(float(row[token] - others.max()))
    return AnswerScore(all(x > 0 for x in lead), float(logprob), min(lead))


def test_batches_of_equal_length_score_as_each_alone(qwen2vl_folder: Path) -> None:
    module = load_module(open_model(qwen2vl_folder))
    generator = torch.Generator().manual_seed(5)
    pixels = [torch.randn(16, 1176, generator=generator) for _ in range(2)]
    samples = []
    for number, prompt in enumerate(prompts(5)):
        if number == 2:
            samples.append(answered(prompt, [7, 8, 9]))
        else:
            whole = [*prompt[:2], *VISION, *prompt[2:]]
            samples.append(answered(whole, [number, 8, 9], pixels[number // 3]))
    for score, sample in zip(score_answers(module, samples), samples, strict=True):
        expected = by_hand(logits(module, sample), sample)
        assert score.exact == expected.exact
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert score.margin == pytest.approx(expected.margin, abs=1e-4)


def test_the_nll_of_a_window_is_transformers_loss(qwen2_folder: Path) -> None:
    theirs = Qwen2ForCausalLM.from_pretrained(qwen2_folder).eval()
    module = load_module(open_model(qwen2_folder))
    windows = [Sample(torch.tensor([prompt * 30])) for prompt in prompts(2)]
    for score, window in zip(score_text(module, windows), windows, strict=True):
        with torch.inference_mode():
            loss = float(theirs(window.input_ids, labels=window.input_ids).loss)
        assert score.predictions == window.input_ids.shape[1] - 1
        assert score.nll / score.predictions == pytest.approx(loss, rel=1e-5)


def test_a_question_without_an_answer_is_an_error(qwen2_folder: Path) -> None:
    module = load_module(open_model(qwen2_folder))
    with pytest.raises(ModelError, match=r"cat\.png: what\?: has no given answer"):
        score_answers(module, [Sample(torch.tensor([[1, 2]]), origin="cat.png: what?")])
