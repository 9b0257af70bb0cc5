"""The generators are pure functions of their seeds, and say only true things."""

import numpy as np
import pytest

from training.assets import draw_pictures
from training.batches import IMAGE_TOKENS, Sampler, to_patches
from training.language import make_lexicon, write_text
from training.questions import KINDS, LINES, Question, ask
from training.shapes import COLORS, POSITIONS, SIDE, Scene, render, sample_scene
from training.tokenizer import train_tokenizer


def test_a_seed_names_its_pictures_and_questions() -> None:
    first, second, other = (draw_pictures(seed, 3) for seed in (7, 7, 8))
    for a, b, c in zip(first, second, other, strict=True):
        assert a.questions == b.questions
        assert (a.pixels == b.pixels).all()
        assert (a.pixels != c.pixels).any()


def test_a_seed_names_its_text() -> None:
    text = write_text(5, 2_000)
    assert text == write_text(5, 2_000)
    assert len(text) >= 2_000
    assert text != write_text(6, 2_000)


def test_lexicon_has_no_word_twice() -> None:
    lexicon = make_lexicon()
    words = [*lexicon.nouns[0], *(verb.stem for verb in lexicon.verbs[0])]
    assert len(set(words)) == len(words) == 330
    assert sorted(lexicon.nouns[0]) == sorted(lexicon.nouns[1])


def test_pictures_are_dark_grounds_with_shapes_of_their_color() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        scene = sample_scene(rng)
        pixels = render(scene, rng).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        for index, cell in enumerate(scene.cells):
            row, column = divmod(index, 3)
            part = pixels[row * 56 : row * 56 + 56, column * 56 : column * 56 + 56].reshape(-1, 3)
            if cell is None:
                continue
            near = abs(part - np.array(COLORS[cell.color])).max(-1) <= 14
            # A small ring has the least ink: 8 pixels of radius, 3 of width.
            assert near.sum() >= 80


def _answers_of(scene: Scene, question: Question) -> str:
    """The answer, worked out again from the words of the prompt."""
    prompt, cells = question.prompt, scene.cells
    if question.kind == "at":
        cell = cells[POSITIONS.index(prompt.removeprefix("What is at the ").rstrip("?"))]
        return str(cell) if cell else "nothing"
    if question.kind == "line":
        places = dict(LINES)[prompt.removeprefix("Describe the ").rstrip(".")]
        return ", ".join(str(cells[i]) if cells[i] else "nothing" for i in places)
    if question.kind == "picture":
        rows = [cells[row : row + 3] for row in range(0, len(cells), 3)]
        return "; ".join(", ".join(str(c) if c else "nothing" for c in row) for row in rows)
    attribute, place = prompt.removeprefix("What ").rstrip("?").split(" is at the ")
    cell = cells[POSITIONS.index(place)]
    return str(cell).split()[("size", "color", "shape").index(attribute)] if cell else "nothing"


@pytest.mark.parametrize("seed", range(20))
def test_every_answer_is_true(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    for question in ask(scene, KINDS * 3, rng):
        assert question.answer == _answers_of(scene, question), question


def test_training_batches_see_what_the_image_processor_makes() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    pixels = draw_pictures(11, 1)[0].pixels
    made = Qwen2VLImageProcessorPil()(images=pixels, return_tensors="np")["pixel_values"]
    frames = made.reshape(len(made), 3, 2, 14 * 14)
    assert np.array_equal(frames[:, :, 0], frames[:, :, 1])
    ours = to_patches([pixels])[0].numpy().reshape(len(made), 3, 14 * 14)
    assert np.abs(ours - frames[:, :, 0]).max() < 1e-5


def test_shared_prefix_has_the_models_own_positions() -> None:
    import torch

    from training.architecture import classic_config, new_model

    tokenizer = train_tokenizer()
    sampler = Sampler(tokenizer, seed=1, text_characters=1_000)
    model = new_model(classic_config(tokenizer, torch.float32), seed=0)
    ids = torch.tensor([sampler.prefix])
    positions, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == sampler.image_token).int(),
        image_grid_thw=torch.tensor([[1, 12, 12]]),
    )
    assert (ids == sampler.image_token).sum() == IMAGE_TOKENS
    assert np.array_equal(positions[:, 0].numpy(), sampler.prefix_positions)
