"""Windows of text and questions about images are what the source says, in its order."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from PIL import Image

from buildsys.models.errors import ModelError
from buildsys.models.image_samples import ImageSamples, image_samples
from buildsys.models.open import Model, open_model
from buildsys.models.samples import open_samples, text_samples
from buildsys.models.text import load_tokenizer, token_ids
from tests import tiny_models

TEXT = "".join(f"{n} sheep are in the field. " for n in range(400))


@pytest.fixture
def model(qwen2vl_folder: Path) -> Model:
    return open_model(qwen2vl_folder)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of different sizes, one colour each."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, size in enumerate([(60, 90), (112, 84), (30, 200)]):
        Image.new("RGB", size, (80 * index, 10, 200)).save(folder / f"{index}.png")
    return folder


def test_windows_do_not_overlap_and_are_the_text_without_bos(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    windows = text_samples(model, tmp_path / "a.txt", samples=5, tokens=100)
    ids = [i for sample in windows for i in sample.input_ids[0].tolist()]
    assert ids == token_ids(load_tokenizer(model.folder), TEXT)[:500]
    assert [length.tokens for length in windows.lengths()] == [100] * 5


def test_a_seed_draws_other_windows_of_the_same_cut(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    every = {
        tuple(s.input_ids[0].tolist()) for s in text_samples(model, tmp_path / "a.txt", tokens=64)
    }
    drawn = [
        [
            tuple(s.input_ids[0].tolist())
            for s in text_samples(model, tmp_path / "a.txt", samples=8, tokens=64, seed=seed)
        ]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) <= every
    assert len(set(drawn[0])) == 8


def test_a_text_too_short_is_told_with_what_it_gives(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:999])
    with pytest.raises(ModelError, match=r"a\.txt: error: gives 9 windows of 100 tokens, not 64"):
        text_samples(model, tmp_path / "a.txt", samples=64, tokens=100)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_each_json_line_is_a_text_of_its_own(model: Model, tmp_path: Path, name: str) -> None:
    lines = "\n".join(json.dumps({"body": body}) for body in ("abcdef", "gh", "ijklm")) + "\n"
    data = lines.encode()
    (tmp_path / name).write_bytes(zstandard.compress(data) if name.endswith("zst") else data)
    windows = text_samples(model, tmp_path / name, tokens=3, field="body")
    tokenizer = load_tokenizer(model.folder)
    texts = [tokenizer.decode(sample.input_ids[0].tolist()) for sample in windows]
    assert texts == ["abc", "gh", "ijk", "def", "lm"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"text": 3}', "line 2 has no text in this field"),
        ("[]", "line 2"),
    ],
)
def test_a_bad_line_is_told_by_its_number(
    model: Model, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ModelError, match=message):
        text_samples(model, tmp_path / "a.jsonl")


def test_text_that_is_not_utf8_and_a_damaged_archive_are_named(
    model: Model, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    with pytest.raises(ModelError, match=r"a\.txt: error: is not UTF-8 \(byte 5\)"):
        text_samples(model, tmp_path / "a.txt")
    (tmp_path / "a.jsonl.zst").write_bytes(b"no archive")
    with pytest.raises(ModelError, match=r"a\.jsonl\.zst: error: cannot be read"):
        text_samples(model, tmp_path / "a.jsonl.zst")


def test_a_question_is_prompt_image_answer_and_end_of_turn(
    model: Model, images: Path, tmp_path: Path
) -> None:
    prompts = _write(tmp_path / "prompts.yaml", {f"{i}.png": ["What?", "Where?"] for i in range(3)})
    answers = _write(tmp_path / "answers.json", {f"{i}.png": ["red", "left"] for i in range(3)})
    paths = {"path": images, "prompts": prompts, "answers": answers}
    samples = list(open_samples(model, "images", paths, {"samples": 2, "size": None}))
    assert len(samples) == 4
    first, tokenizer = samples[1], load_tokenizer(model.folder)
    assert first.pixel_values is not None
    assert first.image_grid_thw is not None
    merged = int(first.image_grid_thw.prod()) // 4
    text = tokenizer.decode(first.input_ids[0].tolist(), skip_special_tokens=False)
    image = "<|vision_start|>" + "<|image_pad|>" * merged + "<|vision_end|>"
    assert text == (
        f"<|im_start|>user\n{image}Where?<|im_end|>\n<|im_start|>assistant\nleft<|im_end|>"
    )
    assert first.answer is not None
    answer = tokenizer.decode(first.input_ids[0, first.answer].tolist(), skip_special_tokens=False)
    assert answer == "left<|im_end|>"


@pytest.mark.parametrize("size", [None, (56, 84)])
def test_lengths_are_told_without_making_the_samples(
    model: Model, images: Path, size: tuple[int, int] | None
) -> None:
    samples = image_samples(model, images, size=size)
    for length, sample in zip(samples.lengths(), samples, strict=True):
        assert sample.pixel_values is not None
        assert sample.image_grid_thw is not None
        assert length.tokens == sample.input_ids.shape[1]
        assert length.patches == len(sample.pixel_values) == int(sample.image_grid_thw.prod())
        if size is not None:
            assert sample.image_grid_thw.tolist() == [[1, 4, 6]]


def test_pixels_are_those_of_the_models_processor(model: Model, images: Path) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model.folder, backend="pil")
    with Image.open(images / "1.png") as image:
        expected = processor(image, return_tensors="pt")
    samples = list(image_samples(model, images))
    assert samples[1].pixel_values is not None
    assert torch.equal(samples[1].pixel_values, expected["pixel_values"])
    assert torch.equal(samples[1].image_grid_thw, expected["image_grid_thw"])


def test_a_list_of_prompts_is_asked_of_every_image(
    model: Model, images: Path, tmp_path: Path
) -> None:
    samples = image_samples(model, images, prompts=_write(tmp_path / "p.json", ["A?", "B?"]))
    assert [question.prompt for question in samples.questions] == ["A?", "B?"] * 3


def test_a_missing_prompt_names_the_image(model: Model, images: Path, tmp_path: Path) -> None:
    prompts = _write(tmp_path / "prompts.yaml", {"0.png": "What?", "2.png": "What?"})
    with pytest.raises(
        ModelError, match=r"prompts\.yaml: error: field '1\.png': there is no prompt"
    ):
        image_samples(model, images, prompts=prompts)


def test_answers_that_are_not_parallel_name_the_image(
    model: Model, images: Path, tmp_path: Path
) -> None:
    answers = _write(tmp_path / "answers.json", {f"{i}.png": ["one"] * (i + 1) for i in range(3)})
    with pytest.raises(ModelError, match=r"field '1\.png': 2 answers for 1 prompts"):
        image_samples(model, images, answers=answers)


@pytest.mark.parametrize("content", [b"no image", b""])
def test_a_bad_image_is_named(model: Model, images: Path, content: bytes) -> None:
    (images / "1.png").write_bytes(content)
    with pytest.raises(ModelError, match=r"1\.png: error: is no image"):
        list(image_samples(model, images))


def test_a_truncated_image_is_named(model: Model, images: Path) -> None:
    stream = io.BytesIO()
    noise = torch.randint(0, 256, (90, 90, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(stream, format="PNG")
    (images / "1.png").write_bytes(stream.getvalue()[:-9000])
    with pytest.raises(ModelError, match=r"1\.png: error: is no image"):
        list(image_samples(model, images))


def test_too_few_images_and_an_odd_size_are_told(model: Model, images: Path) -> None:
    with pytest.raises(ModelError, match="holds 3 images, not 100"):
        image_samples(model, images, samples=100)
    with pytest.raises(ModelError, match=r"\[60, 90\] is not a multiple of 28 pixels"):
        image_samples(model, images, size=(60, 90))


def test_a_text_model_refuses_images(qwen2_folder: Path, images: Path) -> None:
    with pytest.raises(ModelError, match="a qwen2 sees no images"):
        image_samples(open_model(qwen2_folder), images)


def test_a_seed_chooses_images(model: Model, images: Path) -> None:
    def chosen(seed: int) -> list[str]:
        made: ImageSamples = image_samples(model, images, samples=2, seed=seed)
        return [question.image.name for question in made.questions]

    assert chosen(1) == chosen(1)
    assert len({tuple(chosen(seed)) for seed in range(8)}) > 1


def _write(file: Path, content: Any) -> Path:
    # JSON is YAML too.
    file.write_text(json.dumps(content))
    return file


def test_a_folder_without_chat_template_is_told(
    qwen2vl_folder: Path, images: Path, tmp_path: Path
) -> None:
    folder = tiny_models.classic_folder(qwen2vl_folder, tmp_path / "bare")
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="holds no chat template"):
        image_samples(open_model(folder), images)
